"""``scale``: what more clients and more attaches cost the broker, and those who attach meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from teemate.bench._broker import BenchBroker
from teemate.bench._measured import PAUSE_US, Measured, by_turns
from teemate.bench._memory import memory_of
from teemate.bench._rows import Result, Row, Sample, Series, compared, measured, plain
from teemate.bench._setting import Setting

__all__ = ["bench_scale"]

_CLIENTS = (4, 16, 64, 256, 1024)
_AT = 64
"""Connected clients of the figure that tells how even attaches are."""
_RATES = (1, 4, 16, 64, 256, 1024, 2048, 4096)
"""Attaches that are offered in a second."""
_BATCH = 10
_SMALL_HEAP = 4 << 20
_SLOTS = 112
"""Of an enclave; a thousand clients that hold one each need several enclaves."""


def bench_scale(setting: Setting) -> Result:
    """Attach beside more and more clients, then offer more and more attaches."""
    most = setting.times(_CLIENTS[-1], _CLIENTS[-1])
    counts = [count for count in _CLIENTS if count < most] + [most]
    if setting.quick:
        counts = [min(_AT, most - 1), most]
    image = setting.image(heap=_SMALL_HEAP, slots=_SLOTS)
    copies = 1 + -(-most // _SLOTS)  # one is for who attaches and leaves
    with ExitStack() as stack:
        # Two brokers, one of them alone with its only client: they take turns.
        quiet = stack.enter_context(setting.broker(image, clients=most, copies=copies))
        alone = stack.enter_context(setting.sharer(quiet))
        broker = stack.enter_context(setting.broker(image, clients=most, copies=copies))
        guest = stack.enter_context(setting.sharer(broker))
        crowd = stack.enter_context(_crowd(broker, broker.enclaves[1:]))
        for program in (alone, guest):
            program.ask("warm", 30, PAUSE_US)
        empty = memory_of(broker.keeper)
        rows: list[Row] = []
        points: dict[str, list[tuple[float, float]]] = {"half of them faster": [], "99 of 100 faster": []}
        there = 0
        for count in counts:
            setting.listener.phase(f"{count} clients attach and stay")
            crowd.ask("attach", count - there)
            there = count
            found = by_turns(
                {
                    "few": lambda: alone.ask("warm", _BATCH, PAUSE_US),
                    "many": lambda: guest.ask("warm", _BATCH, PAUSE_US),
                },
                setting.times(60, 50),
                setting.listener,
                f"attaching beside {count} clients",
            )
            if count == min(_AT, counts[-2]):
                many = found["many"]
                rows.append(compared("warm_attach_p99", many, many, f"attach_at_{count}", percent=99))
            if count == most:
                rows.append(measured("warm_attach_alone", found["few"]))
            rows.append(compared(f"attach_at_{count}", found["many"], found["few"], "warm_attach_alone"))
            points["half of them faster"].append((count, found["many"].p50 / 1e6))
            points["99 of 100 faster"].append((count, found["many"].p99 / 1e6))
        kib = (memory_of(broker.keeper) - empty) / there / 1024
        rows.append(plain("broker_kib_per_client", kib, "KiB", n=there))
        if not setting.quick:
            rows += _offered(setting, broker, stack.enter_context(_crowd(broker, broker.enclaves[:1])))
    return Result(tuple(rows), tuple(Series(name, tuple(line)) for name, line in points.items()))


def _crowd(broker: BenchBroker, enclaves: Sequence[str]) -> Measured:
    command = [sys.executable, "-m", "teemate.bench.crowd", "--socket", broker.socket]
    for enclave in enclaves:
        command += ["--enclave", enclave]
    return Measured("the crowd", command)


def _offered(setting: Setting, broker: BenchBroker, crowd: Measured) -> list[Row]:
    """Offer attaches at rates that grow, whether the broker keeps up or not."""
    rows = []
    crowd.ask("offer", 100, 2000)
    for number, rate in enumerate(_RATES, 1):
        setting.listener.phase(f"{rate} attaches a second", len(_RATES))
        count = max(2, round(min(rate, 1024) * setting.times(3, 1) * setting.scale))
        before = _processor_ns(broker.keeper)
        taken = crowd.ask("offer", count, 1_000_000 // rate)
        spent = (_processor_ns(broker.keeper) - before) / count
        sample = Sample(taken)
        # The last one that was to be asked for at (count - 1) / rate had its answer then:
        lasted = (count - 1) / rate + taken[-1] / 1e9
        rows += [
            plain(f"attach_offered_{rate}", count / max(lasted, count / rate), "attaches/s", n=count),
            measured(f"attach_latency_offered_{rate}", sample),
            plain(f"broker_cpu_offered_{rate}", spent / 1e3, "us per attach", n=count),
        ]
        setting.listener.progress(number)
    return rows


def _processor_ns(pid: int) -> int:
    """Return the processor time of all threads of `pid`.  Source: Documentation/scheduler/sched-stats.rst."""
    return sum(
        int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()
    )
