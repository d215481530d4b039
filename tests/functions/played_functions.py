"""Functions that are played, for what the gateway does around them, and a client that speaks ASGI to it."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
import trio
from structlog.testing import CapturingLogger

import teemate
from teemate.gateway.app import Gateway
from teemate.gateway.settings import Settings


class PlayedFunctions:
    """``echo`` gives its payload back, ``wait`` runs until told to end, any other raises `error`.

    ``deaf`` runs on when its time is over.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, bytes, list[str], float | None]] = []
        self.end = trio.Event()
        self.inside = 0
        self.error: Exception = teemate.NotFound("there is no such function")

    async def invoke(
        self,
        name: str,
        payload: bytes,
        *,
        args: Sequence[str] = (),
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> bytes:
        self.calls.append((name, payload, list(args), timeout))
        self.inside += 1
        try:
            if name == "deaf":
                await self.end.wait()
            elif name == "wait":
                with trio.move_on_after(math.inf if timeout is None else timeout) as scope:
                    await self.end.wait()
                if scope.cancelled_caught:
                    raise teemate.CallTimeout("it took longer than its timeout")
            elif name != "echo":
                raise self.error
            return payload
        finally:
            self.inside -= 1

    async def stream(
        self,
        name: str,
        source: AsyncIterable[bytes],
        sink: Callable[[bytes], Awaitable[object]],
        *,
        args: Sequence[str] = (),
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> None:
        """``echo`` gives each piece back as it comes; ``first`` one alone, until told to end.

        ``breaks`` fails then, and ``floods`` reads nothing and writes on and on.
        """
        if name not in ("echo", "first", "breaks", "floods"):
            await self.invoke(name, b"", args=args, timeout=timeout)
            return
        while name == "floods":
            await sink(bytes(1 << 16))
        async for piece in source:
            await sink(piece)
            if name != "echo":
                await self.end.wait()
                if name == "breaks":
                    raise self.error
                return


@dataclass
class Response:
    """What a request got; `pieces` are the messages that its body came in."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    done: bool = False
    broken: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    def problem(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/problem+json"
        told: dict[str, Any] = json.loads(self.body)
        assert told["status"] == self.status
        return told


class Client:
    """Sends requests to a gateway in this process."""

    def __init__(self, *, loopback: bool = False, **settings: Any) -> None:
        self.functions = PlayedFunctions()
        self.records = CapturingLogger()
        self.broker_answers = True
        self.broker_waits: trio.Event | None = None
        self.log: Any = structlog.wrap_logger(self.records, processors=[])
        self.gateway = Gateway(
            self.functions, Settings(**settings), self.log, ping=self._ping, loopback=loopback
        )

    async def _ping(self) -> None:
        if self.broker_waits is not None:
            await self.broker_waits.wait()
        if not self.broker_answers:
            raise teemate.ConnectionLost("the broker is away")

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = b"",
        *,
        query: str = "",
        headers: dict[str, str] | None = None,
        leaves: trio.Event | None = None,
        pieces: int = 1 << 16,
        pause: float = 0.0,
        response: Response | None = None,
        version: str = "1.1",
    ) -> Response:
        """Send a request, whose `body` never comes if it is None; `leaves`: when the client does.

        `pause` is in seconds, before each of the `pieces`.
        """
        response = response or Response()
        left = trio.Event() if leaves is None else leaves
        parts = (
            [body[at : at + pieces] for at in range(0, len(body), pieces)] or [b""]
            if body is not None
            else []
        )

        async def receive() -> dict[str, Any]:
            await trio.sleep(pause)
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await trio.lowlevel.checkpoint()
            if message is None:
                response.broken = True
            elif message["type"] == "http.response.start":
                assert response.status == 0, "a second answer"
                response.status = message["status"]
                response.headers = {key.decode(): value.decode() for key, value in message["headers"]}
            else:
                assert response.status, "a body without a head"
                assert not response.done, "more after the end"
                response.pieces.append(message["body"])
                response.done = not message["more_body"]

        scope = {
            "type": "http",
            "http_version": version,
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(key.lower().encode(), value.encode()) for key, value in (headers or {}).items()],
        }
        await self.gateway(scope, receive, send)
        assert response.done or response.broken or left.is_set()
        return response
