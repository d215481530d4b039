"""``call``: what a call costs above entering and leaving, and how calls add up over cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from teemate._broker import connect
from teemate._types import ClientInfo
from teemate.bench._broker import BenchBroker
from teemate.bench._measured import Measured, by_turns
from teemate.bench._rows import Result, Row, Sample, Series, compared, measured, plain
from teemate.bench._setting import Setting
from teemate.bench.subject import BUSY_CALLS

__all__ = ["bench_call"]

_BUSY = 30
"""Hundreds of calls that are timed together when programs work side by side."""


def bench_call(setting: Setting) -> Result:
    """Measure calls from C and from Python, beside the bare transition."""
    cores = len(os.sched_getaffinity(0))
    with setting.broker(setting.image(), slots_per_client=max(4, cores)) as broker:
        rows = _costs(setting, broker)
        scaling, series = _scaling(setting, broker, cores)
    return Result((*rows, *scaling), series)


def _costs(setting: Setting, broker: BenchBroker) -> list[Row]:
    with ExitStack() as stack:
        call = setting.call_floor(stack, setting.image())
        counted = _counted(stack, setting, broker)
        sharer = stack.enter_context(setting.sharer(broker))
        sharer.ask("hold")
        sides = {
            "getppid": lambda: call.ask("getppid", 50),
            "bare": lambda: call.ask("bare", 100),
            "empty": lambda: call.ask("empty", 100),
            "empty_py": lambda: sharer.ask("empty", 100),
            "counted_py": lambda: counted.ask("empty", 100),
        }
        if not setting.quick:
            sides |= {
                "echo4k": lambda: sharer.ask("echo4k", 50),
                "echo1m": lambda: sharer.ask("echo1m", 5),
                "ocall": lambda: sharer.ask("ocall", 50),
            }
        found = by_turns(sides, setting.times(60, 30), setting.listener, "calls, beside entering and leaving")
    bare, getppid = found["bare"], found["getppid"]
    empty = compared("empty_call", found["empty"], bare, "floor_transition")
    more = plain(
        "empty_call_getppids", (found["empty"].p50 - bare.p50) / getppid.p50, "getppid calls more",
        n=empty.n, relative_to="floor_transition",
    )  # fmt: skip
    # Both have to hold; the second has a row of its own to be seen.
    empty = empty._replace(target=f"{empty.target}, {more.target} getppid more", met=empty.met and more.met)
    rows = [
        measured("floor_getppid", getppid, unit="ns"),
        measured("floor_transition", bare),
        empty,
        more,
        compared("empty_call_py", found["empty_py"], bare, "floor_transition"),
        compared("counted_call_py", found["counted_py"], found["empty_py"], "empty_call_py"),
    ]
    names = {"echo4k": "call_4_kib_py", "echo1m": "call_1_mib_py", "ocall": "call_with_ocall_py"}
    rows += [compared(names[key], found[key], bare, "floor_transition") for key in names if key in found]
    return rows


def _counted(stack: ExitStack, setting: Setting, broker: BenchBroker) -> Measured:
    """Start a program that counts its calls, since somebody has looked at it; at later ones nobody looks."""
    counted = stack.enter_context(setting.sharer(broker))
    counted.ask("hold")
    with connect(broker.socket, client="viewer") as viewer:
        while not any(_claims(client) for client in viewer.clients(activity=True)):
            counted.ask("empty", 1)
    return counted


def _claims(client: ClientInfo) -> bool:
    return client.activity is not None and bool(client.activity.calls)


# ---- over cores ---------------------------------------------------------------------------------------


def _scaling(setting: Setting, broker: BenchBroker, cores: int) -> tuple[list[Row], tuple[Series, ...]]:
    counts = [2] if setting.quick else [*range(2, cores + 1)] or [2]
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
        sides = {"processes 1": partial(_rate, programs[:1], 1)}
        for count in counts:
            sides[f"processes {count}"] = partial(_rate, programs[:count], 1)
        for count, program in threaded.items():
            sides[f"threads {count}"] = partial(_rate, [program], count)
        found = by_turns(sides, setting.times(25, 12), setting.listener, "calls on several cores")
    one = found["processes 1"]
    rows = [plain("call_rate_1", one.p50, "calls/s", n=one.n, p99=one.rank(1), spread=one.spread)]
    for count in counts:
        rows.append(_scaled(f"call_scaling_{count}", found[f"processes {count}"], one))
    for count in threaded:
        rows.append(_scaled(f"call_scaling_threads_{count}", found[f"threads {count}"], one))
    series = [Series("processes", ((1, one.p50), *((n, found[f"processes {n}"].p50) for n in counts)))]
    if threaded:
        series.append(Series("threads", ((1, one.p50), *((n, found[f"threads {n}"].p50) for n in counts))))
    return rows, tuple(series)


def _rate(programs: Sequence[Measured], threads: int) -> list[float]:
    """Return calls in a second, all of them working at once."""
    for program in programs:
        program.tell("busy", _BUSY)
    longest = max(sum(program.hear()) for program in programs)
    return [len(programs) * threads * _BUSY * BUSY_CALLS / longest * 1e9]


def _scaled(figure: str, sample: Sample, one: Sample) -> Row:
    return plain(
        figure, sample.p50, "calls/s", n=sample.n, p99=sample.rank(1), relative_to="call_rate_1",
        ratio=sample.p50 / one.p50, spread=sample.spread,
    )  # fmt: skip
