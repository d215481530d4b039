"""Who may run now, who waits, and who is turned away.

A request takes a *place* before its body is read, so the bodies in memory are bounded, and a *slot* when
it is there, so who sends slowly keeps none from running.  Slots are given in the order in which they are
asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import final

import trio

__all__ = ["Admission", "AdmissionStatistics", "FunctionBusyError", "QueueFullError"]


class QueueFullError(Exception):
    """Every slot is taken, and as many wait as may."""


class FunctionBusyError(Exception):
    """The function has as many requests as it may have."""


@final
@dataclass(frozen=True, slots=True)
class AdmissionStatistics:
    """What a worker does: `running` have a slot, `waiting` have a place alone."""

    slots: int
    queue: int
    running: int
    waiting: int


@final
class Admission:
    """Places and slots of one worker."""

    def __init__(self, *, slots: int, queue: int, concurrency: int) -> None:
        self._slots = slots
        self._queue = queue
        self._concurrency = concurrency
        self._limiter = trio.Semaphore(slots, max_value=slots)
        self._functions: Counter[str] = Counter()
        self._places = 0
        self._running = 0

    @contextmanager
    def place(self, function: str) -> Generator[None, None, None]:
        """Hold a place; raises :class:`FunctionBusyError` or :class:`QueueFullError` at once."""
        if self._functions[function] >= self._concurrency:
            raise FunctionBusyError
        if self._places >= self._slots + self._queue:
            raise QueueFullError
        self._places += 1
        self._functions[function] += 1
        try:
            yield
        finally:
            self._places -= 1
            self._functions[function] -= 1
            if not self._functions[function]:
                del self._functions[function]  # names are the clients' choice

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[None, None]:
        """Hold a slot, when it is our turn."""
        async with self._limiter:
            self._running += 1
            try:
                yield
            finally:
                self._running -= 1

    def statistics(self) -> AdmissionStatistics:
        """Who runs and who waits."""
        return AdmissionStatistics(
            slots=self._slots,
            queue=self._queue,
            running=self._running,
            waiting=self._places - self._running,
        )
