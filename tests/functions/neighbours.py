#!/usr/bin/env python3
"""Have other users' functions do their worst, and measure what that costs a neighbour's.

    tests/functions/neighbours.py [--attack NAME ...] [--seconds S] [--attackers N] [--weakened] [--json]

For root.  Per attack: a victim invokes a small function again and again through one broker's enclave while
attackers under other uids run hostile functions in it, and again while they burn as much CPU time outside
(the control run).  Both take turns of half a second, and turns at being first, so that what else goes on on
the machine is in each.  Printed are how many invocations there were and failed, the p99s of all turns
together and their ratio, the median of the single turns' ratios (which a disturbed turn does not move), and
the attackers' CPU time in both.  A function costs its neighbours what it costs the machine, and no more: the
ratio is to stay below 2.  All attacks take three minutes.

With --weakened the enclave lets one invocation run at a time (a test build), which is what neighbours in one
engine could come to: the ratio then has to go far beyond, or the measurement proves nothing.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import attack_figures
import modules as wasm
from function_enclaves import installed, weakened
from images import Images
from other_users import burner, child, cpu_time, p99, together
from running_broker import RunningBroker, run_broker

import teemate
from teemate.functions import FunctionLimits, Functions

VICTIM = 5000
FIRST_ATTACKER = 6000
POLICY = """
[[enclave]]
name = "functions"
image = "{image}"
sigstruct = "{sigstruct}"
insecure_sim_sharing = true
slots_per_client = 1
[[enclave.attach]]
uid = "*"
"""
SLICE = 0.5
"""Seconds of a turn."""

Attack = Callable[[Functions, Callable[[], bool], Counter[str]], None]


@dataclass
class Figures:
    """One attack; times in seconds."""

    attack: str
    invocations: int
    control_invocations: int
    failures: int
    p50: float
    control_p50: float
    p99: float
    control_p99: float
    ratio: float
    turns_ratio: float
    """The median over turns, each of attack and control."""
    attackers_cpu: float
    control_cpu: float
    ends: dict[str, int]
    """How the attackers' functions ended."""


# ---- what attackers do --------------------------------------------------------------------------


def _again(functions: Functions, go_on: Callable[[], bool], ends: Counter[str]) -> None:
    while go_on():
        try:
            functions.invoke("hostile")
            ends["ran"] += 1
        except teemate.Error as error:
            ends[error.code] += 1


def _running(code: bytes, limits: FunctionLimits, **options: Any) -> Attack:
    def attack(functions: Functions, go_on: Callable[[], bool], ends: Counter[str]) -> None:
        functions.deploy("hostile", wasm.command(code, **options), limits=limits, replace=True)
        _again(functions, go_on, ends)

    return attack


def _bounds(functions: Functions, go_on: Callable[[], bool], ends: Counter[str]) -> None:
    from test_hostile import OUT_OF_BOUNDS

    while go_on():
        for code in OUT_OF_BOUNDS.values():
            functions.deploy("hostile", wasm.command(code, table=4), replace=True)
            once = iter((True, False))
            _again(functions, lambda once=once: next(once), ends)  # type: ignore[misc]


def _invalid(functions: Functions, go_on: Callable[[], bool], ends: Counter[str]) -> None:
    from test_hostile import INVALID, LARGE

    # What is found to be wrong at the very end, too.
    all_ = [module for module, _ in INVALID.values()] + [wasm.command(LARGE + wasm.DROP)]
    while go_on():
        for module in all_:
            try:
                functions.deploy("hostile", module, replace=True)
                ends["deployed"] += 1
            except teemate.Error as error:
                ends[error.code] += 1


def _deploying(functions: Functions, go_on: Callable[[], bool], ends: Counter[str]) -> None:
    large = wasm.command(b"", data=bytes(60_000) + b"x", pages=2, functions=[wasm.i32(0) + wasm.DROP] * 5_000)
    while go_on():
        functions.deploy("hostile", large, replace=True)
        functions.invoke("hostile")
        functions.remove("hostile")
        ends["deployed"] += 1


