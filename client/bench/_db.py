"""``db``: one database in a shared enclave, in an enclave for each process, and in none.

All three are worked with by the same C program (native/bench/database.c).  SQLite as the host has it does
the least that the same statements and the same durability cost; a private enclave is of the image that is
shared, with one slot and as much memory as it takes to keep the database in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from teemate.bench._db_ways import PLAIN, PRIVATE, SHARED, Ways
from teemate.bench._measured import Measured, Side, by_turns
from teemate.bench._rows import Result, Row, Sample, Series, measured, plain
from teemate.bench._setting import MIB, Setting

__all__ = ["bench_db"]

_CLIENTS = (1, 2, 4, 8, 16)
_AT = 8
"""Processes of the memory's figure."""
_WORKERS = (1, 2, 4, 8)
_BATCH = 100
"""Reads of a call, rows of a range, inserts of a transaction (native/bench/database.h)."""
_KINDS = {
    # What the program is told: how often at a time, and how many of what that is.
    "point": (10, _BATCH, "reads/s"),
    "batch": (10, _BATCH, "reads/s"),
    "range": (50, 1, "ranges/s"),
    "insert": (10, 1, "transactions/s"),
    "inserts": (4, _BATCH, "inserts/s"),
}
_NAMES = {SHARED: "one shared enclave", PRIVATE: "one enclave each", PLAIN: "no enclave"}


def bench_db(setting: Setting) -> Result:
    """Read, open, look at memory and work, all ways by turns."""
    with ExitStack() as stack:
        ways = Ways(stack, setting, clients=_AT)
        steps = dict.fromkeys((1, _AT) if setting.quick else _CLIENTS, ways)
        if not setting.quick:
            # An enclave with as many slots as there are processes: each slot takes memory.
            steps[_CLIENTS[-1]] = Ways(stack, setting, clients=_CLIENTS[-1])
        for each in dict.fromkeys(steps.values()):
            each.make()
        rows = _reads(setting, ways)
        opened, opening = _opening(setting, steps)
        kept, memory = _memory(setting, steps)
        rates = _rates(setting, ways, (1, 2) if setting.quick else _WORKERS)
    return Result((*rows, *opened, *kept, *rates), (*opening, *memory))


# ---- one read ------------------------------------------------------------------------------------------


def _reads(setting: Setting, ways: Ways) -> list[Row]:
    with ExitStack() as stack:
        floor = setting.call_floor(stack, setting.image(heap=4 * MIB))
        programs = {way: stack.enter_context(ways.program(way)) for way in ways.names if way != PRIVATE}
        sides: dict[str, Side] = {"bare": lambda: floor.ask("bare", 20)}
        for way, program in programs.items():
            program.ask("hold")
            program.ask("fill")
            sides |= {f"{way} {kind}": partial(program.ask, kind, 2) for kind in ("point", "batch")}
        found = by_turns(sides, setting.times(60, 30), setting.listener, "reads, beside plain sqlite3's")
    bare, point, batch = found["bare"], found["shared point"], found["shared batch"]
    rows = [
        measured("floor_transition", bare),
        measured("db_point_read", point),
        measured("db_batch_read", batch),
    ]
    if PLAIN in programs:
        theirs = found["plain point"]
        least = theirs.p50 + bare.p50
        rows += [
            measured("db_point_read_plain", theirs),
            plain("db_point_read_floor", least / 1e3, "us", n=theirs.n),
            plain(
                "db_point_read_vs_plain", point.p50 / 1e3, "us", n=point.n, p99=point.p99 / 1e3,
                relative_to="db_point_read_floor", ratio=point.p50 / least,
            ),
            plain(
                "db_batch_read_vs_plain", 1e9 / batch.p50, "reads/s", n=batch.n,
                relative_to="db_point_read_plain", ratio=theirs.p50 / batch.p50,
            ),
        ]  # fmt: skip
    return rows


# ---- coming in -------------------------------------------------------------------------------------------


