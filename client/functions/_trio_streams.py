"""Standard streams of an invocation in a worker thread that a trio task reads and writes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from typing import NoReturn

import trio

from teemate.functions._streams import Ocalls, feeding

__all__ = ["AsyncStreams"]

_ENDING = 2.0
"""Seconds that the enclave has to end a function by itself, on however busy a machine."""


class _GivenUpError(Exception):
    """The task was cancelled: the enclave ends the function by itself, and the slot stays."""


class AsyncStreams:
    """A source and a sink; the task that waits for the worker thread is cancelled for both."""

    def __init__(self, source: AsyncIterable[bytes], sink: Callable[[bytes], Awaitable[object]]) -> None:
        self._source = aiter(source)
        self._sink = sink
        self._cancelled: trio.Cancelled | None = None
        self._patience = 0.0
        """Until when a call is not given up although the task was cancelled."""
        self.ocalls = feeding(self._pull(), self._push)

    def _pull(self) -> Iterator[bytes]:
        while True:
            try:
                piece = trio.from_thread.run(self._next)
            except trio.Cancelled as cancelled:
                self._give_up(cancelled)
            if piece is None:
                return
            yield piece

    async def _next(self) -> bytes | None:
        return await anext(self._source, None)

    def _push(self, data: bytes) -> None:
        try:
            trio.from_thread.run(self._sink, data)
        except trio.Cancelled as cancelled:
            self._give_up(cancelled)

    def _give_up(self, cancelled: trio.Cancelled) -> NoReturn:
        self._cancelled = cancelled
        self._patience = time.monotonic() + _ENDING
        raise _GivenUpError

    def check(self) -> None:
        """Raise when the task was cancelled, but not while the function ends because of that."""
        if time.monotonic() >= self._patience:
            trio.from_thread.check_cancelled()

    def run(self, invocation: Callable[[Ocalls], None]) -> None:
        """Do `invocation`, in a worker thread."""
        try:
            invocation(self.ocalls)
        except _GivenUpError:
            assert self._cancelled is not None
            raise self._cancelled from None
