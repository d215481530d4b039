"""Which control group a process is in, and how much of that its user could have chosen itself.

A host may have the unified hierarchy (``0::/path``), the old ones (``4:memory:/path``) or both.
The policy reads one of them, fixed for all clients: by name in ``cgroup_hierarchy``, or chosen
at start ("auto"): the unified one, unless systemd still keeps its units in ``name=systemd``.

A directory of that tree that somebody other than root may write is *delegated*: that user
can make groups below it and move processes between them, so from there on a path is what the
user says, not what root says.  :meth:`CgroupTree.trusted` cuts it off there.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from functools import lru_cache
from typing import final

__all__ = ["CgroupTree", "find_tree", "glob_to_regex"]

UNIFIED = ""
"""The controllers' field of the unified hierarchy in /proc/PID/cgroup."""


@lru_cache(maxsize=1024)
def glob_to_regex(glob: str) -> re.Pattern[str]:
    """Return the anchored expression for `glob`.

    ``*`` and ``?`` never match a slash; a last component ``**`` means the group itself and
    everything below it.

    Raises
    ------
    ValueError
        The glob does not start at the root, or has ``**`` anywhere but at its end.

    """
    if not glob.startswith("/"):
        raise ValueError("a cgroup pattern starts with / : it is anchored at the root")
    below = glob.endswith("/**")
    body = glob.removesuffix("/**") if below else glob
    if "**" in body:
        raise ValueError("** may stand only as the last component of a cgroup pattern")
    pieces = {"*": "[^/]*", "?": "[^/]"}
    text = "".join(pieces.get(char) or re.escape(char) for char in body)
    return re.compile(f"{text}(?:/.*)?" if below else text, re.DOTALL)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupTree:
    """One hierarchy: its name in /proc/PID/cgroup and where it is mounted (empty: nowhere)."""

    hierarchy: str
    mount: str

    def path_of(self, membership: bytes) -> str:
        """Return the path that /proc/PID/cgroup has for this hierarchy, empty when it has none."""
        # Only a newline ends a line: a group's name may hold form feeds and the like, where
        # str.splitlines() would let its user begin a line of his own.
        for line in membership.decode("utf-8", "surrogateescape").split("\n"):
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if controllers == self.hierarchy or (self.hierarchy and self.hierarchy in controllers.split(",")):
                # "/.." outside of our namespace, " (deleted)": neither names a group here.
                return "" if path.startswith("/..") or path.endswith(" (deleted)") else path
        return ""

    def trusted(self, path: str) -> str | None:
        """Return `path` up to the first delegated group, that one included.

        None when the tree cannot be looked at: then no rule about cgroups matches.
        """
        if not path or not self.mount:
            return None
        if path == "/":
            return path
        known = ""
        for component in path.strip("/").split("/"):
            known = f"{known}/{component}"
            try:
                writable = _writable_by_users(self.mount + known)
            except OSError:
                return None
            if writable:
                break
        return known

    def matches(self, globs: tuple[str, ...], path: str) -> bool:
        """Whether one of `globs` matches what can be believed of `path`."""
        trusted = self.trusted(path)
        return trusted is not None and any(glob_to_regex(glob).fullmatch(trusted) for glob in globs)


def _writable_by_users(directory: str) -> bool:
    """Whether someone but root may make groups in `directory` or move processes into it."""
    for path in (directory, f"{directory}/cgroup.procs"):
        found = os.stat(path, follow_symlinks=False)
        mode = found.st_mode
        if (
            (found.st_uid != 0 and mode & stat.S_IWUSR)
            or (found.st_gid != 0 and mode & stat.S_IWGRP)
            or mode & stat.S_IWOTH
        ):
            return True
    return False


def find_tree(hierarchy: str = "auto", mountinfo: str | None = None) -> CgroupTree:
    """Return the hierarchy that the policy names, or the one that "auto" means on this host."""
    if mountinfo is None:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            mountinfo = file.read()
    mounts: dict[str, str] = {}
    for line in mountinfo.split("\n"):
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        # Only a mount of the hierarchy's root shows the paths that /proc/PID/cgroup has.
        if len(fields) < 5 or len(kind) < 3 or fields[3] != "/":
            continue
        if kind[0] == "cgroup2":
            mounts.setdefault(UNIFIED, fields[4])
        elif kind[0] == "cgroup":
            for option in kind[2].split(","):
                mounts.setdefault(option, fields[4])
    if hierarchy == "auto":
        hierarchy = "name=systemd" if "name=systemd" in mounts else UNIFIED
    elif hierarchy == "unified":
        hierarchy = UNIFIED
    return CgroupTree(hierarchy=hierarchy, mount=mounts.get(hierarchy, ""))
