"""Answers who reads the metrics: a small, strict HTTP server on sockets of its own.

It takes GET and HEAD of /metrics without a body, one request a connection, and nothing else; the rest of
HTTP is refused with its status.  No more than a few readers are served at once, each for some seconds at
most, whatever it does, so one that is stuck costs a socket and no client anything.  Statistics are read in
the thread that serves clients, and become text in another one; who asks again within a second gets the same
text, so that nobody keeps the broker busy with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import trio

from teemate.broker.server import bind

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from teemate.broker.policy.rules import MetricsSettings
    from teemate.broker.service import Service

__all__ = ["MetricsServer", "MetricsServerStatistics", "parse_head", "serve_metrics"]

READERS = 8
"""Connections that are served at once; more wait in the kernel."""
HEAD_BYTES = 8192
HEAD_SECONDS = 5.0
"""A request has to be there in that time."""
SEND_SECONDS = 10.0
"""Its answer has to be read in that time."""
FRESH_SECONDS = 1.0
_PATH = "/metrics"
_OPENMETRICS = "application/openmetrics-text"
_REQUEST = re.compile(rb"([A-Z]{1,16}) (/[!-~]{0,1024}) HTTP/1\.[01]")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}):([\t -~\x80-\xff]*)")
"""The value with its blanks: two repeats that can both take them would try every way to share them out."""
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
}

Render = Callable[[str], tuple[bytes, str]]
"""Makes the text in the format that this Accept field asks for; returns it with its type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsServerStatistics:
    """Readers that are served now, requests that were answered with the metrics, and those refused."""

    readers: int
    answered: int
    refused: int


class _RefusedError(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


@final
@dataclass(frozen=True, slots=True)
class Head:
    """What of a request matters here."""

    method: str
    accept: str
    """One of two: OpenMetrics, or "" for the older format."""


def parse_head(untrusted: bytes) -> Head:
    """Return what a request's head, without its last empty line, asks for.

    Raises
    ------
    _RefusedError
        It is no request for the metrics; with the status that says so.

    """
    lines = untrusted.split(b"\r\n")
    request = _REQUEST.fullmatch(lines[0])
    if request is None:
        raise _RefusedError(400, "this is no HTTP/1.1 request")
    accept: list[str] = []
    for line in lines[1:]:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise _RefusedError(400, "a header field is malformed")
        name = field[1].lower()
        if name == b"accept":
            accept.append(field[2].decode("latin-1").strip())
        elif name == b"transfer-encoding" or (name == b"content-length" and field[2].strip() != b"0"):
            raise _RefusedError(400, "a request for metrics has no body")
    method = request[1].decode()
    if request[2].split(b"?")[0].decode() != _PATH:
        raise _RefusedError(404, f"there is nothing but {_PATH} here")
    if method not in ("GET", "HEAD"):
        raise _RefusedError(405, "metrics can be read only")
    # What was sent goes no further: there are two formats, so two texts are kept, whoever asks for what.
    openmetrics = any(_OPENMETRICS in wanted.lower() for wanted in accept)
    return Head(method, f"{_OPENMETRICS};version=1.0.0" if openmetrics else "")


def _answer(status: int, body: bytes, content_type: str, *, body_too: bool = True) -> bytes:
    allow = "Allow: GET, HEAD\r\n" if status == 405 else ""
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if body_too else b"")


