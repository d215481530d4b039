"""A real ``teemate-broker`` process for tests, on a temporary socket."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backends import BACKEND, PATIENCE
from fork_server import Forked, fork_broker

DEADLINE = 60.0 * PATIENCE
"""Seconds after which a broker that does not get ready, or does not end, has failed."""


@dataclass(frozen=True)
class RunningBroker:
    """A broker that is ready; ``log()`` reads what it has logged so far.  With a keeper `pid` is its."""

    socket: str
    pid: int
    folder: Path
    log_file: Path

    def log(self) -> list[dict[str, object]]:
        """Every record so far; a line that is not a record is one too (a traceback, a warning)."""
        records: list[dict[str, object]] = []
        for line in self.log_file.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                records.append({"event": "not a record", "level": "error", "text": line})
        return records

    def worker(self) -> int:
        """The keeper's present worker, or its last one."""
        pids = [record["pid"] for record in self.log() if record["event"] == "keeper: worker started"]
        assert isinstance(pids[-1], int)
        return pids[-1]

    def kill_worker(self, number: int = signal.SIGKILL) -> int:
        """Send a signal to the keeper's worker, which it survives or not; returns which process that was."""
        pid = self.worker()
        os.kill(pid, number)
        return pid

    def audit(self, kind: str) -> list[dict[str, object]]:
        """The audit records of one kind: grant, denial, revocation, end, change."""
        return [record for record in self.log() if record.get("audit") == kind]


@contextlib.contextmanager
def run_broker(
    policy: str,
    *,
    folder: Path | None = None,
    expect_errors: bool = False,
    arguments: tuple[str, ...] = (),
    launcher: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    keeper: bool = False,
) -> Iterator[RunningBroker]:
    """Run a broker with `policy` until the block ends, on the backend that was chosen for all tests.

    Readiness comes over NOTIFY_SOCKET.  The block fails when the broker logged an internal error
    or did not end well, unless `expect_errors`.  `keeper`: what is started is a keeper, whose worker
    may be killed (``kill_worker``) and is started again.
    """
    if keeper:
        arguments = ("--keeper", *arguments)
    if "--backend" not in arguments:
        arguments = ("--backend", BACKEND, *arguments)
    with contextlib.ExitStack() as cleanup:
        if folder is None:
            # Short: a socket's path has 107 bytes at most.  Open: tests connect as other users.
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="tm-")))
            folder.chmod(0o755)
        policy_file, log_file = folder / "broker.toml", folder / "broker.log"
        policy_file.write_text(policy)
        path = str(folder / "broker.sock")
        notify = cleanup.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC))
        notify.bind(str(folder / "notify.sock"))
        notify.settimeout(DEADLINE)
        log = cleanup.enter_context(log_file.open("wb"))
        arguments = ("--config", str(policy_file), "--socket", path, "--log-format", "json", *arguments)
        variables = {**os.environ, "NOTIFY_SOCKET": str(folder / "notify.sock")}
        process: subprocess.Popen[bytes] | Forked
        if launcher or environment or keeper:
            process = subprocess.Popen(
                [*launcher, sys.executable, "-m", "teemate.broker.main", *arguments],
                stdout=log,
                stderr=log,
                env={**variables, **(environment or {})},
            )
        else:
            process = cleanup.enter_context(fork_broker(list(arguments), log.fileno(), variables))
        broker = RunningBroker(path, process.pid, folder, log_file)
        try:
            _wait_ready(process, notify, log_file)
            yield broker
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
        if not expect_errors:
            bad = [record for record in broker.log() if record.get("level") in ("error", "critical")]
            assert not bad, f"the broker logged errors: {bad}"
            assert code == 0, f"the broker ended with {code}: {log_file.read_text()}"


def _wait_ready(process: subprocess.Popen[bytes] | Forked, notify: socket.socket, log_file: Path) -> None:
    """Block until READY=1, or fail at once when the process ends before it."""
    pidfd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(notify, select.POLLIN)
        events = dict(poll.poll(DEADLINE * 1000))
        if notify.fileno() in events:
            assert notify.recv(4096).startswith(b"READY=1")
            return
    finally:
        os.close(pidfd)
    ended = process.poll()
    raise AssertionError(f"the broker did not get ready (exit status {ended}): {log_file.read_text()}")
