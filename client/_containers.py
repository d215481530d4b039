"""Short names of control groups, for people: of a container its runtime and the beginning of its id."""

from __future__ import annotations

import re

__all__ = ["container_name"]

_ID = re.compile(r"(?:([A-Za-z][A-Za-z-]*?)-)?([0-9a-f]{64})(?:\.scope)?")
_UNIT = re.compile(r"[^/]+\.(?:service|scope)")


def container_name(cgroup: str) -> str:
    """Return a name for the processes of `cgroup`, a path; empty when it says nothing.

    The innermost container (docker, podman, containerd, CRI-O, with either of their drivers), else the
    innermost unit of systemd, else the last component.
    """
    parts = [part for part in cgroup.split("/") if part]
    for at in range(len(parts) - 1, -1, -1):
        found = _ID.fullmatch(parts[at])
        if found is not None:
            runtime = found[1] or (parts[at - 1] if at else "container")
            return f"{runtime}-{found[2][:12]}"
    for part in reversed(parts):
        if _UNIT.fullmatch(part):
            return part
    return parts[-1] if parts else ""
