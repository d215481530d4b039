"""The gateway's processes: several workers behind one socket, one of which may die at any time."""

from __future__ import annotations

import contextlib
import errno
import http.client
import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import trio
from processes import wait_for_end, wait_for_stop, wait_until
from running_gateway import CUT, DEADLINE, Killer, RunningGateway, run_gateway
from structlog.testing import CapturingLogger

from teemate.gateway.settings import Settings

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hypercorn") is None, reason="needs hypercorn: pip install 'teemate[gateway]'"
)


class Asking(threading.Thread):
    """One request, in a thread."""

    def __init__(self, gateway: RunningGateway, path: str) -> None:
        super().__init__()
        self._gateway = gateway
        self._path = path
        self.reply: bytes | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            # What it waits for is the test's, however long that takes on a busy machine.
            self.reply = self._gateway.request("POST", self._path, headers={"TeeMate-Timeout": "60"}).body
        except (OSError, http.client.HTTPException) as error:
            self.error = error


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    with run_gateway("--workers", "2", "--max-body", "2M") as running:
        yield running


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """Where ``hold`` waits, until :func:`let_go`."""
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


@contextlib.contextmanager
def alone(gateway: RunningGateway, worker: int) -> Iterator[None]:
    """Have `worker` get whatever is asked meanwhile: the others stand still."""
    others = set(gateway.workers()) - {worker}
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
        wait_for_stop(pid)
    try:
        yield
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)


def hold(gateway: RunningGateway, held: Path, worker: int) -> Asking:
    """Ask `worker` for something that takes until it is let go."""
    there = len(list(held.iterdir()))
    with alone(gateway, worker):
        asked = Asking(gateway, f"/fn/hold?arg={held}")
        wait_until(lambda: len(list(held.iterdir())) > there, "the function runs")
    return asked


@contextlib.contextmanager
def let_go(held: Path) -> Iterator[None]:
    """Whatever is held, or would be, ends."""
    writer = os.open(held / "fifo", os.O_RDWR)
    try:
        yield
    finally:
        os.close(writer)


def test_bodies_of_any_size_go_in_and_come_out_whole(gateway: RunningGateway) -> None:
    connection = gateway.connection()
    for size in (0, 1, 65_535, 65_536, 65_537, 2 << 20):
        payload = random.Random(size).randbytes(size)
        assert gateway.request("POST", "/fn/echo", payload, over=connection).body == payload
        pieces = (payload[at : at + 10_000] for at in range(0, size, 10_000))
        assert gateway.request("POST", "/fn/echo", pieces, over=connection).body == payload
    connection.close()


@pytest.mark.parametrize("chunked", [False, True])
def test_who_sends_too_much_reads_why(gateway: RunningGateway, chunked: bool) -> None:
    body = b"x" * (2 << 20) + b"more"
    reply = gateway.request("POST", "/fn/echo", iter([body]) if chunked else body)
    assert (reply.status, reply.json()["code"]) == (413, "limit-reached")


def test_what_is_no_http_gets_400_and_harms_nobody(gateway: RunningGateway) -> None:
    connection = gateway.connection()
    connection.connect()
    connection.sock.sendall(b"GARBAGE\r\n\r\n")
    assert connection.sock.recv(12) == b"HTTP/1.1 400"
    connection.close()
    assert gateway.request("GET", "/healthz").json()["status"] == "ok"


def test_a_connection_that_the_server_cannot_serve_ends_no_worker(gateway: RunningGateway) -> None:
    from h2.config import H2Configuration
    from h2.connection import H2Connection

    peer = H2Connection(H2Configuration(client_side=True, validate_outbound_headers=False))
    peer.initiate_connection()
    head = [(":method", "GET"), (":scheme", "http"), (":authority", "here"), (":path", b"/\xff")]
    peer.send_headers(1, head, end_stream=True)
    connection = gateway.connection()
    connection.connect()
    connection.sock.sendall(peer.data_to_send())
    while connection.sock.recv(1 << 16):
        pass
    connection.close()
    wait_until(lambda: gateway.log("connection failed"), "it is logged")
    assert not gateway.log("worker ended")


def test_a_worker_that_dies_takes_its_own_requests_along_and_no_others(held: Path) -> None:
    with run_gateway("--workers", "2", "--slots", "2") as gateway:
        victim, other = gateway.workers()
        lost = [hold(gateway, held, victim) for _ in range(2)]
        kept = [hold(gateway, held, other) for _ in range(2)]
        os.kill(victim, signal.SIGKILL)
        for asked in lost:
            asked.join(DEADLINE)
            assert isinstance(asked.error, CUT)
        with let_go(held):
            for asked in kept:
                asked.join(DEADLINE)
                assert asked.reply == str(other).encode()
        gateway.wait_for_workers(2, other_than=victim)
        (ended,) = gateway.log("worker ended")
        assert ended["status"] == -signal.SIGKILL


