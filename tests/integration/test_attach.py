"""One enclave for many: attach, call, share, release, through a real broker."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from backends import BACKEND, PATIENCE
from images import Images
from policies import enclave_policy
from processes import wait_for_end
from running_broker import RunningBroker

import teemate
from teemate.vault import Vault

StartBroker = Callable[..., RunningBroker]


def run_client(socket: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh interpreter; `path` is the broker's socket there."""
    return subprocess.run(
        [sys.executable, "-c", f"import os, sys, teemate\npath = sys.argv[1]\n{code}", socket, *arguments],
        capture_output=True,
        text=True,
        timeout=120 * PATIENCE,
    )


def ping_for_ever(connection: teemate.Broker) -> None:
    while True:
        connection.ping()


def test_the_enclave_is_listed_attached_and_called(broker: StartBroker, policy: str, images: Images) -> None:
    running = broker(policy)
    with teemate.connect(running.socket, client="test") as connection:
        connection.ping()
        (info,) = [info for info in connection.enclaves() if info.name == "vault"]
        assert (info.backend, info.isolation, info.state) == (BACKEND, "gate", "ready")
        assert info.mrenclave == images.vault.mrenclave
        with connection.attach("vault", slots=2) as enclave:
            assert (enclave.mrenclave, enclave.base, enclave.size) == (info.mrenclave, info.base, info.size)
            with enclave.slot() as slot:
                assert slot.call("echo", b"hello") == b"hello"
                assert Vault(slot).mrenclave() == images.vault.mrenclave
        assert f"{info.base:x}-" not in Path("/proc/self/maps").read_text()


