"""What can be seen of who does what: clients' own claims, the gate's counts, and the broker's slot time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running_broker import RunningBroker

import teemate
from teemate import wire
from teemate._connection import Connection

StartBroker = Callable[..., RunningBroker]
_NAME = "teemate-counters"


def pages() -> list[str]:
    """Where this process has such pages mapped."""
    return [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if _NAME in line]


def me(admin: teemate.Broker, name: str = "subject") -> teemate.ClientInfo:
    """What an administrator sees of the connection under test."""
    (found,) = [client for client in admin.clients(activity=True) if client.name == name]
    return found


@pytest.fixture
def admin(broker: StartBroker, policy: str) -> Iterator[teemate.Broker]:
    running = broker(policy)
    with teemate.connect(running.socket, client="admin") as admin:
        yield admin


@contextlib.contextmanager
def subject(path: str) -> Iterator[tuple[teemate.Broker, teemate.Enclave]]:
    with teemate.connect(path, client="subject") as broker, broker.attach("vault", slots=2) as enclave:
        with enclave.slot() as slot:
            slot.call("echo", b"the listener begins")
        yield broker, enclave


def test_nobody_counts_before_somebody_looks(admin: teemate.Broker) -> None:
    with subject(admin.path):
        assert me_without_activity(admin).activity is None
        assert pages() == []


def me_without_activity(admin: teemate.Broker) -> teemate.ClientInfo:
    (found,) = [client for client in admin.clients() if client.name == "subject"]
    return found


def test_calls_are_counted_from_the_first_look_on(admin: teemate.Broker) -> None:
    with subject(admin.path) as (_, enclave):
        first = me(admin).activity
        assert first is not None
        assert (first.calls, first.running) == (None, None)
        while not pages():  # the event is on its way
            pass
        before = me(admin).activity
        assert before is not None
        assert (before.calls, before.inside, before.running) == (0, 0.0, 0)
        with enclave.slot() as slot:
            for _ in range(7):
                slot.call("echo", b"x")
        after = me(admin).activity
        assert after is not None
        assert after.calls == 7
        assert after.inside is not None
        assert after.inside > 0
        assert after.held > before.held > 0
        assert len(pages()) == 1


def test_a_thread_that_is_inside_is_seen_while_it_is(admin: teemate.Broker) -> None:
    with subject(admin.path) as (_, enclave):
        me(admin)
        while not pages():
            pass
        stop = threading.Event()

        def work() -> None:
            with enclave.slot() as slot:
                while not stop.is_set():
                    slot.call("echo", b"x" * 4096)

        worker = threading.Thread(target=work)
        worker.start()
        seen = 0
        while not seen:
            activity = me(admin).activity
            assert activity is not None
            seen = activity.running or 0
        stop.set()
        worker.join()
        assert seen == 1
        activity = me(admin).activity
        assert activity is not None
        assert activity.running == 0


def test_the_gate_counts_what_the_client_does_and_the_warden_reads_it(admin: teemate.Broker) -> None:
    with subject(admin.path) as (_, enclave):
        with enclave.slot() as slot:
            index = slot.index
            before = {slot.slot: slot.calls for slot in admin.holders("vault", calls=True).slots}
            assert before[index] == 1
            for _ in range(5):
                slot.call("echo", b"x")
            counts = [before[index]]
            while counts[-1] == before[index]:  # who asks again within a second hears the same
                found = {slot.slot: slot.calls for slot in admin.holders("vault", calls=True).slots}
                counts.append(found[index])
            assert counts[-1] == 6
        assert {slot.calls for slot in admin.holders("vault").slots} == {None}


def test_slot_time_stays_when_the_slots_are_back(admin: teemate.Broker) -> None:
    with teemate.connect(admin.path, client="subject") as broker:
        with broker.attach("vault", slots=2):
            held = me(admin).activity
        back = me(admin).activity
        assert held is not None
        assert back is not None
        assert back.held >= held.held > 0
        again = me(admin).activity
        assert again is not None
        assert again.held == back.held, "the clock stands still without slots"


def test_the_page_can_be_neither_cut_nor_grown_and_rubbish_in_it_harms_nobody(admin: teemate.Broker) -> None:
    with contextlib.ExitStack() as stack:
        connection = Connection(admin.path, "subject")
        stack.callback(connection.close)
        kept: list[int] = []
        connection.on_counters = lambda fd: kept.append(os.dup(fd))
        connection.request("attach", {"enclave": "vault", "slots": 1})
        me(admin)
        while not kept:
            connection.request("ping")
        (fd,) = kept
        stack.callback(os.close, fd)
        assert os.fstat(fd).st_size == 4096
        for size in (0, 4095, 8192):
            with pytest.raises(OSError, match="not permitted"):
                os.ftruncate(fd, size)
        with pytest.raises(OSError, match="not permitted"):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        os.pwrite(fd, b"\xff" * 4096, 0)
        activity = me(admin).activity
        assert activity is not None
        assert activity.calls == (1 << 63) - 1
        assert activity.running == 0
        os.pwrite(fd, b"\x01" + bytes(7), 16)  # somebody has been inside since the clock began
        assert me(admin).activity is not None


def test_who_does_not_say_that_it_counts_gets_no_page(admin: teemate.Broker) -> None:
    """As a library of before: it could not tell what the descriptor is."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(admin.path)
        for message in (
            {"id": 0, "op": "hello", "args": {"version": 1, "client": "subject"}},
            {"id": 1, "op": "ping"},
        ):
            wire.send(sock, wire.encode(message))
            wire.receive(sock)
        activity = me(admin).activity
        assert activity is not None
        assert activity.calls is None
        assert me(admin).activity is not None
        wire.send(sock, wire.encode({"id": 2, "op": "ping"}))
        packet = wire.receive(sock)
        assert wire.decode(packet.data) == {"id": 2, "ok": {}}
        assert packet.fds == ()


def test_a_child_of_fork_does_not_count_in_its_parents_name(admin: teemate.Broker) -> None:
    with subject(admin.path):
        me(admin)
        while not pages():
            pass
        child = os.fork()
        if not child:
            os._exit(len(pages()))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_page_goes_when_the_connection_and_its_enclaves_have_gone(admin: teemate.Broker) -> None:
    with subject(admin.path):
        me(admin)
        while not pages():
            pass
    assert pages() == []


def test_after_a_restart_the_new_page_takes_the_place_of_the_old(broker: StartBroker, policy: str) -> None:
    running = broker(policy, keeper=True)
    with teemate.connect(running.socket, client="admin") as admin, subject(running.socket) as (_, enclave):
        me(admin)
        while not pages():
            pass
        (before,) = pages()
        running.kill_worker()
        activity = me(admin).activity
        assert activity is not None
        with enclave.slot() as slot:
            while activity.calls is None or activity.calls == 0:
                slot.call("echo", b"x")
                activity = me(admin).activity
                assert activity is not None
        assert pages() == [before]


@pytest.mark.parametrize("size", [0, 4096, 8192])
def test_a_page_that_could_be_cut_is_not_mapped(size: int) -> None:
    from teemate._native import ffi, lib

    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        page = ffi.new("struct teemate_counters **")
        assert lib.teemate_counters_map(fd, page) == -errno.EINVAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        found = lib.teemate_counters_map(fd, page)
        assert found == (0 if size == 4096 else -errno.EINVAL)
        lib.teemate_counters_unmap(page[0])
    finally:
        os.close(fd)