_GROW = wasm.LOOP + wasm.i32(1) + wasm.GROW + wasm.i32(-1) + b"\x47\x0d\x00" + wasm.END
_WRITE = wasm.LOOP + wasm.write(1, 0, 50_000) + wasm.BRANCH + wasm.END
_TALK = wasm.LOOP + wasm.write(2, 0, 50_000) + wasm.BRANCH + wasm.END
_FILL = wasm.LOOP + wasm.i32(0) + wasm.i32(1) + wasm.i32(16 << 20) + b"\xfc\x0b\x00" + wasm.BRANCH + wasm.END
_SOME = wasm.i32(0) + wasm.i32(60_000) + wasm.call("random_get") + wasm.DROP
_RANDOM = wasm.LOOP + _SOME + wasm.BRANCH + wasm.END

ATTACKS: dict[str, Attack] = {
    "loop": _running(wasm.ENDLESS, FunctionLimits(time=0.5)),
    "recursion": _running(wasm.call(wasm.START), FunctionLimits(time=0.5)),
    "growth": _running(_GROW + wasm.UNREACHABLE, FunctionLimits(memory=24 << 20, time=0.5)),
    "filling": _running(_FILL, FunctionLimits(memory=16 << 20, time=0.5), pages=256),
    "output": _running(_WRITE, FunctionLimits(output=16 << 20, time=0.5)),
    "stderr": _running(_TALK, FunctionLimits(fuel=3_000_000)),
    "random": _running(_RANDOM, FunctionLimits(time=0.5)),
    "bounds": _bounds,
    "invalid": _invalid,
    "deploying": _deploying,
}

# ---- running them -------------------------------------------------------------------------------


@contextlib.contextmanager
def _functions(path: str) -> Iterator[Functions]:
    signal.alarm(120)
    with teemate.connect(path) as broker:
        yield broker.functions


def _attacker(name: str, path: str, seconds: float) -> dict[str, Any]:
    with _functions(path) as functions:
        functions.usage()  # attached
        end = time.monotonic() + seconds
        ends: Counter[str] = Counter()
        before = cpu_time()
        ATTACKS[name](functions, lambda: time.monotonic() < end, ends)
        return {"cpu": cpu_time() - before, "ends": ends}


def _victim(path: str, seconds: float) -> dict[str, Any]:
    times: list[float] = []
    failures: list[str] = []
    with _functions(path) as functions:
        functions.deploy("small", wasm.echo(), replace=True)
        functions.invoke("small", b"warm")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            started = time.perf_counter()
            try:
                if functions.invoke("small", b"payload") != b"payload":
                    failures.append("another answer")
            except teemate.Error as error:
                failures.append(str(error))
            times.append(time.perf_counter() - started)
            time.sleep(0.001)
    return {"times": times, "failures": failures}


