"""What the programs' memory comes to: enclaves once each, and everything else by its share.

/proc does not show an enclave's EPC pages as anybody's memory (the driver maps page frames, VM_PFNMAP,
which have no Rss and no Pss), and the sim's pages are a file's.  So on both backends an enclave counts
with the pages that it was built from, once, and the PSS of the processes counts without its mappings.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from teemate.errors import Unsupported

__all__ = ["Mapped", "children", "distinct", "pss_outside"]

FileId = tuple[int, int]
"""Device and inode."""

_SYS_KCMP = 312  # x86-64
_KCMP_FILE = 0


class Mapped(NamedTuple):
    """A program's enclave: its descriptor `fd` in process `pid`, that file, and the enclave's pages."""

    pid: int
    fd: int
    file: FileId
    device: bool
    """The file is a device's: others of it are the same file to stat()."""
    pages: int


def distinct(enclaves: Sequence[Mapped]) -> list[Mapped]:
    """Return each enclave once, however many programs have it.

    Those of the sim are files of their own.  Linux's driver makes one at each open() of the same device,
    so device and inode tell nothing there: whether two descriptors are of one open file, kcmp(2) knows.

    Raises
    ------
    Unsupported
        The kernel does not tell (a container that denies kcmp).

    """
    found: list[Mapped] = []
    for enclave in enclaves:
        if not any(_same(enclave, other) for other in found):
            found.append(enclave)
    return found


def _same(one: Mapped, two: Mapped) -> bool:
    if one.file != two.file:
        return False
    if not one.device:
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    fds = (ctypes.c_ulong(one.fd), ctypes.c_ulong(two.fd))
    order = libc.syscall(_SYS_KCMP, one.pid, two.pid, _KCMP_FILE, *fds)
    if order < 0:
        reason = os.strerror(ctypes.get_errno())
        raise Unsupported(f"the kernel does not tell which programs share an enclave: kcmp(): {reason}")
    return bool(order == 0)


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
