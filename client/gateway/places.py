"""Places for requests, which all workers of a gateway share: as many as there are, whoever is asked.

They lie in memory that every worker maps, in a row for each.  A worker writes to its own row only, and looks
at all of them: it takes a place first and counts then, so of two that take the last one at once neither may
have it, but never both, and nobody waits for anybody.  What one that died has held the supervisor clears.
"""

from __future__ import annotations

import mmap
import os
import threading
from hashlib import blake2b
from typing import Self, final

__all__ = ["FunctionBusyError", "Places", "QueueFullError"]

_ENTRY = 8


class QueueFullError(Exception):
    """Every place is taken."""


class FunctionBusyError(Exception):
    """The function has as many requests as it may have."""


@final
class Places:
    """`count` places as worker `number` of `workers` sees them; `fd` stays the caller's."""

    def __init__(self, fd: int, *, workers: int, count: int, number: int) -> None:
        self.count = count
        self._all = memoryview(mmap.mmap(fd, workers * count * _ENTRY)).cast("Q")
        self._row = self._all[number * count : (number + 1) * count]
        self._free = list(range(count))
        self._barrier = threading.Lock()

    @classmethod
    def alone(cls, count: int) -> Self:
        """Return those of a gateway that is one process."""
        fd = create(1, count)
        try:
            return cls(fd, workers=1, count=count, number=0)
        finally:
            os.close(fd)

    def take(self, function: str, most: int) -> int:
        """Return a place, to be given back.

        Raises :class:`FunctionBusyError` when there are `most` of the function's already, and
        :class:`QueueFullError` when there is none.
        """
        # Names are the clients' choice, and of any length.
        name = int.from_bytes(blake2b(function.encode(), digest_size=_ENTRY).digest(), "little") | 1
        if not self._free:  # all are ours
            raise FunctionBusyError if self._row.tolist().count(name) >= most else QueueFullError
        place = self._free.pop()
        self._row[place] = name
        with self._barrier:  # an atomic instruction: our own is seen by whoever we do not see
            taken = self._all.tolist()
        busy = taken.count(name) > most
        if busy or len(taken) - taken.count(0) > self.count:
            self.give(place)
            raise FunctionBusyError if busy else QueueFullError
        return place

    def give(self, place: int) -> None:
        """Give one back."""
        self._row[place] = 0
        self._free.append(place)

    def taken(self) -> int:
        """How many are taken, by all workers."""
        every = self._all.tolist()
        return len(every) - every.count(0)

    def clear(self, number: int) -> None:
        """Give back what a worker has held that is there no more."""
        start = number * self.count
        self._all[start : start + self.count] = memoryview(bytes(self.count * _ENTRY)).cast("Q")


def create(workers: int, count: int) -> int:
    """Return a descriptor of the memory, with all places free."""
    fd = os.memfd_create("teemate-gateway-places", os.MFD_CLOEXEC)
    os.ftruncate(fd, workers * count * _ENTRY)
    return fd