def test_a_gateway_that_is_told_to_end_answers_what_is_under_way(held: Path) -> None:
    with run_gateway("--workers", "2", "--slots", "1") as gateway:
        one, other = gateway.workers()
        asked = hold(gateway, held, one)
        gateway.process.send_signal(signal.SIGTERM)
        wait_for_end([other])
        with let_go(held):
            asked.join(DEADLINE)
        assert asked.reply == str(one).encode()
        assert gateway.process.wait(DEADLINE) == 0


def test_workers_end_with_a_supervisor_that_was_killed() -> None:
    with run_gateway("--workers", "2", ends_well=False) as gateway:
        workers = gateway.workers()
        assert len(workers) == 2
        gateway.process.kill()
        gateway.process.wait()
        wait_for_end(workers)


@pytest.mark.parametrize("lacking", ["processes", "descriptors"])
async def test_a_worker_that_cannot_be_started_is_started_when_it_can_be(
    monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    from teemate.gateway import supervisor

    records, again = CapturingLogger(), trio.Event()

    def note(_logger: object, _method: str, record: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if len(records.calls) == 1:
            again.set()
        return record

    log = structlog.wrap_logger(records, processors=[note])
    keeper = supervisor.Supervisor(Settings(), [], log, "json")
    module, name = (subprocess, "Popen") if lacking == "processes" else (os, "pidfd_open")
    real = getattr(module, name)

    def lack(*_: object, **__: object) -> None:
        monkeypatch.setattr(module, name, real)
        raise OSError(errno.EAGAIN, "there are no more")

    monkeypatch.setattr(supervisor, "WORKER", (sys.executable, "-c", ""))
    monkeypatch.setattr(module, name, lack)
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper._keep, 0)
            await again.wait()
            nursery.cancel_scope.cancel()
    first, second = (record.kwargs for record in records.calls[:2])
    assert (first["status"], "no more" in first["reason"]) == (None, True)
    assert second["status"] == 0
    assert keeper.statistics().pids == ()


def test_who_is_told_to_end_before_it_is_ready_ends() -> None:
    program = """
import os, signal, sys
from teemate.gateway import supervisor
run = supervisor.Supervisor.run
async def told(self):
    os.kill(os.getpid(), signal.SIGTERM)
    await run(self)
supervisor.Supervisor.run = told
supervisor.WORKER = (sys.executable, sys.argv[1], "--worker")
sys.argv = ["teemate-gateway", "--listen", "127.0.0.1:0"]
from teemate.gateway.main import main
main()
"""
    played = Path(__file__).with_name("played_gateway.py")
    done = subprocess.run([sys.executable, "-c", program, str(played)], capture_output=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    assert b"stopping" in done.stderr


def test_every_request_is_answered_once_or_its_connection_closed_while_workers_are_killed(
    request: pytest.FixtureRequest,
) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("test_gateway_enclave.py kills some, this many: pytest --full tests/functions")
    requests = 2_000
    chance = random.Random(20)
    outcomes: Counter[str] = Counter()
    with run_gateway("--workers", "2") as gateway:
        killer = Killer(gateway, workers=2, kills=requests // 50)
        number = 0
        while number < requests or killer.is_alive():
            number += 1
            payload = b"%d " % number * chance.randrange(1, 5000)
            try:
                reply = gateway.request("POST", "/fn/echo", payload)
            except CUT:
                outcomes["closed"] += 1
            else:
                assert (reply.status, reply.body) == (200, payload)
                outcomes["answered"] += 1
        killer.finish()
        assert sum(outcomes.values()) == number
        assert outcomes["answered"] > outcomes["closed"]
        # What was answered was done once: no request is asked again behind its sender's back.
        assert outcomes["answered"] <= len(gateway.log("request")) <= number


def test_where_it_cannot_listen_is_said(gateway: RunningGateway) -> None:
    for place, why in ((f"unix:{gateway.socket}", "somebody listens"), ("0.0.0.0:80", "loopback")):
        done = subprocess.run(
            [sys.executable, "-m", "teemate.gateway.main", "--listen", place],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == 1
        assert why in done.stderr
        assert "Traceback" not in done.stderr
