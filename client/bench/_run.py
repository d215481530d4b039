"""The benchmarks by name, and how one is run."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from teemate.bench._attach import bench_attach
from teemate.bench._call import bench_call
from teemate.bench._churn import bench_churn
from teemate.bench._container import bench_container
from teemate.bench._db import bench_db
from teemate.bench._floor import bench_floor, hash_rate
from teemate.bench._functions import bench_functions, functions_lack
from teemate.bench._measured import Listener
from teemate.bench._memory import bench_memory
from teemate.bench._rows import Result, Row
from teemate.bench._scale import bench_scale
from teemate.bench._setting import Setting

__all__ = ["BENCHES", "Report", "run_bench"]

_SINGLE: dict[str, Callable[[Setting], Result]] = {
    "floor": bench_floor,
    "attach": bench_attach,
    "call": bench_call,
    "memory": bench_memory,
    "scale": bench_scale,
    "churn": bench_churn,
    "db": bench_db,
    "functions": bench_functions,
    "container": bench_container,
}
BENCHES = (*_SINGLE, "all")
_QUICK = ("attach", "call", "memory", "scale", "functions")
"""What has the figures with targets, besides `hash_rate`; the database's would take as long again."""
_ALL = (*_QUICK, "churn", "db", "floor")


class Report(NamedTuple):
    """A benchmark's result, with where it comes from."""

    bench: str
    backend: str
    host: dict[str, object]
    result: Result

    def as_json(self) -> dict[str, object]:
        """Return it for json.dumps."""
        return {
            "bench": self.bench,
            "backend": self.backend,
            "host": self.host,
            "rows": [row.as_json() for row in self.result.rows],
        }


def run_bench(
    name: str, listener: Listener, *, backend: str = "auto", quick: bool = False, **test: object
) -> Report:
    """Run one of :data:`BENCHES`; everything that it starts ends with it.

    `quick` measures what has targets, with fewer repetitions.  `test`: see :class:`Setting`.
    """
    host = _host()
    with tempfile.TemporaryDirectory(prefix="teemate-bench-") as folder:
        setting = Setting(Path(folder), listener, backend=backend, quick=quick, **test)  # type: ignore[arg-type]
        result = _everything(setting) if name == "all" else _SINGLE[name](setting)
        return Report(name, setting.backend, host, result)


def _everything(setting: Setting) -> Result:
    """Run all; a floor that several measured is told as it was where it was first compared with."""
    rows: dict[str, Row] = {}
    for name in _QUICK if setting.quick else _ALL:
        if name == "functions" and (lacking := functions_lack()):
            setting.listener.phase(f"functions are left out: {lacking}")
            continue
        for row in _SINGLE[name](setting).rows:
            rows.setdefault(row.figure, row)
    if setting.quick:
        rows |= {row.figure: row for row in hash_rate(setting)}
    return Result(tuple(rows.values()))


def _host() -> dict[str, object]:
    """What the figures depend on; `load` is of the minute before."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
