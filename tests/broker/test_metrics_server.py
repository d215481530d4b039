"""The HTTP of the metrics: strict, bounded, and nobody's burden."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import structlog
import trio
from backends import PATIENCE
from trio.testing import wait_all_tasks_blocked

from teemate.broker.policy.rules import MetricsSettings
from teemate.broker.server import bind
from teemate.broker.telemetry import metrics_server
from teemate.broker.telemetry.metrics_server import MetricsServer, Render, parse_head

GOOD = b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: a/b\r\n\r\n"
OPENMETRICS = "application/openmetrics-text;version=1.0.0"


class Metrics:
    """What is served instead of a broker's statistics."""

    def __init__(self) -> None:
        self.collected = 0

    def collect(self) -> Render:
        self.collected += 1
        text = b"collection %d\n" % self.collected
        return lambda accept: (text, f"text/plain; as={accept}")


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with bind(str(tmp_path / "m"), mode=0o600, gid=None, kind=socket.SOCK_STREAM) as sock:
        yield sock


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def make(metrics: Metrics) -> MetricsServer:
    return MetricsServer(metrics.collect, structlog.wrap_logger(structlog.ReturnLogger()))


async def exchange(listener: socket.socket, request: bytes, *, end: bool = False) -> bytes:
    """Send and read to the end; `end`: nothing more will come from us."""
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        await sock.connect(listener.getsockname())
        while request:
            try:
                request = request[await sock.send(request) :]
            except BrokenPipeError:
                break
        if end:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        while data := await sock.recv(65536):
            answer += data
        return answer


async def test_a_reader_gets_the_metrics_in_the_format_it_asked_for(
    listener: socket.socket, metrics: Metrics, nursery: trio.Nursery
) -> None:
    nursery.start_soon(make(metrics).run, [listener])
    answer = await exchange(listener, GOOD)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nContent-Type: text/plain; as=\r\n" in head
    assert b"\r\nContent-Length: 13\r\n" in head
    assert body == b"collection 1\n"
    answer = await exchange(listener, GOOD.replace(b"a/b", OPENMETRICS.encode()))
    assert b"as=%s\r\n" % OPENMETRICS.encode() in answer


async def test_a_head_is_the_same_without_the_text(
    listener: socket.socket, metrics: Metrics, nursery: trio.Nursery
) -> None:
    nursery.start_soon(make(metrics).run, [listener])
    answer = await exchange(listener, GOOD.replace(b"GET", b"HEAD"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"Connection: close\r\n\r\n")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400),
        (b"GET  /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\nHost: x\n\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n folded: line\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nx: \x00\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 400),
        (b"GET /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../etc HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /metrics HTTP/1.1\r\nx: " + b"a" * 9000, 431),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n", 400),
    ],
)
async def test_everything_else_is_refused_with_its_status(
    listener: socket.socket, metrics: Metrics, nursery: trio.Nursery, request_: bytes, status: int
) -> None:
    server = make(metrics)
    nursery.start_soon(server.run, [listener])
    answer = await exchange(listener, request_, end=True)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert metrics.collected == 0
    assert server.statistics().refused == 1
    assert (await exchange(listener, GOOD)).startswith(b"HTTP/1.1 200 OK\r\n"), "the next one is served"


@contextmanager
def endless_after(seconds: float) -> Iterator[None]:
    """Fail when the block takes so much of the processor: it would not end at all."""

    def fail(_number: int, _frame: object) -> None:
        raise AssertionError("it takes for ever")

    before = signal.signal(signal.SIGVTALRM, fail)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_a_field_of_blanks_is_looked_at_once() -> None:
    """A million of them, since the time grows with the square where blanks can be taken in two ways."""
    with endless_after(60 * PATIENCE), pytest.raises(metrics_server._RefusedError, match="malformed"):
        parse_head(b"GET /metrics HTTP/1.1\r\na:" + b" " * 1_000_000 + b"\x00")
    head = b"GET /metrics HTTP/1.1\r\nAccept: \t %s \t " % OPENMETRICS.encode()
    assert parse_head(head).accept == OPENMETRICS


async def test_what_is_asked_for_in_many_ways_is_made_twice_and_nobody_is_refused(
    listener: socket.socket, metrics: Metrics, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "FRESH_SECONDS", 1e9)
    nursery.start_soon(make(metrics).run, [listener])
    for number in range(3 * metrics_server.READERS):
        for kind in ("text/plain", "Application/OpenMetrics-Text"):
            accept = f"{kind};version=x{number};q=0.{number}".encode()
            answer = await exchange(listener, GOOD.replace(b"a/b", accept))
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert f"x{number}".encode() not in answer
    assert metrics.collected == 2


