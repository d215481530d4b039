"""Whether this is a container, and what that may forbid."""

from __future__ import annotations

import re

from teemate.doctor._check import Check, Group, Status
from teemate.doctor._host import Host

__all__ = ["check_container", "container_signs"]

_CGROUP = re.compile(r"/(docker|kubepods|lxc|libpod|machine\.slice/libpod|crio|containerd)")
_ENGINES = {
    "/.dockerenv": "Docker",
    "/run/.containerenv": "Podman",
    "/run/secrets/kubernetes.io": "Kubernetes",
}


def container_signs(host: Host) -> list[str]:
    """Return what says that this is a container; nothing says that it is none."""
    signs = [f"{name} ({path})" for path, name in _ENGINES.items() if host.exists(path)]
    manager = host.line("/run/systemd/container")
    if manager:
        signs.append(f"{manager} (/run/systemd/container)")
    for word in (host.text("/proc/1/environ") or "").split("\0"):
        if word.startswith("container=") and len(word) > 10:
            signs.append(f"{word[10:]} (environment of process 1)")
    if _CGROUP.search(host.text("/proc/self/cgroup") or ""):
        signs.append("its control group (/proc/self/cgroup)")
    return signs


def check_container(host: Host) -> Check:
    """Say whether this is a container, and which filters this process is under."""
    signs = container_signs(host)
    status = host.fields("/proc/self/status")
    filters = status.get("Seccomp") == "2"
    found = f"inside one: {', '.join(signs)}" if signs else "no sign of one"
    if filters:
        found += "; a seccomp filter is on"
    advice = ""
    if signs:
        advice = (
            "a program that only attaches needs the broker's socket: mount its folder "
            "(-v /run/teemate:/run/teemate), no device, no group; only a broker needs "
            "--device /dev/sgx_enclave"
        )
    return Check(
        id="container", title="container", group=Group.HOST, status=Status.OK, found=found, advice=advice
    )
