"""``attach``: how long until the first reply from inside, shared and in an enclave of one's own.

Three ways to come in: *warm*, in a program that is connected; *cold*, which connects first; and *new*, a
program that starts.  The conventional way builds the enclave.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial

from teemate.bench._measured import PAUSE_US, Side, by_turns
from teemate.bench._rows import Result, Row, Sample, Series, compared, measured, plain
from teemate.bench._setting import HEAP, MIB, Setting
from teemate.demo._prepare import DemoImage
from teemate.errors import InternalError

__all__ = ["bench_attach", "import_time"]

_HEAPS = (4, 16, 64, 256)
_BATCH = 5


def bench_attach(setting: Setting) -> Result:
    """Measure all ways for each heap; the one that is shipped comes with everything else."""
    rows: list[Row] = []
    shared: list[tuple[float, float]] = []
    private: list[tuple[float, float]] = []
    for heap in (HEAP // MIB,) if setting.quick else _HEAPS:
        found = _ways(setting, setting.image(heap=heap * MIB), heap)
        shared.append((heap, found["cold"].p50 / 1e6))
        private.append((heap, found["private"].p50 / 1e6))
        if heap * MIB == HEAP:
            rows += _rows_at_home(found)
        else:
            rows += [
                compared(
                    f"conventional_{heap}m", found["private"], found["create"], "floor_creation", unit="ms"
                ),
                compared(f"cold_attach_{heap}m", found["cold"], found["cold floor"], "floor_cold"),
                plain(
                    f"latency_ratio_{heap}m", found["private"].p50 / found["cold"].p50, "times",
                    n=found["cold"].n, relative_to=f"cold_attach_{heap}m",
                    ratio=found["private"].p50 / found["cold"].p50,
                ),
            ]  # fmt: skip
    if not setting.quick:
        rows += _new_programs(setting)
    rows += import_time(setting)
    return Result(
        tuple(rows),
        (
            Series("building an enclave of one's own", tuple(private)),
            Series("attaching to the shared one", tuple(shared)),
        ),
    )


def _ways(setting: Setting, image: DemoImage, heap: int) -> dict[str, Sample]:
    with ExitStack() as stack:
        broker = stack.enter_context(setting.broker(image))
        sharer = stack.enter_context(setting.sharer(broker))
        builder = stack.enter_context(setting.builder(image))
        floor = setting.attach_floor(stack, image)
        creation = setting.creation_floor(stack, image)
        sides: dict[str, Side] = {
            "warm": lambda: sharer.ask("warm", _BATCH, PAUSE_US),
            "warm floor": lambda: floor.ask("warm", _BATCH, PAUSE_US),
            "cold": lambda: sharer.ask("cold", _BATCH, PAUSE_US),
            "cold floor": lambda: floor.ask("cold", _BATCH, PAUSE_US),
            "private": lambda: builder.ask("private", 1, PAUSE_US),
            "create": lambda: creation.ask("create", 1, PAUSE_US),
        }
        programs = [sharer]
        in_c = setting.c_sharer(broker)
        if in_c is not None:
            programs.append(stack.enter_context(in_c))
            sides["warm C"] = partial(in_c.ask, "warm", _BATCH, PAUSE_US)
            sides["cold C"] = partial(in_c.ask, "cold", _BATCH, PAUSE_US)
        for program in programs:
            program.ask("warm", 20, PAUSE_US)
            program.ask("cold", 20, PAUSE_US)
        return by_turns(
            sides,
            setting.times(100 if heap <= HEAP // MIB else 20, 40),
            setting.listener,
            f"coming in, with {heap} MiB of heap",
        )


def _rows_at_home(found: dict[str, Sample]) -> list[Row]:
    conventional, cold = found["private"], found["cold"]
    ratio = conventional.p50 / cold.p50
    in_c = []
    if "warm C" in found:
        in_c = [
            compared("warm_attach_c", found["warm C"], found["warm floor"], "floor_warm"),
            compared("cold_attach_c", found["cold C"], found["cold floor"], "floor_cold"),
        ]
    return [
        measured("floor_warm", found["warm floor"]),
        measured("floor_cold", found["cold floor"]),
        compared("warm_attach", found["warm"], found["warm floor"], "floor_warm"),
        compared("cold_attach", cold, found["cold floor"], "floor_cold"),
        *in_c,
        measured("floor_creation", found["create"], unit="ms"),
        compared("conventional", conventional, found["create"], "floor_creation", unit="ms"),
        plain(
            "latency_ratio_floor", found["create"].p50 / found["cold floor"].p50, "times",
            n=conventional.n, relative_to="floor_cold",
        ),
        plain("latency_ratio", ratio, "times", n=conventional.n, relative_to="cold_attach", ratio=ratio),
    ]  # fmt: skip


# ---- programs that start ---------------------------------------------------------------------------


def _new_programs(setting: Setting) -> list[Row]:
    image = setting.image()
    with setting.broker(image) as broker:
        sides: dict[str, Side] = {
            "shared": lambda: [_first_reply([*setting.attaching(broker), "--first", "cold"])],
            "private": lambda: [_first_reply([*setting.building(image), "--first", "private"])],
        }
        in_c = setting.c_attaching(broker)
        if in_c is not None:
            sides["shared, C"] = lambda: [_first_reply([*in_c, "--first"])]
        found = by_turns(sides, setting.times(15, 5), setting.listener, "programs that start")
    rows = [
        measured("new_conventional", found["private"], unit="ms"),
        compared("new_attach", found["shared"], found["private"], "new_conventional", unit="ms"),
    ]
    if "shared, C" in found:
        rows.append(
            compared("new_attach_c", found["shared, C"], found["private"], "new_conventional", unit="ms")
        )
    return rows


def _first_reply(command: list[str]) -> float:
    """Return the nanoseconds from starting a program to its first reply from inside."""
    start = time.monotonic_ns()
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - our own programs
    if done.returncode:
        raise InternalError(f"a program that starts ended with status {done.returncode}: {done.stderr}")
    return int(done.stdout) - start


# ---- what importing costs -------------------------------------------------------------------------------


def import_time(setting: Setting) -> list[Row]:
    """Compare ``import teemate`` with what a program that talks to a socket in JSON imports."""
    found = by_turns(
        {
            "ours": lambda: [_run_time("import teemate")],
            "theirs": lambda: [_run_time("import socket, json")],
        },
        setting.times(40, 15),
        setting.listener,
        "importing",
    )
    return [
        measured("import_socket_json", found["theirs"], unit="ms"),
        compared("import_time", found["ours"], found["theirs"], "import_socket_json", unit="ms"),
    ]


def _run_time(code: str) -> float:
    start = time.monotonic_ns()
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603 - our own code
    return time.monotonic_ns() - start
