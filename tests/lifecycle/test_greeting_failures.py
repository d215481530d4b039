"""Clients that are greeted without Python: what becomes of them when something fails."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from charged_slots import charged_slots, owned_slots
from greeted_processes import come, end, expecting_world, granted, greeted, new_process, said_last
from modelled_restart import MortalWorld, ResumingProcess

from teemate import wire
from teemate.broker._door import lib
from teemate.broker.slots.table import SlotState
from teemate.errors import ConnectionLost

SLOTS = 3


@pytest.fixture
def world() -> Iterator[MortalWorld]:
    yield from expecting_world(SLOTS)


class _Unsent:
    """The attendant, with a hello of which it says that it could not be answered."""

    def attendant_take(self, native: object, seat: int, greeting: Any) -> None:
        lib.attendant_take(native, seat, greeting)
        greeting.unsent = errno.ENOBUFS

    def __getattr__(self, name: str) -> object:
        return getattr(lib, name)


def test_who_reads_no_more_is_no_reason_to_complain_and_who_cannot_be_told_is(
    world: MortalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def complaints() -> list[dict[str, object]]:
        return [record for record in world.records if record["event"] == "cannot send"]

    shown: list[object] = []
    monitoring = world.service.monitoring
    monkeypatch.setattr(monitoring, "sent", lambda _, data, __: shown.append(wire.decode(data)["id"]))
    monkeypatch.setattr("teemate.broker.telemetry.audit._COMPLAINTS_AT_ONCE", 3)
    world.step(lambda: world.administrator.post("monitor"))
    shown.clear()
    for _ in range(20):
        process = new_process(world)

        def come_and_read_nothing(process: ResumingProcess = process) -> None:
            world.come(process)
            assert process.sock is not None
            process.sock.shutdown(socket.SHUT_RD)

        world.step(come_and_read_nothing)
        world.step(process.end)
    assert greeted(world) > 3
    assert shown.count(0) == 20 - greeted(world), "what was not sent is not shown as sent"
    assert not complaints()
    monkeypatch.setattr("teemate.broker.connections.guests.lib", _Unsent())
    count = 10
    for _ in range(count):
        world.step(lambda: world.come(new_process(world)))
    told = complaints()
    assert 0 < len(told) < count
    assert all(record["uid"] == 1000 and record["reason"] == os.strerror(errno.ENOBUFS) for record in told)
    assert [client.identity.uid for client in world.service.clients.values()] == [0]


@pytest.mark.parametrize("ended", [False, True])
def test_who_cannot_be_identified_any_more_is_refused_although_it_was_greeted(
    world: MortalWorld, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """Without a cgroup it would be another to enclaves whose principals have one."""
    process = new_process(world)
    cgroup_of = mock.Mock(side_effect=ConnectionLost(f"process {world.pid(process)} ended"))
    if not ended:
        cgroup_of.side_effect = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    monkeypatch.setattr("teemate.broker.connections.guests.cgroup_of", cgroup_of)
    world.step(lambda: world.come(process))
    assert greeted(world) == 1
    assert [client.identity.uid for client in world.service.clients.values()] == [0]
    assert not world.service.grants
    told = "client was gone before it was identified" if ended else "connection refused"
    (record,) = [record for record in world.records if record["event"] == told]
    assert record["uid"] == 1000
    assert charged_slots(world.service) == owned_slots(world.service)
    assert process.sock is not None
    (message,) = said_last(process.sock)
    assert message["error"]["code"] == ("connection-lost" if ended else "limit-reached")


class _Misread:
    """The attendant, of whose greetings the broker fails to make a client."""

    def attendant_take(self, native: object, seat: int, greeting: Any) -> None:
        lib.attendant_take(native, seat, greeting)
        greeting.told.name[0], greeting.told.name_size = 0xFF, 1

    def __getattr__(self, name: str) -> object:
        return getattr(lib, name)


@pytest.mark.parametrize("at", ["the greeting", "the grant"])
def test_a_slot_that_was_given_while_the_broker_failed_is_nobodys(
    world: MortalWorld, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    process = new_process(world)
    if at == "the greeting":
        monkeypatch.setattr("teemate.broker.connections.guests.lib", _Misread())
    else:
        monkeypatch.setattr(world.service.granting, "given", mock.Mock(side_effect=MemoryError))
    _grant, index, key = granted(come(world, process))
    assert greeted(world) == 1
    assert [record["event"] for record in world.errors()] == ["internal error"]
    world.records.clear()
    process.hear()
    assert process.sock is None, "its connection has ended"
    assert not world.service.grants
    assert [client.identity.uid for client in world.service.clients.values()] == [0]
    assert world.broker_enclave.slots.slots[index].state is SlotState.QUARANTINED
    assert not world.enclave.slots[index].opens(key)
    assert charged_slots(world.service) == owned_slots(world.service)


def test_a_client_is_served_whether_or_not_viewers_can_be_shown_that_it_came(
    world: MortalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.step(lambda: world.administrator.post("monitor"))
    with monkeypatch.context() as failing:
        failing.setattr(world.service.monitoring, "received", mock.Mock(side_effect=MemoryError))
        process = new_process(world)
        grant, _index, _key = granted(come(world, process))
    assert greeted(world) == 1
    assert {record["event"] for record in world.errors()} == {"internal error"}
    world.records.clear()
    end(world, process, grant)


def test_who_was_just_greeted_hears_with_all_others_that_there_will_be_nothing_to_resume(
    world: MortalWorld,
) -> None:
    process = new_process(world)

    def come_last() -> None:
        world.come(process)
        while world.service.attendant.step():
            pass
        assert len(world.service.clients) == 1, "the guard of this test: the broker does not know of it"
        world.service.say_farewell("the broker ends")

    world.step(come_last)
    assert greeted(world) == 1
    assert process.sock is not None
    (message,) = said_last(process.sock)
    assert "the broker ends" in message["error"]["message"]