@final
class MetricsServer:
    """Serves listening sockets, which stay their maker's.

    `collect` is called in trio's thread and returns what makes the text, in another one.
    """

    def __init__(self, collect: Callable[[], Render], log: FilteringBoundLogger) -> None:
        self._collect = collect
        self._log = log
        self._room = trio.Semaphore(READERS)
        self._rendering = trio.Lock()
        self._texts: dict[str, tuple[float, bytes, str]] = {}
        self._readers = 0
        self._answered = 0
        self._refused = 0

    async def run(self, listeners: Sequence[socket.socket]) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                listener.setblocking(False)
                nursery.start_soon(self._accept, listener, nursery)

    async def _accept(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            await self._room.acquire()
            sock: socket.socket | None = None
            try:
                await trio.lowlevel.wait_readable(listener)
                sock, _ = listener.accept()
            except BlockingIOError:
                pass
            except OSError as error:  # no descriptor for it, for example
                self._log.warning("metrics: cannot accept", reason=error.strerror)
                await trio.sleep(FRESH_SECONDS)
            finally:
                if sock is None:
                    self._room.release()
            if sock is not None:
                nursery.start_soon(self._serve, trio.socket.from_stdlib_socket(sock))

    async def _serve(self, sock: trio.socket.SocketType) -> None:
        self._readers += 1
        try:
            with sock:
                await self._serve_one(sock)
        except OSError:
            pass  # the reader has gone
        except Exception as error:
            self._log.error("internal error", task="metrics", exc_info=error)
        finally:
            self._readers -= 1
            self._room.release()

    async def _serve_one(self, sock: trio.socket.SocketType) -> None:
        try:
            head = parse_head(await self._receive_head(sock))
            body, content_type = await self._text(head.accept)
        except _RefusedError as refused:
            self._refused += 1
            text = f"{refused.why}\n".encode()
            await self._send(sock, _answer(refused.status, text, "text/plain; charset=utf-8"))
        else:
            self._answered += 1
            await self._send(sock, _answer(200, body, content_type, body_too=head.method == "GET"))

    async def _receive_head(self, sock: trio.socket.SocketType) -> bytes:
        received = bytearray()
        with trio.move_on_after(HEAD_SECONDS):
            while len(received) <= HEAD_BYTES:
                data = await sock.recv(HEAD_BYTES + 1 - len(received))
                if not data:
                    raise _RefusedError(400, "the request is not whole")
                received += data
                end = received.find(b"\r\n\r\n")
                if end >= 0:
                    return bytes(received[:end])
            raise _RefusedError(431, f"a request may have {HEAD_BYTES} bytes")
        raise _RefusedError(408, f"no request came within {HEAD_SECONDS:g} s")

    async def _text(self, accept: str) -> tuple[bytes, str]:
        """Return the text in the format that `accept` asks for, at most `FRESH_SECONDS` old."""
        async with self._rendering:
            now = trio.current_time()
            known = self._texts.get(accept)
            if known is not None and now - known[0] < FRESH_SECONDS:
                return known[1:]
            body, content_type = await trio.to_thread.run_sync(self._collect(), accept)
            self._texts[accept] = now, body, content_type
            return body, content_type

    @staticmethod
    async def _send(sock: trio.socket.SocketType, answer: bytes) -> None:
        with trio.move_on_after(SEND_SECONDS):
            left = memoryview(answer)
            while left:
                left = left[await sock.send(left) :]
            sock.shutdown(socket.SHUT_WR)
            # Who has sent more than it should would lose the answer if we closed with that unread.
            for _ in range(READERS):
                if not await sock.recv(HEAD_BYTES):
                    break

    def statistics(self) -> MetricsServerStatistics:
        """Who is served, and was."""
        return MetricsServerStatistics(readers=self._readers, answered=self._answered, refused=self._refused)


# ---- as part of a broker ------------------------------------------------------------------------


def _open(settings: MetricsSettings, log: FilteringBoundLogger) -> list[socket.socket]:
    """Listen where the policy says; what cannot be had is logged, and clients are served all the same."""
    listeners: list[socket.socket] = []
    if settings.socket is not None:
        try:
            listeners.append(
                bind(
                    settings.socket,
                    mode=settings.socket_mode,
                    gid=settings.socket_gid,
                    kind=socket.SOCK_STREAM,
                )
            )
        except OSError as error:
            _complain(log, f"{settings.socket} ([metrics] socket)", error.strerror)
    if settings.listen is not None:
        host, port = settings.listen
        try:
            listeners.append(_listen(host, port))
        except OSError as error:
            _complain(log, f"{host} port {port} ([metrics] listen)", error.strerror)
    return listeners


def _listen(host: str, port: int) -> socket.socket:
    # Not even a socket can be had where the unit has RestrictAddressFamilies=AF_UNIX, or without IPv6.
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(READERS)
    except OSError:
        sock.close()
        raise
    return sock


def _complain(log: FilteringBoundLogger, where: str, reason: str | None) -> None:
    log.warning(
        "metrics not served", where=where, reason=reason,
        advice="clients are served all the same; the unit's service has no network, and may write below"
        " /run/teemate-broker only",
    )  # fmt: skip


def _load() -> Any:
    """Import what makes metrics: it is large, and a broker without [metrics] does without."""
    from teemate.broker.telemetry import metrics

    return metrics


async def serve_metrics(service: Service) -> None:
    """Serve the metrics where the policy says, until cancelled; without [metrics] there is nothing to do."""
    settings, log = service.policy.metrics, service.log
    if settings.socket is None and settings.listen is None:
        return
    try:
        metrics = await trio.to_thread.run_sync(_load)
    except ImportError as error:
        _complain(log, "[metrics]", f"{error}: install prometheus-client where the broker is")
        return
    listeners = _open(settings, log)

    def collect() -> Render:
        reading = metrics.read(service)
        return lambda accept: metrics.render(reading, accept)

    server = MetricsServer(collect, log)
    service.metrics_statistics = server.statistics
    try:
        if listeners:
            names = [str(listener.getsockname()) for listener in listeners]
            log.info("metrics served", sockets=names)
        await server.run(listeners)
    finally:
        for listener in listeners:
            if listener.family == socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    os.unlink(listener.getsockname())
            listener.close()