async def test_readers_within_a_second_get_one_text_and_later_ones_the_next(
    listener: socket.socket,
    metrics: Metrics,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics_server, "FRESH_SECONDS", 1e9)
    nursery.start_soon(make(metrics).run, [listener])
    for _ in range(3):
        assert (await exchange(listener, GOOD)).endswith(b"collection 1\n")
    monkeypatch.setattr(metrics_server, "FRESH_SECONDS", 0.0)
    assert (await exchange(listener, GOOD)).endswith(b"collection 2\n")


async def test_readers_that_are_stuck_are_bounded_and_let_go(
    listener: socket.socket, metrics: Metrics, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Nobody waits for them but other readers, and those for as long as a request may take."""
    server = make(metrics)
    nursery.start_soon(server.run, [listener])
    with ExitStack() as stack:
        for number in range(3 * metrics_server.READERS):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.connect(listener.getsockname())
            sock.send(GOOD[: number % 20])  # stands still somewhere in the first line
        autojump_clock.autojump_threshold = float("inf")
        while server.statistics().readers < metrics_server.READERS:
            await wait_all_tasks_blocked()
        await wait_all_tasks_blocked()
        assert server.statistics().readers == metrics_server.READERS, "more wait in the kernel"
        for _ in range(3):
            autojump_clock.jump(metrics_server.HEAD_SECONDS + metrics_server.SEND_SECONDS)
            await wait_all_tasks_blocked()
            autojump_clock.jump(metrics_server.HEAD_SECONDS + metrics_server.SEND_SECONDS)
            await wait_all_tasks_blocked()
        autojump_clock.rate = 1.0
        assert (await exchange(listener, GOOD)).startswith(b"HTTP/1.1 200 OK\r\n")
    assert server.statistics().refused == 3 * metrics_server.READERS


async def test_a_reader_that_takes_nothing_is_let_go(
    listener: socket.socket, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "SEND_SECONDS", 0.05)
    large = b"x" * (8 << 20)
    server = MetricsServer(
        lambda: lambda _accept: (large, "text/plain"), structlog.wrap_logger(structlog.ReturnLogger())
    )
    nursery.start_soon(server.run, [listener])
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        await sock.connect(listener.getsockname())
        await sock.send(GOOD)
        while not server.statistics().answered or server.statistics().readers:
            await trio.lowlevel.checkpoint()
        received = 0
        while data := await sock.recv(1 << 20):
            received += len(data)
        assert received < len(large)


async def test_a_bug_in_collecting_ends_one_request_and_is_logged(
    listener: socket.socket, nursery: trio.Nursery
) -> None:
    logged: list[dict[str, object]] = []

    def log(_logger: object, _name: str, event: dict[str, object]) -> str:
        logged.append(event)
        return ""

    def collect() -> Render:
        raise ZeroDivisionError

    server = MetricsServer(collect, structlog.wrap_logger(structlog.ReturnLogger(), processors=[log]))
    nursery.start_soon(server.run, [listener])
    for times in range(1, metrics_server.READERS + 3):
        assert await exchange(listener, GOOD) == b""
        assert len(logged) == times
    assert isinstance(logged[0]["exc_info"], ZeroDivisionError)


def test_the_socket_of_a_broker_that_died_is_taken_over_and_that_of_one_that_lives_is_not(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "m")
    with bind(path, mode=0o600, gid=None, kind=socket.SOCK_STREAM):
        with pytest.raises(OSError, match="another broker listens"):
            bind(path, mode=0o600, gid=None, kind=socket.SOCK_STREAM)
    assert os.path.exists(path)
    bind(path, mode=0o600, gid=None, kind=socket.SOCK_STREAM).close()


async def test_only_reading_is_done_in_the_thread_that_serves_clients(
    listener: socket.socket, nursery: trio.Nursery
) -> None:
    threads: dict[str, int] = {}

    def collect() -> Render:
        threads["read"] = threading.get_ident()

        def render(accept: str) -> tuple[bytes, str]:
            threads["made"] = threading.get_ident()
            return b"", "text/plain"

        return render

    server = MetricsServer(collect, structlog.wrap_logger(structlog.ReturnLogger()))
    nursery.start_soon(server.run, [listener])
    await exchange(listener, GOOD)
    assert threads["read"] == threading.get_ident()
    assert threads["made"] != threading.get_ident()


def test_a_host_without_the_address_family_costs_the_metrics_and_not_the_broker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As under the unit, whose RestrictAddressFamilies= has no AF_INET."""
    logged: list[dict[str, object]] = []

    def log(_logger: object, _name: str, event: dict[str, object]) -> str:
        logged.append(event)
        return ""

    def refuse(family: int, _kind: int) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT), family)

    monkeypatch.setattr(socket, "socket", refuse)
    logger = structlog.wrap_logger(structlog.ReturnLogger(), processors=[log])
    for host in ("127.0.0.1", "::1"):
        assert metrics_server._open(MetricsSettings(listen=(host, 9464)), logger) == []
    assert [event["event"] for event in logged] == ["metrics not served"] * 2
    assert "[metrics] listen" in str(logged[0]["where"])
