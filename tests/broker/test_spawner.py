"""The process that starts the broker's programs."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import CapturingLogger

from teemate.broker.connections.disposal import Disposal
from teemate.broker.enclaves.control import ControlKey
from teemate.broker.wardens.spawner import Spawner, begin, start_program
from teemate.broker.wardens.warden import EnclaveBrokenError, Geometry, Warden


@pytest.fixture
def one() -> Iterator[Spawner]:
    made = Spawner()
    yield made
    made.close()


def test_a_program_is_a_child_of_ours_and_has_what_it_was_given_and_nothing_else(one: Spawner) -> None:
    with open("/dev/zero", "rb") as zero, open("/dev/full", "rb") as full:
        pid = one.start(["/bin/sleep", "1000"], [full.fileno(), zero.fileno(), full.fileno()])
    try:
        folder = Path(f"/proc/{pid}/fd")
        targets = {int(entry.name): os.readlink(entry) for entry in folder.iterdir()}
        assert set(targets) == {0, 1, 2, 3, 4, 5}
        assert targets[0] == "/dev/null"
        assert [targets[number] for number in (3, 4, 5)] == ["/dev/full", "/dev/zero", "/dev/full"]
        assert Path(f"/proc/{pid}/environ").read_bytes() == b""
        assert Path(f"/proc/{pid}/cmdline").read_bytes() == b"/bin/sleep\0" + b"1000\0"
    finally:
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0) == (pid, signal.SIGKILL)


def test_it_has_nothing_of_the_process_that_began_it(one: Spawner) -> None:
    pid = one.start(["/bin/true"])  # so it has begun
    assert os.waitpid(pid, 0) == (pid, 0)
    with open("/dev/zero", "rb"):
        targets = [os.readlink(f"/proc/{one.pid}/fd/{name}") for name in os.listdir(f"/proc/{one.pid}/fd")]
    assert "/dev/zero" not in targets
    assert len(targets) == 4


def test_a_program_that_cannot_be_started_is_an_error_and_leaves_no_child(one: Spawner) -> None:
    with pytest.raises(FileNotFoundError):
        one.start(["/nowhere"])
    with pytest.raises(PermissionError):
        one.start(["/"])
    with pytest.raises(OSError, match="Argument list too long"):
        one.start(["/bin/true"] * 17)
    pid = one.start(["/bin/true"])
    assert os.waitpid(pid, 0) == (pid, 0)


def test_a_spawner_that_was_killed_is_replaced() -> None:
    first = begin()
    os.kill(first.pid, signal.SIGKILL)
    pid = start_program(["/bin/true"])
    assert os.waitpid(pid, 0) == (pid, 0)
    assert begin() is not first


def test_it_ends_with_who_began_it() -> None:
    made = Spawner()
    pidfd = os.pidfd_open(made.pid)
    try:
        made._sock.shutdown(socket.SHUT_RDWR)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
    finally:
        os.close(pidfd)
        made.close()


@pytest.fixture
def starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may start no other; its spawner may."""
    begin()

    def start(*_: object, **__: object) -> int:
        raise AssertionError("the broker started a process")

    monkeypatch.setattr(os, "posix_spawn", start)


@pytest.mark.usefixtures("starts_nothing")
def test_closers_are_started_by_it() -> None:
    ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(600)]
    Disposal()._drop([ours.detach() for ours, _ in ends])
    for _, theirs in ends:
        assert theirs.recv(1) == b"", "it is closed"
        theirs.close()


@pytest.mark.usefixtures("starts_nothing")
async def test_wardens_are_started_by_it() -> None:
    geometry = Geometry(backend=0, base=0, size=4096, segments=())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fds = (ours.fileno(), theirs.fileno())
        warden = Warden(
            Path("/bin/true"), geometry, ControlKey(), fds, CapturingLogger(), deadline=30.0, failures=1
        )
        with pytest.raises(EnclaveBrokenError):
            await warden.start()
