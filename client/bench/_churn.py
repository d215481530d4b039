"""``churn``: clients come, call once and leave, without a pause; what do they leave behind?

Nothing may be left: no page of the enclave, no descriptor of broker or wardens, no slot.  The broker's memory
is looked at when half of the clients have come and at the end: by then everything that is made once, and
every cache, is there, so what grows in the second half grows with clients.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from teemate._broker import Broker, connect
from teemate.bench._broker import BenchBroker
from teemate.bench._measured import Measured
from teemate.bench._memory import memory_of
from teemate.bench._rows import Result, Sample, Series, measured, plain
from teemate.bench._setting import MIB, Setting
from teemate.demo._memory import children

__all__ = ["bench_churn"]

_SECONDS = 60.0
_QUICK_SECONDS = 10.0
_BATCH = 50
_WARM_UP = 200


class _Left(NamedTuple):
    """What is held at one moment, when nobody but the observer is there."""

    clients: int
    pages: int
    descriptors: int
    slots_missing: int
    memory: int


def bench_churn(setting: Setting) -> Result:
    """Let clients come and go for a minute, as many at a time as there are cores."""
    image = setting.image()
    seconds = (_QUICK_SECONDS if setting.quick else _SECONDS) * setting.scale
    with ExitStack() as stack:
        broker = stack.enter_context(setting.broker(image))
        observer = stack.enter_context(connect(broker.socket, client="bench observer"))
        inside = stack.enter_context(setting.sharer(broker))
        inside.ask("hold")
        programs = [stack.enter_context(setting.sharer(broker)) for _ in os.sched_getaffinity(0)]
        come_and_go(programs, _BATCH, lambda done: done < setting.times(_WARM_UP, _WARM_UP))

        def look(clients: int) -> _Left:
            return _settled(broker, observer, inside, clients, setting.settle_seconds)

        start = look(0)
        setting.listener.phase("clients come and go", round(seconds))
        taken: list[int] = []
        line: list[tuple[float, float]] = []
        began = time.monotonic()
        half: _Left | None = None
        while half is None or half.clients == len(taken) or time.monotonic() - began < seconds:
            taken += come_and_go(programs, _BATCH, lambda done: done == 0)
            line.append((len(taken), memory_of(broker.keeper) / MIB))
            elapsed = time.monotonic() - began
            setting.listener.progress(round(min(elapsed, seconds)))
            if half is None and elapsed >= seconds / 2:
                half = look(len(taken))
        lasted = time.monotonic() - began
        end = look(len(taken))
    sample = Sample(taken)
    grown = max(0, end.memory - half.memory) / (end.clients - half.clients)
    rows = (
        plain("churn_rate", sample.n / lasted, "clients/s", n=sample.n),
        measured("churn_attach", sample),
        plain("churn_pages_left", end.pages - start.pages, "pages", n=sample.n),
        plain("churn_fds_left", end.descriptors - start.descriptors, "descriptors", n=sample.n),
        plain("churn_slots_left", end.slots_missing, "slots", n=sample.n),
        plain("churn_bytes_left", grown, "bytes per client", n=end.clients - half.clients),
    )
    return Result(rows, (Series("the broker's memory", tuple(line)),))


def come_and_go(programs: Sequence[Measured], count: int, more: Callable[[int], bool]) -> list[int]:
    """Have every program attach, call and leave `count` times, again while `more(done)`."""
    taken: list[int] = []
    while more(len(taken)):
        for program in programs:
            program.tell("cold", count)
        for program in programs:
            taken += program.hear()
    return taken


def _settled(broker: BenchBroker, observer: Broker, inside: Measured, clients: int, patience: float) -> _Left:
    """Look when the last clients' slots are free again, or after a time in which they should have been."""
    end = time.monotonic() + patience
    while True:
        (info,) = observer.enclaves()
        missing = info.slots.total - 1 - info.slots.free  # one is with who stays inside
        if not missing or time.monotonic() > end:
            break
        time.sleep(0.05)
    (pages, *_) = inside.ask("pages")
    service = [broker.keeper, *children(broker.keeper)]
    return _Left(
        clients,
        pages,
        sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in service),
        missing,
        memory_of(broker.keeper),
    )
