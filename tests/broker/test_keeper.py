"""The keeper: workers come and go, what was stored stays, and its own end is everybody's."""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from backends import PATIENCE
from raw_client import RawClient, raw_client
from running_broker import RunningBroker

Broker = Callable[..., RunningBroker]
Policy = Callable[..., str]
Connect = Callable[..., RawClient]

PROGRAM = (sys.executable, "-m", "teemate.broker.main", "--keeper", "--backend", "sim")


def await_end(pid: int) -> None:
    """Return when the process, which need not be our child, has ended."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(30_000 * PATIENCE), f"process {pid} did not end"
        finally:
            os.close(pidfd)


def notify_socket(broker: RunningBroker) -> str:
    """Where the keeper listens, as its worker was told."""
    environment = Path(f"/proc/{broker.worker()}/environ").read_bytes().split(b"\0")
    (address,) = [entry[14:] for entry in environment if entry.startswith(b"NOTIFY_SOCKET=")]
    return address.decode()


def test_a_killed_worker_is_replaced_and_whoever_connects_meanwhile_is_answered(broker: Broker) -> None:
    running = broker("", keeper=True)
    first = running.kill_worker()
    with raw_client(running.socket) as client:
        client.ok("ping")
    assert running.worker() != first


def test_the_next_worker_is_loaded_already_and_takes_over_at_once(broker: Broker) -> None:
    running = broker("", keeper=True)
    for _ in range(2):
        while not (others := _children(running.pid) - {running.worker()}):
            with raw_client(running.socket) as client:
                client.ok("ping")  # it is started once the worker is ready
        (successor,) = others
        running.kill_worker()
        with raw_client(running.socket) as client:
            client.ok("ping")
        assert running.worker() == successor


def test_a_manager_that_does_not_listen_holds_nobody_up(broker: Broker) -> None:
    running = broker("", keeper=True)  # whose notify socket nobody reads once it is ready
    for _ in range(15):  # more than net.unix.max_dgram_qlen
        with raw_client(running.socket) as client:
            client.ok("ping")
        running.kill_worker()
    with raw_client(running.socket) as client:
        client.ok("ping")


def _children(pid: int) -> set[int]:
    return {int(child) for child in os.listdir("/proc") if child.isdecimal() and _parent(child) == pid}


def _parent(pid: str) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def test_sighup_replaces_the_worker_by_one_of_the_code_that_is_installed_now(broker: Broker) -> None:
    running = broker("", keeper=True)
    first = running.worker()
    os.kill(running.pid, signal.SIGHUP)
    await_end(first)
    with raw_client(running.socket) as client:
        client.ok("ping")
    assert running.worker() != first


def test_the_end_of_the_keeper_s_choice_takes_worker_wardens_and_socket_along(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    running = broker(vault_policy(), keeper=True)
    client = connect(running)
    (enclave,) = client.ok("stats")["stats"]["enclaves"]
    address = notify_socket(running)
    os.kill(running.pid, signal.SIGTERM)
    farewell = client.receive()
    assert farewell is not None
    assert farewell["error"]["code"] == "connection-lost"
    await_end(enclave["warden"]["pid"])
    os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)
    assert not Path(running.socket).exists()
    assert not Path(address).parent.exists()


def test_when_the_keeper_is_killed_worker_and_wardens_end_and_a_new_start_works(
    broker: Broker, vault_policy: Policy, tmp_path: Path
) -> None:
    running = broker(vault_policy(), folder=tmp_path, keeper=True, expect_errors=True)
    with raw_client(running.socket) as client:
        (enclave,) = client.ok("stats")["stats"]["enclaves"]
        worker, address = running.worker(), notify_socket(running)
        os.kill(running.pid, signal.SIGKILL)
        farewell = client.receive()
        assert farewell is not None
        assert farewell["id"] is None
        assert farewell["error"]["code"] == "connection-lost"
        assert client.receive() is None
    await_end(worker)
    await_end(enclave["warden"]["pid"])
    assert not Path(address).parent.exists()
    os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)
    (tmp_path / "notify.sock").unlink()
    again = broker(vault_policy(), folder=tmp_path, keeper=True)
    with raw_client(again.socket) as client:
        client.ok("attach", enclave="vault")


def test_wardens_that_a_killed_worker_left_are_gone_before_there_is_another(
    broker: Broker, vault_policy: Policy
) -> None:
    running = broker(vault_policy(), keeper=True)
    with raw_client(running.socket) as client:
        (enclave,) = client.ok("stats")["stats"]["enclaves"]
    warden = enclave["warden"]["pid"]
    os.kill(warden, signal.SIGSTOP)  # so it does not notice by itself
    running.kill_worker()
    with raw_client(running.socket) as client:
        client.ok("ping")
    assert not Path(f"/proc/{warden}").exists()


def test_only_the_worker_is_heeded(broker: Broker) -> None:
    running = broker("", keeper=True)
    (before,) = [record for record in running.log() if record["event"] == "keeper: worker started"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(notify_socket(running))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
        sock.sendmsg([b"FDSTORE=1\nFDNAME=foreign"], rights)
        read_end, write_end = os.pipe()
        with open(read_end, "rb") as reader:
            sock.sendmsg(
                [b"BARRIER=1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write_end]))]
            )
            os.close(write_end)
            assert reader.read() == b""  # both were received and closed
    running.kill_worker()
    with raw_client(running.socket) as client:
        client.ok("ping")
    records = running.log()
    assert [r["pid"] for r in records if r["event"] == "keeper: message not heeded"] == [os.getpid()] * 2
    kept = [record["kept"] for record in records if record["event"] == "keeper: worker started"]
    assert kept == [before["kept"], 3]  # the socket that it listens on, and its state in two parts


def test_a_worker_that_says_why_it_cannot_start_is_not_started_again(tmp_path: Path) -> None:
    (tmp_path / "broker.toml").write_text("[limits]\nslots = true\n")
    done = subprocess.run(
        [*PROGRAM, "--config", str(tmp_path / "broker.toml"), "--socket", str(tmp_path / "s")],
        capture_output=True, text=True, check=False, timeout=60 * PATIENCE,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("limits.slots: expected a whole number") == 1


def test_after_failures_in_a_row_the_keeper_starts_nothing_keeps_everything_and_waits(
    broker: Broker, vault_policy: Policy
) -> None:
    running = broker(vault_policy(), keeper=True, expect_errors=True)
    policy = running.folder / "broker.toml"
    good = policy.read_text()
    policy.write_text("[broker]\nno_such_key = 1\n")
    os.kill(running.pid, signal.SIGHUP)
    while not (held := [r for r in running.log() if r["event"] == "keeper: no worker runs"]):
        time.sleep(0.01)  # the log has no other news of it
    assert held[0]["level"] == "error"
    assert f"kill -HUP {running.pid}" in str(held[0]["advice"])
    failures = [r["failures"] for r in running.log() if r["event"] == "keeper: worker did not get ready"]
    assert failures == [1, 2, 3, 4, 5, 6]
    policy.write_text(good)
    os.kill(running.pid, signal.SIGHUP)
    with raw_client(running.socket) as client:
        client.ok("ping")
