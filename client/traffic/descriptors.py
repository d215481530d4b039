"""What a descriptor is, found out without asking who serves it.

`fstat` of a file on a hung FUSE mount does not return, and a client may send such a file.  What is read
here the kernel answers by itself.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache

from teemate.traffic.description import Fd

__all__ = ["describe_fd", "describe_own"]

_KINDS = (
    (re.compile(r"/memfd:(.*?)(?: \(deleted\))?"), "memfd"),
    (re.compile(r"socket:\[()\d+\]"), "socket"),
    (re.compile(r"pipe:\[()\d+\]"), "pipe"),
    (re.compile(r"anon_inode:\[?(.*?)\]?"), "anonymous"),
    (re.compile(r"(/dev/.*)"), "device"),
    (re.compile(r"(/.*)"), "file"),
)
_LONGEST_NAME = 200
"""Characters; a path can have 4095, all of which somebody else has chosen."""
_INODE = re.compile(rb"^ino:\s*(\d+)$", re.MULTILINE)


def describe_fd(fd: int) -> Fd:
    """Return what an open descriptor is; as much as the kernel tells (the inode from Linux 5.14 on)."""
    try:
        link = os.fsencode(os.readlink(f"/proc/self/fd/{fd}")).decode("utf-8", "backslashreplace")
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            inode = _INODE.search(file.read(4096))
    except OSError as error:  # no /proc, or no descriptor left to read it with
        return Fd("unknown", error.strerror or "", None)
    kind, name = "other", link
    for pattern, known in _KINDS:
        found = pattern.fullmatch(link)
        if found is not None:
            kind, name = known, found.group(1)
            break
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 1]}…"
    return Fd(kind, name, int(inode.group(1)) if inode else None)


@lru_cache(maxsize=1024)
def _described(fd: int, _device: int, _inode: int) -> Fd:
    return describe_fd(fd)


def describe_own(fd: int) -> Fd:
    """Return the same of a descriptor that this process has made; it is not looked at each time."""
    status = os.fstat(fd)
    return _described(fd, status.st_dev, status.st_ino)
