"""The gateway as an ASGI application (version 3): POST /fn/NAME, GET /healthz, GET /openapi.json."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, final
from urllib.parse import parse_qsl

import trio
from structlog.typing import FilteringBoundLogger

from ..errors import Error
from ..functions._wire import PAYLOAD_MAX
from .admission import Admission
from .answers import Answer, Refused, of_error, problem
from .body import PIECE, Body, Gone, Receive, Send, too_large
from .openapi import (
    MAX_ARGUMENT_BYTES,
    MAX_ARGUMENTS,
    NAME_PATTERN,
    STREAM_HEADER,
    TIMEOUT_HEADER,
    TIMEOUT_PATTERN,
    openapi_json,
)
from .places import FunctionBusyError, Places, QueueFullError
from .settings import Settings
from .streaming import BrokenOffError, Functions, Sink, Streamed, stream

__all__ = ["Functions", "Gateway"]

SEND_SECONDS = 30.0
SEND_RATE = 16 << 10
"""A client takes its answer within this, and a second more for as many bytes, or is cut off."""
HEALTH_SECONDS = 2.0
LATE_SECONDS = 3.0
"""By how much an invocation may miss its deadline before its call is given up, which costs its slot a repair:
the enclave ends it by itself, by a coarse clock."""
BODY_RATE = 16 << 10
"""Bytes a second that a body comes at, at least, once it has taken as long as requests have that name no
deadline: while it comes its sender holds a place."""

_NAME = re.compile(NAME_PATTERN)
_TIMEOUT = re.compile(TIMEOUT_PATTERN.encode())
_LOOPBACK = (b"localhost", b"127.0.0.1", b"::1")


@final
class Gateway:
    """Answers requests; `ping` raises or returns when the broker answers.

    Without `places` it is the only worker.
    """

    def __init__(
        self,
        functions: Functions,
        settings: Settings,
        log: FilteringBoundLogger,
        *,
        ping: Callable[[], Awaitable[None]],
        loopback: bool = False,
        places: Places | None = None,
    ) -> None:
        self._functions = functions
        self._settings = settings
        self._log = log
        self._ping = ping
        self._loopback = loopback
        self._document = openapi_json(settings)
        self._max_body = min(settings.max_body, PAYLOAD_MAX)
        self.admission = Admission(
            slots=settings.slots,
            queue=settings.queue,
            concurrency=settings.concurrency,
            places=Places.alone(settings.places) if places is None else places,
        )
        self.draining = False

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request, or the server's life (for which there is nothing to do)."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})

    async def _serve(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        request = uuid.uuid4().hex
        began = trio.current_time()
        body = Body(receive, self._max_body)
        streamed = Streamed(send, _head(request))
        answer: Answer | None = None
        try:
            answer = await self._answer(scope, body, began, streamed)
        except Refused as refused:
            answer = refused.answer
        except BrokenOffError as error:
            # Who has got a part of it already is told by the connection, which ends in the middle.
            self._log.warning("stream broken off", request=request, path=scope["path"], reason=str(error))
        except Gone:
            self._log.info("request", request=request, path=scope["path"], outcome="client left")
            return
        except Exception as error:  # whatever it is, this request is told and the others go on
            self._log.error("internal error", request=request, path=scope["path"], exc_info=error)
            if not streamed.started:
                answer = problem(500, "internal-error", "the gateway failed: its log says more")
        await body.discard()
        size = 0
        if answer is not None:
            size = len(answer.body)
            self._log.info(
                "request",
                request=request,
                method=scope["method"],
                path=scope["path"],
                status=answer.status,
                received=body.received,
                sent=streamed.sent or size,
                seconds=round(trio.current_time() - began, 6),
            )
        self.admission.has_asked()
        # Who keeps a connection to where others wait is better off with a new one, elsewhere.
        close = not body.complete or self.admission.crowded()
        close = close and scope["http_version"].startswith("1")
        async with trio.open_nursery() as nursery:
            # The server says from within our `send` that the connection is closed, and what it has to
            # tell has to be taken all the while: it waits for room behind what the client sends still.
            nursery.start_soon(body.gone)
            with trio.move_on_after(SEND_SECONDS + size / SEND_RATE) as scope_of_send:
                if streamed.started or answer is None:
                    await streamed.end()
                else:
                    await _send(send, answer, request, head=scope["method"] == "HEAD", close=close)
            if scope_of_send.cancelled_caught:
                self._log.warning("answer not taken", request=request, path=scope["path"])
            nursery.cancel_scope.cancel()

    async def _answer(self, scope: Mapping[str, Any], body: Body, began: float, streamed: Streamed) -> Answer:
        self._check_origin(scope)
        path, method = scope["path"], scope["method"]
        if path == "/healthz":
            _allow(method, "GET, HEAD")
            return await self._health()
        if path == "/openapi.json":
            _allow(method, "GET, HEAD")
            return Answer(200, self._document, "application/json")
        if not path.startswith("/fn/"):
            raise Refused(problem(404, "not-found", "there are /fn/NAME, /healthz and /openapi.json"))
        _allow(method, "POST")
        name = path.removeprefix("/fn/")
        if not _NAME.fullmatch(name):
            raise Refused(problem(404, "not-found", "no function has such a name"))
        return await self._invoke(name, scope, body, began, streamed)

    def _check_origin(self, scope: Mapping[str, Any]) -> None:
        """Turn away what a web page has a browser send to this host's loopback."""
        if not self._loopback:
            return
        host = _header(scope, b"host") or b""
        host = host[1:].split(b"]")[0] if host.startswith(b"[") else host.split(b":")[0]
        if _header(scope, b"origin") is not None or host.lower() not in _LOOPBACK:
            raise Refused(
                problem(403, "denied", "browsers are not served here, nor requests for another host")
            )

    async def _health(self) -> Answer:
        counts = self.admission.statistics()
        facts = {"running": counts.running, "waiting": counts.waiting, "slots": counts.slots}
        if self.draining:
            return problem(503, "draining", "this gateway is stopping", **facts)
        try:
            with trio.fail_after(HEALTH_SECONDS):
                await self._ping()
        except (Error, trio.TooSlowError) as error:
            self._log.warning("unhealthy", reason=str(error) or "the broker did not answer in time")
            return problem(503, "connection-lost", "the broker does not answer", **facts)
        return _json(200, {"status": "ok", **facts})

    async def _invoke(
        self, name: str, scope: Mapping[str, Any], body: Body, began: float, streamed: Streamed
    ) -> Answer:
        arguments = _arguments(scope["query_string"])
        told, seconds = self._timeout(scope)
        deadline = began + seconds
        late = 504 if told else 408  # a deadline of the client's, or too slow for us
        length = _header(scope, b"content-length")
        if length is not None and int(length) > self._max_body:  # h11 takes digits alone
            raise Refused(too_large(self._max_body))
        if self.draining:
            raise Refused(problem(503, "draining", "this gateway is stopping"))
        try:
            with self.admission.place(name):
                if _streams(scope):
                    return await self._stream(name, arguments, deadline, body, streamed)
                payload = await self._read(body, began, deadline, late)
                return await self._run(name, payload, arguments, deadline, body)
        except FunctionBusyError:
            raise Refused(
                problem(
                    429,
                    "limit-reached",
                    f"the function has {self._settings.concurrency} requests under way: no more are taken",
                )
            ) from None
        except QueueFullError:
            raise Refused(
                problem(503, "busy", f"all slots are taken, and {self._settings.queue} requests wait already")
            ) from None

    async def _stream(
        self, name: str, arguments: list[str], deadline: float, body: Body, streamed: Streamed
    ) -> Answer:
        """Wait for a slot, then let the body in and the result out while the function runs."""

        async def run(source: AsyncIterable[bytes], sink: Sink) -> None:
            async with self._slot(deadline):
                left = max(deadline - trio.current_time(), 0.001)
                await self._functions.stream(name, source, sink, args=arguments, timeout=left)

        try:
            return await stream(run, deadline, body, streamed)
        except Error as error:
            if error.code not in ("not-found", "function-failed"):
                self._log.warning("invocation failed", function=name, code=error.code, reason=str(error))
            if streamed.started:
                raise BrokenOffError(str(error)) from error
            return of_error(error)

    @asynccontextmanager
    async def _slot(self, deadline: float) -> AsyncGenerator[None, None]:
        async with AsyncExitStack() as held:
            await _until(
                deadline,
                lambda: held.enter_async_context(self.admission.slot()),
                504,
                "no slot was free by the deadline",
            )
            yield

    async def _read(self, body: Body, began: float, deadline: float, late: int) -> bytes:
        """Read the body by the deadline, however late that is, or for as long as it comes fast enough."""
        patience = began + self._settings.timeout
        try:
            return await body.read(lambda received: min(deadline, patience + received / BODY_RATE))
        except trio.TooSlowError:
            if trio.current_time() >= deadline:
                raise Refused(
                    problem(late, "call-timeout", "the body was not whole by the deadline")
                ) from None
            why = f"the body came more slowly than {BODY_RATE} bytes a second"
            raise Refused(problem(408, "call-timeout", why)) from None

    async def _run(
        self, name: str, payload: bytes, arguments: list[str], deadline: float, body: Body
    ) -> Answer:
        """Wait for a slot and invoke, for as long as the client is there."""
        answer: Answer | None = None

        async def run() -> Answer:
            async with self._slot(deadline):
                left = deadline - trio.current_time()
                try:
                    result = await self._functions.invoke(
                        name, payload, args=arguments, timeout=max(left, 0.001)
                    )
                except Error as error:
                    if error.code not in ("not-found", "function-failed"):
                        self._log.warning(
                            "invocation failed", function=name, code=error.code, reason=str(error)
                        )
                    return of_error(error)
                return Answer(200, result, "application/octet-stream")

        async def watch() -> None:
            await body.gone()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                answer = await _until(deadline + LATE_SECONDS, run, 504, "the function is not done in time")
            except Refused as refused:  # not through the nursery, which would wrap it
                answer = refused.answer
            nursery.cancel_scope.cancel()
        if answer is None:
            raise Gone
        return answer

    def _timeout(self, scope: Mapping[str, Any]) -> tuple[bool, float]:
        """Whether the request names its deadline, and what it is."""
        told = _header(scope, TIMEOUT_HEADER.lower().encode())
        if told is None:
            return False, self._settings.timeout
        if not _TIMEOUT.fullmatch(told):
            raise Refused(
                problem(400, "protocol-error", f"{TIMEOUT_HEADER} is seconds, more than 0, such as 2.5")
            )
        return True, min(float(told), self._settings.max_timeout)


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _until(deadline: float, function: Callable[[], Awaitable[Any]], status: int, why: str) -> Any:
    with trio.CancelScope(deadline=deadline) as scope:
        return await function()
    if scope.cancelled_caught:
        raise Refused(problem(status, "call-timeout", why))
    raise AssertionError("not reached: it returns, raises or is cancelled")


