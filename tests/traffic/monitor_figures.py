"""What `teemate monitor` costs those who are watched: ratios of one run, the two ways by turns.

Usage: python tests/traffic/monitor_figures.py [--json] [--rounds N] [--viewers N]

While programs attach and leave as in `teemate bench attach`, in Python and in C, with and without viewers:
  attach_p50          at most 1.3 x without
  broker_cpu          of the broker's one thread, for the same messages: at most 1.1 x without
Of the broker's time the best round counts: what disturbs a round only makes it slower.  On a busy machine
run it with real-time priority (`chrt -r 1`).  Ends with status 1 when one of them is more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from teemate.bench._measured import PAUSE_US, Measured
from teemate.bench._setting import Setting

BATCH = 40
SETTLE = 0.2
"""Seconds after a batch for what is still to be sent, and for slots to be made ready again."""
BOUNDS = {"attach_p50": 1.3, "broker_cpu": 1.1}


class Quiet:
    def phase(self, text: str, total: int = 0) -> None:
        pass

    def progress(self, done: int) -> None:
        pass


@contextmanager
def viewers(socket: str, count: int) -> Iterator[None]:
    """Have `count` people look; the time until they all do is not the block's."""
    command = [sys.executable, "-c", "from teemate.cli.main import main; main()", "monitor"]
    command += ["--socket", socket]
    with ExitStack() as stack:
        started = []
        for _ in range(count):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.terminate)
            started.append(process)
        for process in started:
            assert process.stderr is not None
            assert process.stderr.readline().startswith(b"Watching")
        yield


def cpu(pid: int) -> int:
    """Nanoseconds that the broker's thread has run."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def measure(program: Measured, what: str, broker: int) -> tuple[list[int], int]:
    time.sleep(SETTLE)
    before = cpu(broker)
    times = program.ask(what, BATCH, PAUSE_US)
    time.sleep(SETTLE)
    return times, cpu(broker) - before


def main() -> int:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--viewers", type=int, default=1)
    given = arguments.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        setting = Setting(folder, Quiet())
        broker = stack.enter_context(setting.broker(setting.image()))
        programs = {"Python": stack.enter_context(setting.sharer(broker))}
        in_c = setting.c_sharer(broker)
        if in_c is not None:
            programs["C"] = stack.enter_context(in_c)
        (pid,) = broker.workers() or [broker.keeper]
        for program in programs.values():
            program.ask("warm", BATCH, PAUSE_US)
        times: dict[tuple[str, str, bool], list[int]] = {}
        spent: dict[tuple[str, str, bool], list[int]] = {}
        for number in range(given.rounds):
            for watched in (number % 2 == 0, number % 2 == 1):
                with viewers(broker.socket, given.viewers if watched else 0):
                    for name, program in programs.items():
                        for what in ("warm", "cold"):
                            took, used = measure(program, what, pid)
                            times.setdefault((name, what, watched), []).extend(took)
                            spent.setdefault((name, what, watched), []).append(used)
    rows = []
    for name, what, watched in times:
        if watched:
            continue
        for figure, found, unit, one in (("attach_p50", times, 1, median), ("broker_cpu", spent, BATCH, min)):
            without, beside = (one(found[name, what, looked]) / unit / 1000 for looked in (False, True))
            rows.append(
                {
                    "figure": figure,
                    "program": name,
                    "way": what,
                    "without_us": round(without, 1),
                    "with_us": round(beside, 1),
                    "ratio": round(beside / without, 3),
                    "bound": BOUNDS[figure],
                }
            )
    for row in rows:
        print(json.dumps(row) if given.json else "  ".join(f"{key} {value}" for key, value in row.items()))
    return int(any(row["ratio"] > row["bound"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
