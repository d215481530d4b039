"""Who may run now, who waits, and who is turned away.

A request takes a *place* before its body is read, so the bodies in memory are bounded, and a *slot* when
it is there, so who sends slowly keeps none from running.  Places are all workers' (places.py), slots each
worker's own; these are given in the order in which they are asked for.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import final

import trio

from .places import Places

__all__ = ["Admission", "AdmissionStatistics"]

_HAS_ASKED: ContextVar[Callable[[], None]] = ContextVar("_HAS_ASKED", default=lambda: None)
"""Of the connection that serves a request."""


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
    """Slots of one worker, and its part of the places; a function may have `concurrency` of these."""

    def __init__(self, *, slots: int, queue: int, concurrency: int, places: Places) -> None:
        self._slots = slots
        self._queue = queue
        self._concurrency = concurrency
        self._limiter = trio.Semaphore(slots, max_value=slots)
        self._places = places
        self._placed = 0
        self._running = 0

    @contextmanager
    def place(self, function: str) -> Generator[None, None, None]:
        """Hold a place, or raise at once what :meth:`Places.take` does."""
        place = self._places.take(function, self._concurrency)
        self.has_asked()
        self._placed += 1
        try:
            yield
        finally:
            self._placed -= 1
            self._places.give(place)

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[None, None]:
        """Hold a slot, when it is our turn."""
        async with self._limiter:
            self._running += 1
            try:
                yield
            finally:
                self._running -= 1

    @contextmanager
    def arrival(self) -> Generator[None, None, None]:
        """Count a connection as one that will want a slot, until it has asked for one or something else."""
        waits = True

        def has_asked() -> None:
            nonlocal waits
            if waits:
                waits = False
                self._places.arrived(-1)

        self._places.arrived(1)
        _HAS_ASKED.set(has_asked)
        try:
            yield
        finally:
            has_asked()

    @contextmanager
    def accepting(self) -> Generator[None, None, None]:
        """Have the other workers leave connections to this one."""
        self._places.accepts(True)
        try:
            yield
        finally:
            self._places.accepts(False)

    def has_asked(self) -> None:
        """Say that the connection that is served has asked for what it wanted."""
        _HAS_ASKED.get()()

    def gives_way(self) -> bool:
        """Whether who comes now would wait here, and not with another worker."""
        return self._places.full() and self._places.others_have_room()

    def crowded(self) -> bool:
        """Whether somebody waits here for a slot, and would not with another worker."""
        return self._placed > self._slots and self._places.others_have_room()

    def statistics(self) -> AdmissionStatistics:
        """Who runs and who waits."""
        return AdmissionStatistics(
            slots=self._slots,
            queue=self._queue,
            running=self._running,
            waiting=self._placed - self._running,
        )
