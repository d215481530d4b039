"""What files this process has open."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

__all__ = ["descriptors"]


def descriptors(path: Path) -> dict[int, int]:
    """This process's descriptors of a file, with their access modes."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if Path(f"/proc/self/fd/{name}").readlink() == path:
                found[int(name)] = fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE
    return found
