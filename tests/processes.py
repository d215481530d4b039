"""What tests see of other processes, and how they wait for it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from backends import PATIENCE

DEADLINE = 60.0 * PATIENCE
"""Seconds after which what has to come does not."""
_STATE, _USER_TICKS = 0, 11


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on, proc(5); empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()


def cpu_ticks(pid: int) -> int:
    """Hundredths of a second that the process has computed."""
    return int(_stat(pid)[_USER_TICKS])


def wait_for_cpu(pid: int, ticks: int = 10) -> None:
    """Return when it has computed for so long: a loop that is all it still has to do has begun by then."""
    begin = cpu_ticks(pid)
    while cpu_ticks(pid) < begin + ticks:
        os.sched_yield()


def has_ended(pid: int) -> bool:
    """Whether it is no more, or waits only for its parent to hear of its end."""
    stat = _stat(pid)
    return not stat or stat[_STATE] in "ZX"


def wait_for_end(pids: Iterable[int]) -> None:
    """Return when all of them have ended."""
    left, deadline = list(pids), time.monotonic() + DEADLINE
    while left := [pid for pid in left if not has_ended(pid)]:
        assert time.monotonic() < deadline, f"processes {left} do not end"
        time.sleep(0.001)


def wait_for_stop(pid: int) -> None:
    """Return when SIGSTOP has stopped all of its threads."""
    wait_until(
        lambda: all(
            task.read_text().rpartition(")")[2].split()[_STATE] == "T"
            for task in Path(f"/proc/{pid}/task").glob("*/stat")
        ),
        f"{pid} is stopped",
    )


def end(process: subprocess.Popen[str]) -> int:
    """Close the standard input of a program that ends by that; returns its status."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        return process.wait(DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    finally:
        process.stdout.close()


@contextlib.contextmanager
def repeatedly(action: Callable[[], object]) -> Iterator[None]:
    """Do it every hundredth of a second, from another thread: what it is for may not have begun yet."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.01):
            action()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def descriptors(pid: int) -> dict[Path, str]:
    """What the process has open, by its place in /proc; without what it closes meanwhile."""
    found = {}
    for place in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[place] = os.readlink(place)
    return found


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return when the condition holds; `what` says what it is."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not so within {DEADLINE:g} s: {what}"
        time.sleep(0.001)
