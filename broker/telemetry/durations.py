"""How long things took, counted by ranges: what the histograms of the metrics are read from."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import final

__all__ = ["ATTACH_BOUNDS", "WAIT_BOUNDS", "DurationStatistics", "Durations"]

ATTACH_BOUNDS = (0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0, 30.0)
"""Seconds: an attach takes a fraction of a millisecond, or as long as it waits for slots."""
WAIT_BOUNDS = (0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Seconds that requests wait for slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DurationStatistics:
    """How many took at most `bounds[i]` seconds and more than the bound before; the last are above all."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float
    """Seconds of all together."""


@final
class Durations:
    """Counts durations; what one costs does not depend on how many there were."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total += seconds

    def statistics(self) -> DurationStatistics:
        """What was counted so far."""
        return DurationStatistics(bounds=self._bounds, counts=tuple(self._counts), total=self._total)
