"""How calls add up over cores: programs that call at once, beside the same ones alone.

Each program has a core of its own, and works alone there in the same turn as together with the others: what
the host gives one core less than another, or takes away for some seconds, is not laid on their working
together.  All work through the same span of time, and what each does in it is added up over all turns: a
span in which somebody else had the core counts as it is, alone as together.

The same programs make system calls in the same way (``floor_scaling``).  These share nothing that is ours, so
what *they* lose together is the host's, and ``call_scaling_2_of_floor`` is what is left of calls beside that.
``call_cpu_of_2`` tells the same on a host with other work, which takes no time of a thread's own: what a call
takes of a processor while the other program calls too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from teemate.bench._broker import BenchBroker
from teemate.bench._measured import Measured, Side, by_turns
from teemate.bench._rows import Row, Sample, Series, plain
from teemate.bench._setting import Setting

__all__ = ["scaling_of_calls"]

_SPAN_US = 20_000
_LEAD_NS = 3_000_000
"""From telling the first program to the span: all are awake and warm by then."""
_FLOOR = "getppids"
_CALLS = "calls"


def scaling_of_calls(
    setting: Setting, broker: BenchBroker, cores: Sequence[int]
) -> tuple[list[Row], tuple[Series, ...]]:
    """Measure 2 to all cores, with a program each, and with one program of so many threads."""
    counts = [2] if setting.quick or len(cores) < 2 else [*range(2, len(cores) + 1)]
    with ExitStack() as stack:
        programs = [stack.enter_context(setting.sharer(broker)) for _ in range(counts[-1])]
        threaded = {}
        if not setting.quick:
            threaded = {
                count: stack.enter_context(setting.sharer(broker, "--threads", str(count)))
                for count in counts
            }
        for program in (*programs, *threaded.values()):
            program.ask("hold")
        for number, program in enumerate(programs):
            program.keep_on(cores[number % len(cores)])
        sides: dict[str, Side] = {}
        cpu: dict[str, list[list[float]]] = {}
        for what in (_CALLS, _FLOOR):
            for number, program in enumerate(programs):
                name = f"{what} alone {number}"
                sides[name] = partial(_rate, what, [program], cpu.setdefault(name, []))
            for count in counts:
                name = f"{what} of {count}"
                sides[name] = partial(_rate, what, programs[:count], cpu.setdefault(name, []))
        for count, program in threaded.items():
            sides[f"threads {count}"] = partial(_rate, _CALLS, [program], [])
        found = by_turns(sides, setting.times(50, 16), setting.listener, "calls on several cores")
    # The first turn does not count.
    taken = {name: Sample.of_turns(turns[1:]) for name, turns in cpu.items()}
    one = found[f"{_CALLS} alone 0"]
    rows = [
        _told("call_rate_1", one),
        _told("floor_rate_1", found[f"{_FLOOR} alone 0"]),
        plain("call_cpu", taken[f"{_CALLS} alone 0"].p50 / 1e3, "us", n=one.n),
    ]
    for count in counts:
        ours, floor = (_against_alone(found, what, count) for what in (_CALLS, _FLOOR))
        rows += [
            _told(f"call_scaling_{count}", found[f"{_CALLS} of {count}"], "call_rate_1", ours),
            _told(f"floor_scaling_{count}", found[f"{_FLOOR} of {count}"], "floor_rate_1", floor),
            plain(
                f"call_scaling_{count}_of_floor", ours / floor, "times", n=one.n,
                relative_to=f"floor_scaling_{count}",
            ),
            plain(
                f"call_cpu_of_{count}", taken[f"{_CALLS} of {count}"].p50 / 1e3, "us", n=one.n,
                relative_to="call_cpu", ratio=_against_alone(taken, _CALLS, count),
            ),
        ]  # fmt: skip
    for count in threaded:
        sample = found[f"threads {count}"]
        rows.append(_told(f"call_scaling_threads_{count}", sample, "call_rate_1", sample.mean / one.mean))
    series = [Series("processes", ((1, one.p50), *((n, found[f"{_CALLS} of {n}"].p50) for n in counts)))]
    if threaded:
        series.append(Series("threads", ((1, one.p50), *((n, found[f"threads {n}"].p50) for n in counts))))
    return rows, tuple(series)


def _rate(what: str, programs: Sequence[Measured], cpu: list[list[float]]) -> list[float]:
    """Return how often in a second, all of them working at once; `cpu` gets each one's time for one."""
    start = time.monotonic_ns() + _LEAD_NS
    for program in programs:
        program.tell(what, start, _SPAN_US)
    heard: list[int] = []
    for program in programs:
        heard += program.hear()
    spans = list(zip(heard[::3], heard[1::3], heard[2::3], strict=True))  # of each thread
    cpu.append([taken / done for done, _, taken in spans])
    return [sum(done / ns * 1e9 for done, ns, _ in spans)]


def _against_alone(found: Mapping[str, Sample], what: str, count: int) -> float:
    """Return what all have together against what one has alone, which is each of them in its turn."""
    alone = statistics.fmean(found[f"{what} alone {number}"].mean for number in range(count))
    return found[f"{what} of {count}"].mean / alone


def _told(figure: str, sample: Sample, relative_to: str | None = None, ratio: float | None = None) -> Row:
    return plain(
        figure, sample.p50, "calls/s", n=sample.n, p99=sample.rank(1), relative_to=relative_to, ratio=ratio,
        spread=sample.spread,
    )  # fmt: skip