@dataclass
class _Slices:
    """What the slices of one kind have come to."""

    times: list[list[float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    cpu: float = 0.0

    def run(self, path: str, length: float, others: list[tuple[int, int]]) -> list[dict[str, Any]]:
        victim, *results = together([child(lambda: _victim(path, length), VICTIM), *others])
        self.times.append(victim.get("times", []))
        self.failures += victim.get("failures", ["ended"])
        self.cpu += sum(result.get("cpu", 0.0) for result in results)
        return results

    @property
    def all(self) -> list[float]:
        return [time for slice_ in self.times for time in slice_]


class _Measurement:
    """One attack and its control run, by turns."""

    def __init__(self, path: str, name: str, attackers: int, length: float) -> None:
        self._path = path
        self._name = name
        self._length = length
        self._uids = range(FIRST_ATTACKER, FIRST_ATTACKER + attackers)
        self._owed = [0.0] * attackers
        """CPU seconds that each attacker has had, and its burner has not yet."""
        self.attack, self.control = _Slices(), _Slices()
        self.ends: Counter[str] = Counter()

    def turn(self, *, attack_first: bool) -> None:
        if attack_first:
            self._attack()
            self._control(ahead=0.0)
        else:  # the attack will burn what it has burnt on average
            self._control(ahead=self.attack.cpu / len(self.attack.times) / len(self._uids))
            self._attack()

    def _attack(self) -> None:
        path, name, length = self._path, self._name, self._length
        under = [child(lambda: _attacker(name, path, length), uid) for uid in self._uids]
        for number, result in enumerate(self.attack.run(path, length, under)):
            self.ends.update(result.get("ends", {"attacker ended": 1}))
            self._owed[number] += float(result.get("cpu", 0.0))

    def _control(self, ahead: float) -> None:
        length = self._length
        beside = [
            child(lambda owed=owed: burner(max(0.0, owed + ahead), length), uid)  # type: ignore[misc]
            for uid, owed in zip(self._uids, self._owed, strict=True)
        ]
        for number, result in enumerate(self.control.run(self._path, length, beside)):
            self._owed[number] -= float(result.get("cpu", 0.0))


def measure(running: RunningBroker, name: str, seconds: float, attackers: int) -> Figures:
    """One attack and its control run, a turn of each after the other."""
    turns = max(1, round(seconds / SLICE))
    it = _Measurement(running.socket, name, attackers, seconds / turns)
    for number in range(turns):
        it.turn(attack_first=number % 2 == 0)
    attack, control = it.attack.all, it.control.all
    failures = it.attack.failures + it.control.failures
    for failure in failures[:3]:
        print(f"{name}: victim: {failure}", file=sys.stderr)
    return Figures(
        attack=name,
        invocations=len(attack),
        control_invocations=len(control),
        failures=len(failures),
        p50=sorted(attack)[len(attack) // 2],
        control_p50=sorted(control)[len(control) // 2],
        p99=p99(attack),
        control_p99=p99(control),
        ratio=p99(attack) / p99(control),
        turns_ratio=statistics.median(
            p99(one) / p99(other) for one, other in zip(it.attack.times, it.control.times, strict=True)
        ),
        attackers_cpu=it.attack.cpu,
        control_cpu=it.control.cpu,
        ends=dict(it.ends),
    )


def run(attacks: list[str], seconds: float, attackers: int, *, weak: bool = False) -> list[Figures]:
    """All attacks in one broker's enclave, one after the other."""
    import test_hostile  # noqa: F401 (what a child imports late it may not be allowed to read)

    "".encode("idna")
    with tempfile.TemporaryDirectory() as folder:
        image = installed()
        if weak:
            image = weakened(Images(Path(folder)), Path(folder), "TM_TEST_ONE_AT_A_TIME")
        policy = POLICY.format(image=image.sgxs, sigstruct=image.sigstruct)
        with run_broker(policy) as running:
            return [measure(running, name, seconds, attackers) for name in attacks]


HEADING = (
    "attack      invocations control failed   p50 us control   p99 us control  ratio  turns"
    "  CPU s control  ended"
)


def row(each: Figures) -> str:
    return (
        f"{each.attack:12}{each.invocations:11} {each.control_invocations:7} {each.failures:6}"
        f" {each.p50 * 1e6:8.0f} {each.control_p50 * 1e6:7.0f} {each.p99 * 1e6:8.0f}"
        f" {each.control_p99 * 1e6:7.0f} {each.ratio:6.2f} {each.turns_ratio:6.2f}"
        f" {each.attackers_cpu:6.2f} {each.control_cpu:7.2f}  {each.ends}"
    )


def main(words: list[str] | None = None) -> None:
    attack_figures.main(
        __doc__,
        ATTACKS,
        lambda given: run(given.attack, given.seconds, given.attackers, weak=given.weakened),
        HEADING,
        row,
        seconds=6.0,
        flags=["--weakened"],
        words=words,
    )


if __name__ == "__main__":
    main()