def test_two_processes_share_one_enclave_and_nothing_else(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    with teemate.connect(running.socket) as connection, connection.attach("vault") as enclave:
        with enclave.slot() as slot:
            Vault(slot).put(b"from", b"parent")
            done = run_client(
                running.socket,
                """
from teemate.vault import Vault
with teemate.connect(path) as broker, broker.attach("vault") as enclave, enclave.slot() as slot:
    print(Vault(slot).get(b"from").value.decode(), enclave.base, slot.index)
    Vault(slot).put(b"back", b"child")
""",
            )
            assert done.returncode == 0, done.stderr
            said, base, index = done.stdout.split()
            assert (said, int(base)) == ("parent", enclave.base)
            assert int(index) != slot.index
            entry = Vault(slot).get(b"back")
            assert entry is not None
            assert entry.value == b"child"


def test_threads_share_one_connection_and_one_enclave(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    with teemate.connect(running.socket) as connection, connection.attach("faults", slots=4) as enclave:
        failures: list[BaseException] = []

        def body() -> None:
            try:
                for _ in range(20):
                    with enclave.slot(wait=60) as slot:
                        slot.call("count", struct.pack("<Q", 5))
                    connection.ping()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=body) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert failures == []
        with enclave.slot() as slot:
            assert slot.call("count", struct.pack("<Q", 1)) == struct.pack("<Q", 8 * 20 * 5 + 1)


def test_slots_are_acquired_and_released(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    with teemate.connect(running.socket) as connection, connection.attach("vault") as enclave:
        enclave.acquire(2)
        assert enclave.statistics().slots == 3
        with enclave.slot() as one, enclave.slot() as two, enclave.slot() as three:
            assert len({one.index, two.index, three.index}) == 3
            for slot in (one, two, three):
                slot.call("empty")
        enclave.release(2)
        assert enclave.statistics().slots == 1
        with pytest.raises(teemate.Busy, match="only 1"):
            enclave.release(2)
        with enclave.slot() as slot:
            slot.call("empty")
        with pytest.raises(teemate.Busy, match="slots_per_client"):
            enclave.acquire(8)


def test_a_released_slot_is_scrubbed_before_its_next_holder(broker: StartBroker, images: Images) -> None:
    image = images.build("faults", slots=1)
    running = broker(enclave_policy("faults", image))
    generations = []
    with teemate.connect(running.socket) as first, first.attach("faults") as enclave, enclave.slot() as slot:
        slot.call("plant")
        generations.append((slot.index, slot.generation))
        found = struct.unpack("<3Q", slot.call("search"))
        assert sum(found) > 0
    with teemate.connect(running.socket) as later, later.attach("faults") as enclave, enclave.slot() as slot:
        generations.append((slot.index, slot.generation))
        assert struct.unpack("<3Q", slot.call("search")) == (0, 0, 0)
    (index, before), (again, after) = generations
    assert index == again
    assert after > before


def test_more_slots_than_there_are_is_busy_after_the_wait(broker: StartBroker, images: Images) -> None:
    image = images.build("vault", slots=1, heap="1M")
    running = broker(enclave_policy("vault", image))
    with teemate.connect(running.socket) as first, teemate.connect(running.socket) as second:
        with first.attach("vault"):
            with pytest.raises(teemate.Busy):
                second.attach("vault", wait=0.05)
        with second.attach("vault", wait=30) as enclave, enclave.slot() as slot:
            slot.call("empty")


def test_a_waiting_attach_gets_the_slot_that_somebody_gives_back(broker: StartBroker, images: Images) -> None:
    image = images.build("vault", slots=1, heap="1M")
    running = broker(enclave_policy("vault", image))
    answers: list[bytes] = []

    def wait_for_it() -> None:
        with teemate.connect(running.socket) as second, second.attach("vault", wait=60) as enclave:
            with enclave.slot() as slot:
                answers.append(slot.call("echo", b"second"))

    with teemate.connect(running.socket) as first, first.attach("vault"):
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        first.ping()
    thread.join(60)
    assert answers == [b"second"]


def test_what_is_mapped_in_the_way_is_named_and_costs_no_slot(
    broker: StartBroker, policy: str, tmp_path: Path
) -> None:
    running = broker(policy)
    with teemate.connect(running.socket) as connection:
        (info,) = [info for info in connection.enclaves() if info.name == "vault"]
    blocker = tmp_path / "in-the-way"
    blocker.write_bytes(bytes(mmap.PAGESIZE))
    done = run_client(
        running.socket,
        """
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
fd = os.open(sys.argv[3], os.O_RDONLY)
at = int(sys.argv[2]) + 4096
MAP_FIXED_NOREPLACE = 0x100000
assert libc.mmap(at, 4096, mmap.PROT_READ, mmap.MAP_PRIVATE | MAP_FIXED_NOREPLACE, fd, 0) == at
with teemate.connect(path) as broker:
    try:
        broker.attach("vault", slots=8)
    except teemate.AddressInUse as error:
        print(error.message)
    libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(4096))
    with broker.attach("vault", slots=8) as enclave, enclave.slot() as slot:
        slot.call("empty")
""",
        str(info.base),
        str(blocker),
    )
    assert done.returncode == 0, done.stderr
    assert str(blocker) in done.stdout


def test_a_child_of_fork_holds_no_grant_until_it_attaches_itself(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    done = run_client(
        running.socket,
        """
with teemate.connect(path) as broker, broker.attach("vault") as enclave, enclave.slot() as slot:
    slot.call("empty")
    child = os.fork()
    if child == 0:
        refused = 0
        for attempt in (lambda: slot.call("empty"), broker.ping, enclave.acquire, enclave.release):
            try:
                attempt()
            except teemate.NotAttached:
                refused += 1
        enclave.detach()
        with teemate.connect(path) as own, own.attach("vault") as mine, mine.slot() as my_slot:
            answer = my_slot.call("echo", b"child")
        os._exit(0 if refused == 4 and answer == b"child" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert slot.call("echo", b"parent") == b"parent"
    broker.ping()
""",
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_enclave_is_not_found_and_a_foreign_one_denied(
    broker: StartBroker, images: Images
) -> None:
    foreign = enclave_policy("vault", images.vault).replace(f"uid = {os.geteuid()}", "uid = 54321")
    running = broker(foreign)
    with teemate.connect(running.socket) as connection:
        with pytest.raises(teemate.Error) as unknown:
            connection.attach("no such enclave")
        with pytest.raises(teemate.Error) as denied:
            connection.attach("vault")
        assert isinstance(unknown.value, teemate.NotFound | teemate.Denied)
        assert isinstance(denied.value, teemate.NotFound | teemate.Denied)


class EnoughError(Exception):
    """The loop has been interrupted often enough."""


def test_a_loop_that_is_inside_when_the_broker_is_killed_goes_on(broker: StartBroker, policy: str) -> None:
    running = broker(policy, expect_errors=True)
    seen = 0

    def handler(_number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if frame is None or not frame.f_code.co_filename.endswith("_slot.py"):
            return  # not in the call: the enclave is interrupted only there
        if not seen:
            os.kill(running.pid, 9)
            wait_for_end([running.pid])
        elif seen == 5:
            signal.setitimer(signal.ITIMER_REAL, 0)  # the next may come before this one is handled
            raise EnoughError
        seen += 1

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with teemate.connect(running.socket) as connection, connection.attach("faults", slots=2) as enclave:
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
            with pytest.raises(EnoughError), enclave.slot() as slot:
                slot.call("loop", timeout=100)
            signal.setitimer(signal.ITIMER_REAL, 0)
            with enclave.slot() as slot:
                assert slot.call("echo", b"still here") == b"still here"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen == 5


def test_a_call_that_waits_for_its_ocall_when_the_broker_is_killed_goes_on(
    broker: StartBroker, policy: str
) -> None:
    running = broker(policy, expect_errors=True)
    with teemate.connect(running.socket) as connection, connection.attach("faults") as enclave:

        def kill_the_broker(data: bytes) -> bytes:
            os.kill(running.pid, 9)
            with pytest.raises(teemate.ConnectionLost):
                ping_for_ever(connection)
            return data[::-1]

        with enclave.slot() as slot:
            assert slot.call("ocall", b"abc", ocalls={"echo": kill_the_broker}) == b"cba"
            assert slot.call("count", struct.pack("<Q", 20000)) == struct.pack("<Q", 20000)


def test_calls_go_on_when_the_broker_is_gone(broker: StartBroker, policy: str) -> None:
    running = broker(policy, expect_errors=True)
    with teemate.connect(running.socket) as connection, connection.attach("vault") as enclave:
        with enclave.slot() as slot:
            Vault(slot).put(b"key", b"value")
            os.kill(running.pid, 9)
            with pytest.raises(teemate.ConnectionLost):
                ping_for_ever(connection)
            entry = Vault(slot).get(b"key")
            assert entry is not None
            assert entry.value == b"value"
        with pytest.raises(teemate.ConnectionLost):
            enclave.acquire()
