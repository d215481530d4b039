"""Requests whose body goes into the function, and whose result comes out of it, while it runs.

Whoever asks for that (`TeeMate-Stream: 1`) keeps a slot for as long as he sends and takes, until the
deadline; who does not take what is written is cut off, and his function is ended.  Until the first byte is
written a failure has its status as ever; then the answer ends in the middle.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from typing import Protocol, final

import trio

from ..errors import Error
from .answers import Answer, Refused, problem
from .body import PIECE, Body, Gone, Message

__all__ = ["BrokenOffError", "Functions", "Streamed", "stream"]

Send = Callable[[Message], Awaitable[None]]
TAKE_SECONDS = 30.0
"""A client takes each piece within this, or is cut off."""
LATE_SECONDS = 3.0
"""By how much an invocation may miss its deadline before its call is given up."""


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
        sink: Callable[[bytes], Awaitable[object]],
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
    """An answer that is sent while it is made; it starts with its first byte."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self.started = False
        self.sent = 0

    async def write(self, data: bytes, deadline: float) -> None:
        """Send `data`; raises BrokenOffError where it is not taken."""
        with trio.move_on_at(min(deadline, trio.current_time() + TAKE_SECONDS)) as scope:
            await self._start()
            for at in range(0, len(data), PIECE):
                piece = data[at : at + PIECE]
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
                self.sent += len(piece)
        if scope.cancelled_caught:
            raise BrokenOffError("what was written was not taken in time")

    async def end(self) -> None:
        """Say that this was all."""
        await self._start()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self) -> None:
        if self.started:
            return
        self.started = True
        headers = [(b"content-type", b"application/octet-stream"), *self._headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})


async def stream(
    functions: Functions, name: str, arguments: list[str], deadline: float, body: Body, streamed: Streamed
) -> Answer:
    """Invoke `name`; what it writes is sent, and the answer says what was."""
    pieces, source = trio.open_memory_channel[bytes](0)
    outcome: list[Exception] = []
    done = gone = False

    async def listen() -> None:
        """Take what the client sends, as fast as it is read, and hear when it leaves."""
        nonlocal gone
        try:
            async with pieces:
                while not body.complete:
                    piece = await body.next()
                    body.check()
                    if piece:
                        await pieces.send(piece)
            await body.gone()
            gone = True
        except (Gone, trio.BrokenResourceError):
            gone = True
        except Refused as refused:
            outcome.append(refused)
        nursery.cancel_scope.cancel()

    async def write(data: bytes) -> None:
        await streamed.write(data, deadline + LATE_SECONDS)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        with trio.move_on_at(deadline + LATE_SECONDS):
            left = max(deadline - trio.current_time(), 0.001)
            try:
                await functions.stream(name, _Source(source, deadline), write, args=arguments, timeout=left)
                await streamed.end()
                done = True
            except (Error, Refused, BrokenOffError) as ended:  # not through the nursery, which would wrap it
                outcome.append(ended)
        nursery.cancel_scope.cancel()
    if done:
        return Answer(200, b"", "application/octet-stream")
    if gone:
        raise Gone
    if outcome and isinstance(outcome[0], Error):
        raise outcome[0]
    late = Refused(problem(504, "call-timeout", "the function is not done in time"))
    error = outcome[0] if outcome else late
    if streamed.started and isinstance(error, Refused):
        raise BrokenOffError(error.answer.body.decode()) from error
    raise error


@final
class _Source:
    """What has come of the body, piece by piece, until the deadline."""

    def __init__(self, pieces: trio.MemoryReceiveChannel[bytes], deadline: float) -> None:
        self._pieces = pieces
        self._deadline = deadline

    def __aiter__(self) -> _Source:
        return self

    async def __anext__(self) -> bytes:
        with trio.move_on_at(self._deadline):
            try:
                return await self._pieces.receive()
            except trio.EndOfChannel:
                raise StopAsyncIteration from None
        raise Refused(problem(504, "call-timeout", "the body was not whole by the deadline"))
