"""Places for requests, which all workers of a gateway share: as many as there are, whoever is asked.

They lie in memory that every worker maps, in a row for each.  A worker writes to its own row only, and looks
at all of them: it takes a place first and counts then, so of two that take the last one at once neither may
have it, but never both, and nobody waits for anybody.  What one that died has held the supervisor clears.

As many as a worker has slots it may have whatever the others hold: what waits for theirs keeps nobody from
its own.  In each row there is also how many connections have come that have asked for nothing yet (they
will), and whether its worker accepts at all: one that is being started, or ends, has no room for anybody.
"""

from __future__ import annotations

import mmap
import os
import threading
from hashlib import blake2b
from typing import Self, final

__all__ = ["FunctionBusyError", "Places", "QueueFullError"]

_ENTRY = 8
_HEAD = 2
"""Words of a row before its places: whether the worker accepts, and how many connections have arrived."""


class QueueFullError(Exception):
    """Every place is taken."""


class FunctionBusyError(Exception):
    """The function has as many requests as it may have."""


@final
class Places:
    """`count` places as worker `number` of `workers` sees them; `fd` stays the caller's.

    Each worker may have `own` of them at any time.
    """

    def __init__(self, fd: int, *, workers: int, count: int, own: int, number: int) -> None:
        self.count = count
        self._own = own
        whole = memoryview(mmap.mmap(fd, workers * _row_size(count))).cast("Q")
        begins = range(0, len(whole), _HEAD + count)
        self._accepts = [whole[at : at + 1] for at in begins]
        self._arrived = [whole[at + 1 : at + _HEAD] for at in begins]
        self._rows = [whole[at + _HEAD : at + _HEAD + count] for at in begins]
        self._number = number
        self._row = self._rows[number]
        self._free = list(range(count))
        self._barrier = threading.Lock()

    @classmethod
    def alone(cls, count: int) -> Self:
        """Return those of a gateway that is one process."""
        fd = create(1, count)
        try:
            return cls(fd, workers=1, count=count, own=count, number=0)
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
            taken = [row.tolist() for row in self._rows]
        busy = sum(row.count(name) for row in taken) > most
        own = self.count - len(self._free)
        if busy or (own > self._own and sum(map(_taken, taken)) > self.count):
            self.give(place)
            raise FunctionBusyError if busy else QueueFullError
        return place

    def give(self, place: int) -> None:
        """Give one back."""
        self._row[place] = 0
        self._free.append(place)

    def taken(self) -> int:
        """How many are taken, by all workers."""
        return sum(_taken(row.tolist()) for row in self._rows)

    def accepts(self, accepts: bool) -> None:
        """Say whether this worker takes connections."""
        self._accepts[self._number][0] = accepts

    def arrived(self, more: int) -> None:
        """Count connections that have come and asked for nothing yet, or have asked now."""
        self._arrived[self._number][0] += more

    def full(self) -> bool:
        """Whether who comes now would wait for a slot of this worker's."""
        return not self._has_room(self._number)

    def others_have_room(self) -> bool:
        """Whether it would get one of another worker's at once."""
        return any(
            self._accepts[number][0] and self._has_room(number)
            for number in range(len(self._rows))
            if number != self._number
        )

    def _has_room(self, number: int) -> bool:
        return self._arrived[number][0] + _taken(self._rows[number].tolist()) < self._own

    def clear(self, number: int) -> None:
        """Give back what a worker has held that is there no more."""
        self._accepts[number][0] = 0
        self._arrived[number][0] = 0
        self._rows[number][:] = memoryview(bytes(self.count * _ENTRY)).cast("Q")


def create(workers: int, count: int) -> int:
    """Return a descriptor of the memory, with all places free."""
    fd = os.memfd_create("teemate-gateway-places", os.MFD_CLOEXEC)
    os.ftruncate(fd, workers * _row_size(count))
    return fd


def _row_size(count: int) -> int:
    return (_HEAD + count) * _ENTRY


def _taken(row: list[int]) -> int:
    return len(row) - row.count(0)
