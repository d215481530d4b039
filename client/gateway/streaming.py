"""Requests whose body goes into the function, and whose result comes out of it, while it runs.

Whoever asks for that (`TeeMate-Stream: 1`) keeps a slot for as long as he sends and takes, until the
deadline; who does not take what is written is cut off, and his function is ended.  Until the first byte is
written a failure has its status as ever; then the answer ends in the middle.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Protocol, final

import trio

from ..errors import Error
from .answers import Answer, Refused, problem
from .body import PIECE, Body, Gone, Send

__all__ = ["TAKEN_BY", "BrokenOffError", "Functions", "Sink", "Streamed", "stream"]

Sink = Callable[[bytes], Awaitable[object]]
TAKE_SECONDS = 30.0
"""A client takes each piece within this, or is cut off."""
LATE_SECONDS = 3.0
"""By how much an invocation may miss its deadline before its call is given up."""
NOT_TAKEN = "what was written was not taken in time"
TAKEN_BY: ContextVar[float] = ContextVar("TAKEN_BY", default=math.inf)
"""When what is sent has to be taken: for the connection, where hypercorn lets nothing be cancelled."""


class Functions(Protocol):
    """What the gateway needs of ``broker.functions`` on trio."""

    async def invoke(
        self,
        name: str,
        payload: bytes,
        *,
        args: Sequence[str] = ...,
        timeout: float | None = ...,  # noqa: ASYNC109
    ) -> bytes:
        """See :meth:`teemate.Functions.invoke`."""
        ...

    async def stream(
        self,
        name: str,
        source: AsyncIterable[bytes],
        sink: Sink,
        *,
        args: Sequence[str] = ...,
        timeout: float | None = ...,  # noqa: ASYNC109
    ) -> None:
        """See :meth:`teemate.Functions.stream`."""
        ...


class BrokenOffError(Exception):
    """A part of the answer was sent, and more will not come."""


@final
class Streamed:
    """An answer that is sent while it is made; it starts with its first byte.

    `whole`: all was written; `taken_by`: when what is being written has to be taken.
    """

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self.started = False
        self.whole = False
        self.taken_by = math.inf
        self.sent = 0

    async def write(self, data: bytes, deadline: float) -> None:
        """Send `data`; raises BrokenOffError where it is not taken."""
        self.taken_by = min(deadline, trio.current_time() + TAKE_SECONDS)
        token = TAKEN_BY.set(self.taken_by)
        try:
            with trio.move_on_at(self.taken_by) as scope:
                await self._start()
                for at in range(0, len(data), PIECE):
                    piece = data[at : at + PIECE]
                    await self._send({"type": "http.response.body", "body": piece, "more_body": True})
                    self.sent += len(piece)
        finally:
            TAKEN_BY.reset(token)
        if scope.cancelled_caught:
            raise BrokenOffError(NOT_TAKEN)
        self.taken_by = math.inf

    async def end(self) -> None:
        """Say that this was all, or where it was not, end the connection in the middle of it."""
        last = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(last if self.whole else None)

    async def _start(self) -> None:
        if self.started:
            return
        self.started = True
        headers = [(b"content-type", b"application/octet-stream"), *self._headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})


async def stream(
    run: Callable[[AsyncIterable[bytes], Sink], Awaitable[None]],
    deadline: float,
    body: Body,
    streamed: Streamed,
) -> Answer:
    """Have `run` read the body and write what is `streamed`; the answer is for who gets nothing so."""
    source = _Source(deadline)
    outcome: list[Exception] = []
    done = False

    async def listen() -> None:
        """Take what the client sends as it comes, whether it is read or not, and hear when it leaves."""
        ended: Exception = Gone()
        try:
            while not body.complete:
                piece = await body.next()
                body.check()
                source.feed(piece)
            source.end()
            await body.gone()
        except (Gone, Refused) as early:
            ended = early
        if isinstance(ended, Gone) and trio.current_time() >= streamed.taken_by:
            ended = BrokenOffError(NOT_TAKEN)  # for which its connection was closed
        outcome.append(ended)
        nursery.cancel_scope.cancel()

    async def write(data: bytes) -> None:
        await streamed.write(data, deadline + LATE_SECONDS)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        with trio.move_on_at(deadline + LATE_SECONDS):
            try:
                await run(source, write)
                done = True
            except (Error, Refused, BrokenOffError) as ended:  # not through the nursery, which would wrap it
                outcome.append(ended)
        nursery.cancel_scope.cancel()
    if done:
        streamed.whole = True
        return Answer(200, b"", "application/octet-stream")
    late = Refused(problem(504, "call-timeout", "the function is not done in time"))
    error = outcome[0] if outcome else late
    if streamed.started and isinstance(error, Refused):
        raise BrokenOffError(error.answer.body.decode()) from error
    raise error


@final
class _Source:
    """What has come of the body, piece by piece, until the deadline.

    All of it is held that is not yet read, as it is for who asks for no stream: a client is heard to leave
    only behind what it has sent.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._held = bytearray()
        self._whole = False
        self._more = trio.Event()

    def feed(self, piece: bytes) -> None:
        """Add what has come."""
        self._held += piece
        self._more.set()

    def end(self) -> None:
        """Say that all has come."""
        self._whole = True
        self._more.set()

    def __aiter__(self) -> _Source:
        return self

    async def __anext__(self) -> bytes:
        with trio.move_on_at(self._deadline):
            while not self._held and not self._whole:
                self._more = trio.Event()
                await self._more.wait()
            if not self._held:
                raise StopAsyncIteration
            piece = bytes(self._held[:PIECE])
            del self._held[:PIECE]
            return piece
        raise Refused(problem(504, "call-timeout", "the body was not whole by the deadline"))