async def _send(send: Send, answer: Answer, request: str, *, head: bool, close: bool) -> None:
    headers = [
        (b"content-type", answer.content_type.encode()),
        (b"content-length", str(len(answer.body)).encode()),
        *_head(request),
        *answer.headers,
    ]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    body = memoryview(b"" if head else answer.body)
    while len(body) > PIECE:
        await send({"type": "http.response.body", "body": bytes(body[:PIECE]), "more_body": True})
        body = body[PIECE:]
    await send({"type": "http.response.body", "body": bytes(body), "more_body": False})


def _head(request: str) -> list[tuple[bytes, bytes]]:
    """Headers of every response."""
    return [
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
        (b"teemate-request", request.encode()),
    ]


def _streams(scope: Mapping[str, Any]) -> bool:
    """Whether the request asks for streams."""
    asked = _header(scope, STREAM_HEADER.lower().encode())
    if asked is None:
        return False
    if asked != b"1":
        raise Refused(problem(400, "protocol-error", f"{STREAM_HEADER} is 1, or left out"))
    if scope["http_version"] != "1.1":
        # There is no way to end another's answer in the middle so that it is noticed.
        raise Refused(problem(501, "unsupported", "streams are for HTTP/1.1 here"))
    return True


def _header(scope: Mapping[str, Any], name: bytes) -> bytes | None:
    value: bytes | None = next((value for key, value in scope["headers"] if key == name), None)
    return value


def _allow(method: str, allowed: str) -> None:
    if method not in allowed.split(", "):
        raise Refused(problem(405, "unsupported", f"{method} is not for this path", allow=allowed))


def _json(status: int, body: Mapping[str, object]) -> Answer:
    return Answer(status, json.dumps(body).encode(), "application/json")


def _arguments(query: bytes) -> list[str]:
    """The function's arguments, ``?arg=one&arg=two``."""
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, strict_parsing=bool(query), errors="strict",
            max_num_fields=MAX_ARGUMENTS,
        )  # fmt: skip
    except ValueError:
        raise Refused(
            problem(400, "protocol-error", f"the query is arg=TEXT in UTF-8, at most {MAX_ARGUMENTS} times")
        ) from None
    arguments = [value for key, value in pairs if key == "arg"]
    if len(arguments) != len(pairs) or any("\0" in argument for argument in arguments):
        raise Refused(problem(400, "protocol-error", "the query has nothing but arg=TEXT, without NUL"))
    if sum(len(argument.encode()) for argument in arguments) > MAX_ARGUMENT_BYTES:
        raise Refused(
            problem(400, "protocol-error", f"all arguments together have at most {MAX_ARGUMENT_BYTES} bytes")
        )
    return arguments
