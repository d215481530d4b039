"""``call``: what a call costs above entering and leaving, and how calls add up over cores."""

from __future__ import annotations

import os
from contextlib import ExitStack

from teemate._broker import connect
from teemate._types import ClientInfo
from teemate.bench._broker import BenchBroker
from teemate.bench._measured import Measured, by_turns
from teemate.bench._rows import Result, Row, compared, measured, plain
from teemate.bench._scaling import scaling_of_calls
from teemate.bench._setting import Setting

__all__ = ["bench_call"]


def bench_call(setting: Setting) -> Result:
    """Measure calls from C and from Python, beside the bare transition."""
    cores = sorted(os.sched_getaffinity(0))
    with setting.broker(setting.image(), slots_per_client=max(4, len(cores))) as broker:
        rows = _costs(setting, broker, cores[-1])
        scaling, series = scaling_of_calls(setting, broker, cores)
    return Result((*rows, *scaling), series)


def _costs(setting: Setting, broker: BenchBroker, core: int) -> list[Row]:
    with ExitStack() as stack:
        call = setting.call_floor(stack, setting.image())
        counted = _counted(stack, setting, broker)
        sharer = stack.enter_context(setting.sharer(broker))
        sharer.ask("hold")
        for program in (call, counted, sharer):
            program.keep_on(core)
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
    empty = compared("empty_call", found["empty"], bare, "floor_transition", by_turn=True)
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
        compared("empty_call_py", found["empty_py"], bare, "floor_transition", by_turn=True),
        compared("counted_call_py", found["counted_py"], found["empty_py"], "empty_call_py", by_turn=True),
    ]
    names = {"echo4k": "call_4_kib_py", "echo1m": "call_1_mib_py", "ocall": "call_with_ocall_py"}
    rows += [
        compared(names[key], found[key], bare, "floor_transition", by_turn=True)
        for key in names
        if key in found
    ]
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
