"""Where enclaves lie: every process maps an enclave at the same address, so they never overlap.

One window for all enclaves of the host, 1 TiB from 0x4000_0000_0000.  An enclave's range is as
large as it is and starts at a multiple of that (SDM 3D, ECREATE); as much again is kept free above
it for the landing page and the arena.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from teemate.errors import LimitReached

__all__ = ["WINDOW_SIZE", "WINDOW_START", "AddressStatistics", "Addresses"]

WINDOW_START = 0x4000_0000_0000
WINDOW_SIZE = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressStatistics:
    """Bytes of the window that are reserved, and for how many enclaves."""

    ranges: int
    reserved: int


@final
class Addresses:
    """Gives out ranges of the window; first fit, since there are few enclaves."""

    def __init__(self, start: int = WINDOW_START, size: int = WINDOW_SIZE) -> None:
        self._start = start
        self._end = start + size
        self._taken: dict[int, int] = {}  # base -> end, reserve included

    def reserve(self, size: int) -> int:
        """Return the base for an enclave of `size` bytes, a power of two.

        Raises
        ------
        LimitReached
            The window has no such range left.

        """
        base = -(-self._start // size) * size
        for taken, end in sorted(self._taken.items()):
            if base + 2 * size <= taken:
                break
            base = max(base, -(-end // size) * size)
        if base + 2 * size > self._end:
            raise LimitReached(
                f"no {2 * size} bytes in a row are free in the address window of {self._end - self._start}:"
                f" {len(self._taken)} enclaves are there; destroy one that is not needed",
                {
                    "limit": "address window",
                    "maximum": self._end - self._start,
                    "setting": "none: it is fixed",
                },
            )
        self._taken[base] = base + 2 * size
        return base

    def take(self, base: int, size: int) -> None:
        """The range at `base` has an enclave since before a restart."""
        self._taken[base] = base + 2 * size

    def release(self, base: int) -> None:
        """The enclave at `base` is gone."""
        del self._taken[base]

    def statistics(self) -> AddressStatistics:
        """What is reserved."""
        reserved = sum(end - base for base, end in self._taken.items())
        return AddressStatistics(ranges=len(self._taken), reserved=reserved)
