"""A broker for one campaign: on a socket of its own, with a log that is read afterwards."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from teemate.demo._memory import children
from teemate.demo._prepare import ENCLAVE, DemoImage
from teemate.errors import InternalError

__all__ = ["UNKEPT", "BenchBroker"]

START_TIMEOUT = 120.0
_END_TIMEOUT = 30.0


UNKEPT = (sys.executable, "-m", "teemate.broker.main")
"""Starts a broker without a keeper, as the README has it."""
_KEPT = (*UNKEPT, "--keeper")


class BenchBroker:
    """A broker, or a keeper and its workers; a context manager that ends them."""

    def __init__(
        self,
        folder: Path,
        image: DemoImage,
        *,
        backend: str,
        programs: int,
        command: tuple[str, ...] = (),
        slots_per_client: int = 4,
        copies: int = 1,
        resume_grace: float = 60.0,
        storage: bool = False,
    ) -> None:
        """Have room for `programs`; `command` starts something else than our keeper.

        Of `copies` enclaves from the image the first has the image's name.  With `storage` their files are
        below :attr:`state`.
        """
        self.socket = str(folder / "broker.sock")
        self.state = folder / "state"
        self._folder = folder
        self._log = folder / "broker.log"
        self._command = command or _KEPT
        self._policy = folder / "broker.toml"
        self._process: subprocess.Popen[bytes] | None = None
        uid = os.geteuid()
        self.enclaves = [ENCLAVE if not number else f"{ENCLAVE}-{number}" for number in range(copies)]
        shared = "".join(
            f"""
[[enclave]]
name = "{name}"
image = "{image.sgxs}"
sigstruct = "{image.sigstruct}"
slots_per_client = {slots_per_client}
clients_per_uid = {4 * programs + 32}
wait = 120.0
storage = {str(storage).lower()}

[[enclave.attach]]
uid = {uid}
"""
            for name in self.enclaves
        )
        self._policy.write_text(
            f"""
[broker]
backend = "{backend}"
resume_grace = {resume_grace}
state_directory = "{self.state}"

[administrators]
uids = [{uid}]

[limits]
connections = {4 * programs + 32}
grants = {4 * programs + 32}
slots = {4 * programs + 32}
handshakes = {programs + 32}
requests_per_second = 1000000
{shared}"""
        )

    def __enter__(self) -> Self:
        """Start it, and wait until it is ready."""
        path = self._folder / "notify.sock"
        path.unlink(missing_ok=True)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify,
            self._log.open("ab") as log,
        ):
            notify.bind(str(path))
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
                [
                    *self._command, "--config", str(self._policy), "--socket", self.socket,
                    "--log-format", "json",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": str(path)},
                process_group=0,
            )  # fmt: skip
            if not self._ready(notify):
                self.__exit__()
                said = self._log.read_text(errors="replace")[-2000:]
                raise InternalError(f"the broker did not get ready; it said:\n{said}")
        return self

    def _ready(self, notify: socket.socket) -> bool:
        assert self._process is not None
        poll = select.poll()
        poll.register(notify, select.POLLIN)
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end and self._process.poll() is None:
            if poll.poll(100) and b"READY=1" in notify.recv(4096):
                return True
        return False

    def __exit__(self, *_: object) -> None:
        """End it in any case."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_END_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()

    # -- its processes ---------------------------------------------------------------------

    @property
    def keeper(self) -> int:
        """Pid of the keeper; of the broker, when there is none."""
        assert self._process is not None
        return self._process.pid

    def workers(self) -> list[int]:
        """Pids of brokers: mostly one."""
        return [pid for pid in children(self.keeper) if b"teemate.broker.main" in _command_line(pid)]

    def wardens(self) -> list[int]:
        """Pids of wardens."""
        return [pid for pid in children(self.keeper) if b"teemate-warden" in _command_line(pid)]

    def kill_keeper(self) -> None:
        """SIGKILL; what it kept is gone."""
        os.kill(self.keeper, signal.SIGKILL)
        assert self._process is not None
        self._process.wait()
        self._process = None

    # -- its log -----------------------------------------------------------------------------

    def records(self) -> Iterator[dict[str, Any]]:
        """What the brokers have logged; a line that is no record is one of level "error"."""
        with self._log.open(errors="replace") as lines:
            for line in lines:
                try:
                    yield json.loads(line)
                except ValueError:
                    yield {"level": "error", "event": line.strip()}


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
