"""Processes of other users, for tests that measure what one costs another: as root alone."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any


def child(work: Callable[[], dict[str, Any]], uid: int) -> tuple[int, int]:
    """Run `work` in a process of the user; returns its pid, and where its result can be read."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return pid, ours
    try:
        os.close(ours)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        with os.fdopen(theirs, "w") as out:
            json.dump(work(), out)
    except BaseException as failure:
        print(f"user {uid}: {failure!r}", file=sys.stderr)
    finally:
        os._exit(0)


def together(running: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """What each has to say, when all have ended; of one that said nothing, nothing."""
    results = []
    for pid, out in running:
        with os.fdopen(out) as file:
            text = file.read()
        os.waitpid(pid, 0)
        results.append(json.loads(text) if text else {})
    return results


def cpu_time() -> float:
    """Seconds that this process has had of the processors."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def burner(cpu: float, seconds: float) -> dict[str, Any]:
    """Burn so much CPU time, evenly over the time."""
    signal.alarm(int(seconds) + 20)
    started, before = time.monotonic(), cpu_time()
    while (elapsed := time.monotonic() - started) < seconds:
        if cpu_time() - before < cpu * elapsed / seconds:
            for _ in range(2000):
                pass
        else:
            time.sleep(0.0005)
    return {"cpu": cpu_time() - before}


def p99(times: list[float]) -> float:
    """Of fewer than 100 their maximum."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] if ordered else float("inf")
