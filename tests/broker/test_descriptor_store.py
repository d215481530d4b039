"""The descriptor store as systemd hears it, played by the test."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from teemate import Busy, LimitReached
from teemate.broker.restart import descriptor_store
from teemate.broker.restart.descriptor_store import DescriptorStore
from teemate.broker.restart.service_manager import inherited_descriptors


class Manager:
    """The service manager's end."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.settimeout(30)
        self.sock.bind(str(path))
        self.address = str(path)

    def receive(self) -> tuple[str, list[int]]:
        data, ancillary, _, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(16))
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload)
        return data.decode(), list(fds)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.sock.close()


async def test_a_descriptor_is_put_by_name_and_never_polled(manager: Manager) -> None:
    store = DescriptorStore(manager.address, 4)
    read_end, write_end = os.pipe()
    await store.put("enclave-1", write_end)
    text, (fd,) = manager.receive()
    assert sorted(text.split("\n")) == ["FDNAME=enclave-1", "FDPOLL=0", "FDSTORE=1"]
    assert os.fstat(fd).st_ino == os.fstat(write_end).st_ino
    os.fstat(write_end)  # it stays the caller's
    assert "enclave-1" in store
    await store.remove("enclave-1")
    assert manager.receive() == ("FDSTOREREMOVE=1\nFDNAME=enclave-1", [])
    assert "enclave-1" not in store
    for number in (fd, read_end, write_end):
        os.close(number)


async def test_confirming_waits_until_the_manager_has_closed_its_end(manager: Manager) -> None:
    store = DescriptorStore(manager.address, 4)
    confirmed = []

    async def confirm() -> None:
        await store.confirm()
        confirmed.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(confirm)
        await trio.testing.wait_all_tasks_blocked()
        text, (fd,) = manager.receive()
        assert text == "BARRIER=1"  # alone: systemd wants nothing else in that message
        await trio.testing.wait_all_tasks_blocked()
        assert not confirmed
        os.close(fd)
    assert confirmed


async def test_a_manager_that_does_not_confirm_is_told_of(
    manager: Manager, autojump_clock: trio.testing.MockClock
) -> None:
    with pytest.raises(Busy, match="did not confirm within 30 s"):
        await DescriptorStore(manager.address, 4).confirm()
    assert trio.current_time() >= descriptor_store.BARRIER_PATIENCE


async def test_more_than_the_manager_takes_is_refused_before_it_is_lost(manager: Manager) -> None:
    store = DescriptorStore(manager.address, 2, ["snapshot"])
    store.require_room(1)
    with pytest.raises(LimitReached, match="FileDescriptorStoreMax="):
        store.require_room(2)


@pytest.mark.parametrize("capacity", ["", "0", "many"])
def test_without_fdstore_in_the_environment_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capacity: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "@nobody")
    assert DescriptorStore.of_environment((), {"FDSTORE": capacity}) is None
    assert DescriptorStore.of_environment((), {"FDSTORE": "2"}) is not None
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert DescriptorStore.of_environment((), {"FDSTORE": "2"}) is None


def test_descriptors_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert inherited_descriptors() == []
