"""A real ``teemate-gateway`` with its workers, and plain HTTP requests to it over its Unix socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends import PATIENCE
from processes import wait_until

DEADLINE = 60.0 * PATIENCE
CUT = (http.client.RemoteDisconnected, http.client.IncompleteRead, ConnectionError)
"""How a client sees that whoever served it has died: no answer, or one that is not whole."""
HERE = Path(__file__).resolve().parent


class Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=DEADLINE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(self._path)


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes
    headers: dict[str, str]

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class RunningGateway:
    """A gateway that is ready."""

    socket: str
    process: subprocess.Popen[bytes]
    log_file: Path

    def connection(self) -> Connection:
        return Connection(self.socket)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None = None,
        headers: dict[str, str] | None = None,
        over: Connection | None = None,
    ) -> Reply:
        """Ask once, over a connection of its own or `over` one that is kept."""
        connection = over or self.connection()
        try:
            connection.request(method, path, body, headers or {})
            with connection.getresponse() as response:
                return Reply(
                    response.status, response.read(), {k.lower(): v for k, v in response.getheaders()}
                )
        finally:
            if over is None:
                connection.close()

    def log(self, event: str = "") -> list[dict[str, Any]]:
        """Its records so far, or those of one event; a line that is no record fails."""
        whole = self.log_file.read_text().rpartition("\n")[0]  # the last one may be on its way
        records: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
        return [record for record in records if event in ("", record["event"])]

    def workers(self) -> list[int]:
        """The pids of the workers that are ready, by number."""
        found: dict[int, int] = {}
        for record in self.log():
            if record["event"] == "worker ready":
                found[record["number"]] = record["worker"]
            elif record["event"] == "worker ended":
                found.pop(record["number"], None)
        return [pid for _, pid in sorted(found.items())]

    def wait_for_workers(self, count: int, *, other_than: int = 0) -> list[int]:
        """Wait until `count` workers are ready, none of them the one that was killed."""
        found: list[int] = []

        def there() -> bool:
            found[:] = self.workers()
            return len(found) == count and other_than not in found

        wait_until(there, "workers run")
        return found

    def exchange(self, path: str, payload: bytes) -> bytes:
        """POST over a connection of its own, and return every byte that comes until that is closed."""
        return exchange(self.socket, path, payload)

    def stop(self) -> int:
        """End it as a service manager does, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE)


def exchange(socket_path: str, path: str, payload: bytes) -> bytes:
    """Send one request to who listens there; a connection that is reset ends what is returned."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(payload)}"
    got = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(socket_path)
        with contextlib.suppress(ConnectionError):
            sock.sendall(head.encode() + b"\r\n\r\n" + payload)
        with contextlib.suppress(ConnectionError):
            while piece := sock.recv(1 << 16):
                got += piece
    return bytes(got)


class Killer(threading.Thread):
    """Kills `kills` workers, by turns, each when all are ready; a failure is raised by :meth:`finish`."""

    def __init__(self, gateway: RunningGateway, workers: int, kills: int) -> None:
        super().__init__()
        self._gateway = gateway
        self._workers = workers
        self._kills = kills
        self._failure: BaseException | None = None
        self.when: list[tuple[float, float]] = []
        """Just before each kill, and when nothing of that worker was left."""
        self.start()

    def run(self) -> None:
        try:
            victim = 0
            for number in range(self._kills):
                ready = self._gateway.wait_for_workers(self._workers, other_than=victim)
                victim = ready[number % self._workers]
                self._kill(victim)
            wait_until(lambda: len(self._gateway.log("worker ended")) >= self._kills, "every end is noticed")
        except BaseException as failure:
            self._failure = failure

    def _kill(self, victim: int) -> None:
        pidfd = os.pidfd_open(victim)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            before = time.monotonic()
            self.when.append((before, math.inf))  # before whoever it cuts off can look
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            assert poll.poll(DEADLINE * 1000), f"{victim} does not end"
            self.when[-1] = (before, time.monotonic())
        finally:
            os.close(pidfd)

    def explains(self, sent: float, ended: float) -> bool:
        """Whether a worker was killed while a request was under way."""
        return any(before <= ended and sent <= after for before, after in self.when)

    def finish(self) -> None:
        """Wait until all is done, and see that no other worker has ended."""
        self.join(2 * DEADLINE * self._kills)
        if self._failure is not None:
            raise self._failure
        ended = [record["status"] for record in self._gateway.log("worker ended")]
        assert ended == [-signal.SIGKILL] * self._kills, self._gateway.log_file.read_text()


@contextlib.contextmanager
def run_gateway(*options: str, broker: str | None = None, ends_well: bool = True) -> Iterator[RunningGateway]:
    """Run a gateway until the block ends; without a `broker` its functions are played (played_gateway.py)."""
    with contextlib.ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="tm-")))
        path, notify_path, log_file = folder / "gateway.sock", folder / "notify.sock", folder / "gateway.log"
        notify = cleanup.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC))
        notify.bind(str(notify_path))
        program = ["-m", "teemate.gateway.main"] if broker else [str(HERE / "played_gateway.py")]
        environment = {**os.environ, "NOTIFY_SOCKET": str(notify_path)}
        if broker:
            environment["TEEMATE_SOCKET"] = broker
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *program, "--listen", f"unix:{path}", "--log-format", "json", *options],
                stdout=log,
                stderr=log,
                env=environment,
            )
        try:
            _wait_ready(process, notify, log_file)
            yield RunningGateway(str(path), process, log_file)
            if ends_well:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                assert process.wait(DEADLINE) == 0, log_file.read_text()
                assert not path.exists()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait_ready(process: subprocess.Popen[bytes], notify: socket.socket, log_file: Path) -> None:
    pidfd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(notify, select.POLLIN)
        ready = dict(poll.poll(DEADLINE * 1000))
    finally:
        os.close(pidfd)
    assert notify.fileno() in ready, f"the gateway did not get ready: {log_file.read_text()}"
    assert notify.recv(100) == b"READY=1"
