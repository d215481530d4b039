"""Proportional set sizes from /proc, without the enclaves' own memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["children", "pss_outside"]

FileId = tuple[int, int]
"""Device and inode."""


def pss_outside(pid: int, enclaves: Iterable[FileId]) -> int:
    """Return the PSS in bytes of `pid` outside the mappings of the files in `enclaves`.

    Every file of a process that maps an enclave is told by device and inode, so the tables that
    the sim keeps behind an enclave's pages do not count as the process's either.
    Source: proc(5), smaps.
    """
    skip = set(enclaves)
    total = 0
    counted = True
    with Path(f"/proc/{pid}/smaps").open() as lines:
        for line in lines:
            first, _, rest = line.partition(" ")
            if first.endswith(":"):
                if counted and first == "Pss:":
                    total += int(rest.split()[0]) * 1024
                continue
            # address perms offset major:minor inode path
            fields = rest.split(maxsplit=4)
            major, _, minor = fields[2].partition(":")
            counted = (os.makedev(int(major, 16), int(minor, 16)), int(fields[3])) not in skip
    return total


def children(pid: int) -> list[int]:
    """Return the processes that `pid` started and that still run, theirs included."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        # pid (comm) state ppid: comm may hold anything, also parentheses
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found: list[int] = []
    line = [pid]
    while line:
        parent = line.pop()
        below = [child for child, of in parents.items() if of == parent]
        found += below
        line += below
    return found