def _opening(setting: Setting, steps: Mapping[int, Ways]) -> tuple[list[Row], list[Series]]:
    rows: list[Row] = []
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for count, ways in steps.items():
        with ExitStack() as stack:
            programs = {way: ways.programs(stack, way, count) for way in ways.names}
            sides: dict[str, Side] = {way: partial(_together, programs[way], "open") for way in ways.names}
            if count == 1:
                sides["loaded"] = partial(_together, programs[PRIVATE], "loaded")
            # As many as the processes make at once: those of a round.
            rounds = max(2, setting.times(48, 8) // count)
            what = f"{count} processes" if count > 1 else "a process"
            found = by_turns(sides, rounds, setting.listener, f"open and first query, {what} at a time")
        for way in ways.names:
            rows.append(measured(f"db_open_{way}_{count}", found[way], unit="ms"))
            points[way].append((count, found[way].p50 / 1e6))
        if count == 1:
            rows += _opening_ratios(found)
    return rows, [Series(_NAMES[way], tuple(line)) for way, line in points.items()]


def _together(programs: Sequence[Measured], word: str) -> list[float]:
    for program in programs:
        program.tell(word)
    return [taken for program in programs for taken in program.hear()]


def _opening_ratios(found: dict[str, Sample]) -> list[Row]:
    ours, theirs, loaded = found[SHARED], found[PRIVATE], found["loaded"]
    rows = [measured("db_open_private_loaded", loaded, unit="ms")]
    for figure, other in (("db_open_first_query_ratio", loaded), ("db_open_unloaded_ratio", theirs)):
        ratio = other.p50 / ours.p50
        rows.append(plain(figure, ratio, "times", n=ours.n, relative_to="db_open_shared_1", ratio=ratio))
    return rows


# ---- memory ------------------------------------------------------------------------------------------------


def _memory(setting: Setting, steps: Mapping[int, Ways]) -> tuple[list[Row], list[Series]]:
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for ways in dict.fromkeys(steps.values()):
        counts = [count for count, of in steps.items() if of is ways]
        for way in ways.names:
            setting.listener.phase(f"memory: {_NAMES[way]}", counts[-1])
            with ExitStack() as stack:
                programs = ways.programs(stack, way, counts[-1])
                for number, program in enumerate(programs, 1):
                    program.ask("hold")
                    program.ask("fill")
                    setting.listener.progress(number)
                    if number in counts:
                        found[way][number] = ways.memory(way, programs[:number])
    rows = [
        plain(f"db_memory_{way}_{count}", taken / MIB, "MiB")
        for way, each in found.items()
        for count, taken in each.items()
    ]
    ours = found[SHARED]
    ratio = found[PRIVATE][_AT] / ours[_AT]
    rows.append(plain("db_memory_ratio", ratio, "times", relative_to=f"db_memory_shared_{_AT}", ratio=ratio))
    added = (ours[_AT] - ours[1]) / (_AT - 1)
    rows.append(plain("db_memory_per_added_process", added / 1024, "KiB"))
    return rows, [
        Series(_NAMES[way], tuple((count, taken / MIB) for count, taken in each.items()))
        for way, each in found.items()
    ]


# ---- at work ---------------------------------------------------------------------------------------------


def _rates(setting: Setting, ways: Ways, counts: Sequence[int]) -> list[Row]:
    rows = []
    for count in counts:
        with ExitStack() as stack:
            sides: dict[str, Side] = {}
            for way in ways.names:
                if way == PRIVATE:
                    continue  # it does what the shared one does, and its files are the others' too
                programs = ways.programs(stack, way, count)
                for program in programs:
                    program.ask("hold")
                sides |= {f"{kind}_{way}": partial(_rate, programs, kind) for kind in _KINDS}
            what = f"{count} processes" if count > 1 else "a process"
            found = by_turns(sides, setting.times(12, 4), setting.listener, f"statements of {what}")
        for kind, (_, _, unit) in _KINDS.items():
            ours, theirs = found[f"{kind}_{SHARED}"], found.get(f"{kind}_{PLAIN}")
            against = None
            if theirs is not None:
                against = f"db_rate_{kind}_{PLAIN}_{count}"
                rows.append(_rate_row(against, theirs, unit))
            rows.append(_rate_row(f"db_rate_{kind}_{count}", ours, unit, against, theirs))
    return rows


def _rate_row(
    figure: str, sample: Sample, unit: str, against: str | None = None, other: Sample | None = None
) -> Row:
    return plain(
        figure, sample.p50, unit, n=sample.n, p99=sample.rank(1), spread=sample.spread,
        relative_to=against, ratio=sample.p50 / other.p50 if other else None,
    )  # fmt: skip


def _rate(programs: Sequence[Measured], kind: str) -> list[float]:
    """Return how many in a second, all of them working at once."""
    often, each, _ = _KINDS[kind]
    for program in programs:
        program.tell(kind, often)
    # A read's time is told as the mean of those that were timed together.
    told = _BATCH if kind in ("point", "batch") else 1
    longest = max(sum(program.hear()) for program in programs) * told
    return [len(programs) * often * each / longest * 1e9]
