"""SIGHUP: a changed policy holds, one with a mistake changes nothing."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from backends import BACKEND, PATIENCE
from images import Images
from processes import wait_for_end
from running_broker import RunningBroker

import teemate

Broker = Callable[..., RunningBroker]


class Manager:
    """What the broker says to the service manager, from its start on."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.settimeout(60 * PATIENCE)
        self.sock.bind(str(path))

    def until(self, start: str) -> list[str]:
        """Read until a message has a line that begins with `start`; returns that message's lines."""
        while True:
            lines = self.sock.recv(8192).decode().split("\n")
            if any(line.startswith(start) for line in lines):
                return lines


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "manager")
    yield manager
    manager.sock.close()


def policy(images: Images, attach: str, extra: str = "") -> str:
    return f"""
[administrators]
uids = [0]
[[enclave]]
name = "vault"
image = "{images.vault.sgxs}"
sigstruct = "{images.vault.sigstruct}"
owner = 0
{attach}
{extra}
"""


MAY = "[[enclave.attach]]\nuid = 0\n"


def reload(broker: RunningBroker, text: str) -> None:
    """Give the broker a new file, and return when it has been taken or refused."""
    before = _reloads(broker)
    (broker.folder / "broker.toml").write_text(text)
    os.kill(broker.pid, signal.SIGHUP)
    with teemate.connect(broker.socket) as connection:
        while _reloads(broker) == before:
            connection.ping()


def _reloads(broker: RunningBroker) -> int:
    return sum(record["event"] in ("policy taken", "policy refused") for record in broker.log())


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_changed_policy_is_in_force_and_a_grant_stays(
    broker: Broker, images: Images, stack: ExitStack
) -> None:
    running = broker(policy(images, MAY))
    holder = stack.enter_context(teemate.connect(running.socket))
    with holder.attach("vault") as enclave:
        reload(running, policy(images, "[[enclave.attach]]\nuid = 12345\n"))
        with teemate.connect(running.socket) as other, pytest.raises(teemate.Denied):
            other.attach("vault")
        with enclave.slot() as slot:
            assert slot.call("echo", b"still here") == b"still here"
    (record,) = [record for record in running.log() if record["event"] == "grants outlive their rule"]
    assert len(record["clients"]) == 1  # type: ignore[arg-type]
    reload(running, policy(images, MAY))
    with teemate.connect(running.socket) as other, other.attach("vault"):
        pass


def test_limits_of_a_changed_policy_hold_for_whoever_is_there(
    broker: Broker, images: Images, stack: ExitStack
) -> None:
    running = broker(policy(images, MAY))
    holder = stack.enter_context(teemate.connect(running.socket))
    stack.enter_context(holder.attach("vault"))
    reload(running, policy(images, MAY, "[limits]\ngrants = 1\n"))
    with pytest.raises(teemate.LimitReached, match="grants"):
        holder.attach("vault")


def test_an_enclave_that_is_new_in_the_policy_is_built(broker: Broker, images: Images) -> None:
    running = broker(policy(images, MAY))
    second = f'[[enclave]]\nname = "second"\nimage = "{images.vault.sgxs}"\nowner = 0\n'
    second += f'sigstruct = "{images.vault.sigstruct}"\n{MAY}'
    reload(running, policy(images, MAY, second))
    with teemate.connect(running.socket) as client, client.attach("second") as enclave:
        assert enclave.name == "second"


def test_a_policy_with_a_mistake_changes_nothing(broker: Broker, images: Images) -> None:
    running = broker(policy(images, MAY))
    reload(running, "[broker]\nbackand = 1\n")
    (record,) = [record for record in running.log() if record["event"] == "policy refused"]
    assert "broker.toml:2: broker.backand" in str(record["reason"])
    with teemate.connect(running.socket) as client, client.attach("vault"):
        pass


def test_what_was_fixed_at_the_start_is_said_to_wait(broker: Broker, images: Images) -> None:
    running = broker(policy(images, MAY))
    reload(running, policy(images, MAY, '[broker]\nsocket_mode = "0600"\n'))
    (record,) = [record for record in running.log() if record["event"] == "settings wait for a restart"]
    assert record["settings"] == ["socket_mode"]


def test_the_service_manager_hears_of_start_reload_and_end(
    broker: Broker, images: Images, manager: Manager, tmp_path: Path
) -> None:
    started = _start(tmp_path, policy(images, MAY))
    try:
        assert any(line.startswith("STATUS=1 enclave (") for line in manager.until("READY=1"))
        os.kill(started, signal.SIGHUP)
        manager.until("RELOADING=1")
        manager.until("READY=1")
        (tmp_path / "broker.toml").write_text("nonsense")
        os.kill(started, signal.SIGHUP)
        assert any("policy refused" in line for line in manager.until("READY=1"))
        os.kill(started, signal.SIGTERM)
        manager.until("STOPPING=1")
    finally:
        os.kill(started, signal.SIGKILL)  # our child: its number is its own until the next line
        os.waitpid(started, 0)


def test_a_manager_that_reads_nothing_keeps_no_broker_from_ending(
    images: Images, manager: Manager, tmp_path: Path
) -> None:
    started = _start(tmp_path, policy(images, MAY))
    try:
        manager.until("READY=1")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as talker:
            talker.connect(manager.sock.getsockname())
            talker.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # no more fits
                while True:
                    talker.send(b"STATUS=of somebody who talks on and on")
            os.kill(started, signal.SIGTERM)
            wait_for_end([started])
    finally:
        os.kill(started, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(started, 0)[1]) == 0


def test_a_loop_that_goes_round_feeds_the_watchdog_and_a_stopped_one_does_not(
    images: Images, manager: Manager, tmp_path: Path
) -> None:
    started = _start(tmp_path, policy(images, MAY), WATCHDOG_USEC="300000")
    try:
        for _ in range(3):
            manager.until("WATCHDOG=1")
        os.kill(started, signal.SIGSTOP)
        os.waitid(os.P_PID, started, os.WSTOPPED | os.WNOWAIT)
        while select.select([manager.sock], [], [], 0)[0]:  # what it had said before
            manager.sock.recv(8192)
        assert not select.select([manager.sock], [], [], 1.0)[0]
        os.kill(started, signal.SIGCONT)
        manager.until("WATCHDOG=1")
    finally:
        os.kill(started, signal.SIGKILL)
        os.waitpid(started, 0)


def test_a_watchdog_that_is_meant_for_another_process_is_not_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    from teemate.broker.restart.heartbeat import watchdog_seconds

    assert watchdog_seconds({"WATCHDOG_USEC": "3000000"}) == 3.0
    assert watchdog_seconds({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}) == 3.0
    assert watchdog_seconds({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}) is None
    assert watchdog_seconds({}) is None


def _start(folder: Path, text: str, **environment: str) -> int:
    """Start a broker whose messages to the manager the test reads; returns its pid."""
    (folder / "broker.toml").write_text(text)
    command = [sys.executable, "-m", "teemate.broker.main", "--config", str(folder / "broker.toml")]
    command += ["--socket", str(folder / "s"), "--backend", BACKEND, "--log-format", "json"]
    return os.posix_spawn(
        sys.executable, command, {**os.environ, "NOTIFY_SOCKET": str(folder / "manager"), **environment}
    )
