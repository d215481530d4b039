"""What a benchmark says: one row for each figure, with what it was compared with and what was aimed at."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple, Self

__all__ = ["TARGETS", "Result", "Row", "Sample", "Series", "Target", "compared", "plain"]

_UNITS = {"ns": 1.0, "us": 1e3, "ms": 1e6}


class Target(NamedTuple):
    """A bound of the project: of the ratio, or of the value where there is none."""

    limit: float
    at_most: bool

    def met_by(self, number: float) -> bool:
        """Whether `number` is within it; what is not a number is not."""
        return number <= self.limit if self.at_most else number >= self.limit

    def __str__(self) -> str:
        """As the JSON has it."""
        return f"{'<=' if self.at_most else '>='} {self.limit:g}"


def _most(limit: float) -> Target:
    return Target(limit, at_most=True)


def _least(limit: float) -> Target:
    return Target(limit, at_most=False)


TARGETS = {
    "warm_attach": _most(3),
    "warm_attach_c": _most(2),
    "cold_attach": _most(3),
    "cold_attach_c": _most(2),
    "warm_attach_p99": _most(4),
    "latency_ratio": _least(50),
    "conventional": _most(1.3),
    "epc_ratio": _least(15),
    "pss_ratio": _least(4),
    "attach_at_1024": _most(1.5),
    "broker_kib_per_client": _most(48),
    "empty_call": _most(1.2),
    "empty_call_getppids": _most(5),
    "empty_call_py": _most(1.6),
    "counted_call_py": _most(1.02),
    "call_scaling_2": _least(1.8),
    "hash_rate": _least(0.9),
    "import_time": _most(1.6),
    "db_open_first_query_ratio": _least(10),
    "db_memory_ratio": _least(5),
    "db_point_read_vs_plain": _most(1.5),
    "db_batch_read_vs_plain": _least(0.5),
    "fn_cold_start_ratio": _least(20),
    "fn_cold_vs_native": _most(2),
    "fn_memory_ratio": _least(8),
    "fn_warm_vs_empty_call": _most(5),
    "churn_pages_left": _most(0),
    "churn_fds_left": _most(0),
    "churn_slots_left": _most(0),
    "churn_bytes_left": _most(16),
}
"""By figure.  Of the ratio, where a row has one.

`conventional` sees to it that the conventional way is not slow on purpose: against the creation floor.
`churn_bytes_left` is of the broker's memory for each client that came and went; the smallest Python object
that could be left of one has 24 bytes and a place in a container.
"""


class Sample:
    """Measurements of one thing."""

    def __init__(self, values: Sequence[float]) -> None:
        if not values:
            raise ValueError("nothing was measured")
        self._ordered = sorted(values)
        self._turns: tuple[float, ...] = ()

    @classmethod
    def of_turns(cls, turns: Sequence[Sequence[float]]) -> Self:
        """Return that of all turns together, which remembers them."""
        sample = cls([value for turn in turns for value in turn])
        sample._turns = tuple(statistics.median(turn) for turn in turns)
        return sample

    def against(self, other: Sample) -> float:
        """Return how many times the other one it is, in the median of turns that both had.

        What makes the host slower for a while changes both sides of a turn, and so not this; the medians of
        all turns it may move apart.
        """
        pairs = zip(self._turns, other._turns, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    @property
    def n(self) -> int:
        """How many."""
        return len(self._ordered)

    def rank(self, percent: float) -> float:
        """Return a value that was measured: that of the nearest rank."""
        return self._ordered[max(0, math.ceil(self.n * percent / 100) - 1)]

    @property
    def mean(self) -> float:
        """All together, by their number."""
        return statistics.fmean(self._ordered)

    @property
    def p50(self) -> float:
        """The median."""
        return self.rank(50)

    @property
    def p99(self) -> float:
        """That only one in a hundred exceeds."""
        return self.rank(99)

    @property
    def spread(self) -> float:
        """The middle half's width, as a part of the median."""
        return (self.rank(75) - self.rank(25)) / self.p50 if self.p50 else 0.0


class Row(NamedTuple):
    """One figure; the names are those of its JSON, all but `spread`."""

    figure: str
    value: float
    """The median, where there are several."""
    unit: str
    p99: float | None
    n: int
    relative_to: str | None
    ratio: float | None
    target: str | None
    met: bool | None
    """Whether it reaches its target; None where there is none."""
    spread: float | None = None

    def as_json(self) -> dict[str, object]:
        """Return it for json.dumps."""
        value: dict[str, object] = self._asdict()
        del value["spread"]
        return value


class Series(NamedTuple):
    """A line of a plot."""

    name: str
    points: tuple[tuple[float, float], ...]


class Result(NamedTuple):
    """What one benchmark measured: its rows, and what its plot shows."""

    rows: tuple[Row, ...]
    series: tuple[Series, ...] = ()


def _judge(figure: str, number: float) -> tuple[str | None, bool | None]:
    target = TARGETS.get(figure)
    return (None, None) if target is None else (str(target), target.met_by(number))


def compared(
    figure: str,
    sample: Sample,
    other: Sample,
    relative_to: str,
    *,
    unit: str = "us",
    percent: float = 50,
    by_turn: bool = False,
) -> Row:
    """Return the row of `sample` (nanoseconds), whose `percent` rank is compared with the other's median.

    With `by_turn` the ratio is that of :meth:`Sample.against`.
    """
    scale = _UNITS[unit]
    value = sample.rank(percent)
    ratio = sample.against(other) if by_turn else value / other.p50
    target, met = _judge(figure, ratio)
    return Row(
        figure, _rounded(value / scale), unit, _rounded(sample.p99 / scale), sample.n,
        relative_to, _rounded(ratio), target, met, round(sample.spread, 3),
    )  # fmt: skip


def plain(
    figure: str,
    value: float,
    unit: str,
    *,
    n: int = 1,
    p99: float | None = None,
    relative_to: str | None = None,
    ratio: float | None = None,
    spread: float | None = None,
) -> Row:
    """Return the row of a figure that is no time, or is compared with nothing."""
    target, met = _judge(figure, value if ratio is None else ratio)
    return Row(
        figure, _rounded(value), unit, None if p99 is None else _rounded(p99), n, relative_to,
        None if ratio is None else _rounded(ratio), target, met, None if spread is None else round(spread, 3),
    )  # fmt: skip


def measured(figure: str, sample: Sample, *, unit: str = "us") -> Row:
    """Return the row of a time (nanoseconds) that others are compared with."""
    scale = _UNITS[unit]
    return plain(figure, sample.p50 / scale, unit, n=sample.n, p99=sample.p99 / scale, spread=sample.spread)


def _rounded(value: float) -> float:
    """Four digits that count: more would be noise."""
    return float(f"{value:.4g}")
