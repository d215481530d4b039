"""A request's body, and what it may cost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, final

import trio

from .answers import Answer, Refused, problem

__all__ = ["PIECE", "Body", "Gone", "Message", "Receive", "Send", "too_large"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message | None], Awaitable[None]]
"""ASGI's, and hypercorn's, which takes None: no more comes, whether or not this was all."""

PIECE = 64 << 10
"""Bytes of a result that are handed on at once: more only when the client has taken these."""
LEFTOVER_SECONDS = 1.0
"""For how long, and up to twice `max_body`, a client is listened to before it gets an answer that does not
need its body: many read their answer when they have sent all, or never."""


class Gone(Exception):  # noqa: N818 - nobody is told
    """The client has left."""


@final
class Body:
    """A request's body, read once, and whether its sender is still there."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self.received = 0
        self.complete = False

    async def read(self, deadline: Callable[[int], float]) -> bytes:
        """Return all; raises TooSlowError at the `deadline`, which is told how many bytes were received."""
        pieces = bytearray()
        with trio.CancelScope(deadline=deadline(0)) as scope:
            while not self.complete:
                pieces += await self.next()
                self.check()
                scope.deadline = deadline(self.received)
            return bytes(pieces)
        raise trio.TooSlowError

    def check(self) -> None:
        """Refuse a body that is larger than it may be."""
        if self.received > self._limit:
            raise Refused(too_large(self._limit))

    async def discard(self) -> None:
        """Take what is still on its way, within bounds, so that the answer is read."""
        end = 2 * self._limit + PIECE
        with trio.move_on_after(LEFTOVER_SECONDS):
            try:
                while not self.complete and self.received < end:
                    await self.next()
            except Gone:
                pass

    async def next(self) -> bytes:
        """Return the next piece, which may be empty; raises Gone."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Gone
        piece: bytes = message.get("body", b"")
        self.received += len(piece)
        self.complete = not message.get("more_body", False)
        return piece

    async def gone(self) -> None:
        """Return when the client has left, having sent all."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


def too_large(limit: int) -> Answer:
    return problem(413, "limit-reached", f"a request's body has at most {limit} bytes here")
