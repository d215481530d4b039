"""EPC, the address window, and what the sim needs."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import NamedTuple

from teemate._sizes import about_size, format_size
from teemate.doctor._check import Check, Group, Status
from teemate.doctor._host import BrokerAnswer, Host
from teemate.doctor._processor import Processor

__all__ = ["check_epc", "check_memory", "check_window", "check_xsave"]

WINDOW_START = 0x4000_0000_0000
WINDOW_SIZE = 1 << 40
_PAGE = 4096
_LITTLE_MEMORY = 64 << 20
_NO_MEMORY = 4 << 20
_X87_SSE = 3
_UNLIMITED = 1 << 60
"""What control groups of version 1 say instead of "max" is above this."""


class _Node(NamedTuple):
    number: int
    total: int


def _nodes(host: Host) -> list[_Node]:
    folder = "/sys/devices/system/node"
    found = []
    for name in host.names(folder):
        match = re.fullmatch(r"node(\d+)", name)
        total = host.number(f"{folder}/{name}/x86/sgx_total_bytes") if match else None
        if match and total:
            found.append(_Node(int(match[1]), total))
    return sorted(found)


def _used_in_cgroup(host: Host) -> int | None:
    """Return the bytes of EPC in use, where a kernel accounts for them in the misc controller."""
    for line in (host.text("/sys/fs/cgroup/misc.current") or "").splitlines():
        fields = line.split()
        if len(fields) == 2 and fields[0] == "sgx_epc" and fields[1].isdigit():
            return int(fields[1])
    return None


def check_epc(host: Host, processor: Processor, broker: BrokerAnswer) -> Check:
    """How much EPC there is on which NUMA node, and what is known about its use."""

    def made(status: Status, found: str, advice: str = "") -> Check:
        return Check(id="epc", title="EPC", group=Group.SGX, status=status, found=found, advice=advice)

    nodes = _nodes(host)
    total = sum(node.total for node in nodes)
    if nodes:
        found = ", ".join(f"node {node.number}: {format_size(node.total)}" for node in nodes)
        if len(nodes) > 1:
            found += f"; {format_size(total)} in all"
    elif processor.epc:
        total = sum(size for _, size in processor.epc)
        found = f"{format_size(total)} (CPUID; this kernel does not say on which NUMA node)"
    elif not processor.sgx1:
        return made(Status.NOT_APPLICABLE, "no SGX1 here")
    else:
        return made(
            Status.PROBLEM,
            "none: the firmware or hypervisor has reserved no memory for enclaves",
            "give SGX memory: PRMRR size in the firmware's setup; memory-backend-epc of a virtual machine",
        )
    used = _used_in_cgroup(host)
    pages = sum(e[4] for e in broker.enclaves if e[1] == "sgx")
    if used is not None:
        found += f"; in use: {format_size(used)} (control group)"
    else:
        found += "; free: not known, Linux does not tell"
        if broker.name:
            found += f"; the broker's enclaves that you may see have {format_size(pages * _PAGE)}"
    if total and pages * _PAGE > total:
        return made(
            Status.WARNING,
            found + ", more than there is: pages are swapped in and out, which is slow",
            "give enclaves less heap, or the machine more EPC (PRMRR size in the firmware's setup)",
        )
    return made(Status.OK, found)


def check_window(host: Host) -> Check:
    """Whether the addresses that enclaves are mapped at are free in this process, and may be taken."""

    def made(status: Status, found: str, advice: str = "") -> Check:
        return Check(
            id="address-window",
            title="address window",
            group=Group.HOST,
            status=status,
            found=found,
            advice=advice,
        )

    end = WINDOW_START + WINDOW_SIZE
    window = f"{WINDOW_START:#x} to {end - 1:#x}"
    mappings = host.mappings()
    taken = [m for m in mappings or () if m.start < end and m.end > WINDOW_START]
    if taken:
        first = taken[0]
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        return made(
            Status.WARNING,
            f"{window}: {first.path or 'an anonymous mapping'} lies at {first.start:#x}{more}",
            "keep these addresses free: what is mapped there is in the way of enclaves",
        )
    limit = None
    for line in (host.text("/proc/self/limits") or "").splitlines():
        if line.startswith("Max address space"):
            soft = line.split()[3]
            limit = int(soft) if soft.isdigit() else None
    if limit is not None:
        small = limit < 1 << 30
        return made(
            Status.PROBLEM if small else Status.WARNING,
            f"{window} is free, but RLIMIT_AS is {about_size(limit)}: every enclave takes twice its size",
            "raise it (ulimit -v unlimited; LimitAS=infinity in a unit)",
        )
    if mappings is None:
        return made(Status.UNKNOWN, "/proc/self/maps cannot be read", "mount /proc")
    if host.number("/proc/sys/vm/overcommit_memory") == 2:
        commit = host.fields("/proc/meminfo")
        room = _kib(commit.get("CommitLimit")) - _kib(commit.get("Committed_AS"))
        if room < 1 << 30:
            return made(
                Status.WARNING,
                f"{window} is free, but vm.overcommit_memory is 2 and only {about_size(max(room, 0))} "
                "may still be committed",
                "sysctl vm.overcommit_memory=0, or raise vm.overcommit_ratio",
            )
    return made(Status.OK, f"{window} (1 TiB) is free here")


def _kib(text: str | None) -> int:
    number = (text or "").split()[:1]
    return int(number[0]) << 10 if number and number[0].isdigit() else 0


def check_xsave(host: Host) -> Check:
    """Whether SSA frames can hold what XSAVE saves."""
    xcr0 = host.machine.xcr0()
    good = xcr0 & _X87_SSE == _X87_SSE
    return Check(
        id="xsave",
        title="XSAVE",
        group=Group.SIM,
        status=Status.OK if good else Status.PROBLEM,
        found=f"on, XCR0 {xcr0:#x}" if good else "off: the sim saves registers with it",
        advice=""
        if good
        else "boot without noxsave; a virtual machine: a processor model with XSAVE (-cpu host)",
    )


def _cgroup_room(host: Host) -> int | None:
    """Return the bytes that this process's control group may still take, None when it has no limit."""
    rooms = []
    folders = []
    for line in (host.text("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            top = "/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup"
            # Every group above has a say; in a container the path may be another's view of it.
            folders += [f"{top}{part}" for part in (path, *map(str, PurePosixPath(path).parents))]
    for folder in folders:
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = host.number(f"{folder}/{limit_file}"), host.number(f"{folder}/{used_file}")
            if limit is not None and used is not None and limit < _UNLIMITED:
                rooms.append(max(limit - used, 0))
    return min(rooms) if rooms else None


def check_memory(host: Host) -> Check:
    """Whether there is memory for enclaves of the sim."""

    def made(status: Status, found: str, advice: str = "") -> Check:
        return Check(id="memory", title="memory", group=Group.SIM, status=status, found=found, advice=advice)

    available = host.fields("/proc/meminfo").get("MemAvailable")
    if available is None:
        return made(Status.UNKNOWN, "/proc/meminfo does not say")
    room, who = _kib(available), "the machine"
    group = _cgroup_room(host)
    if group is not None and group < room:
        room, who = group, "this control group"
    found = f"{about_size(room)} available to {who}"
    if room >= _LITTLE_MEMORY:
        return made(Status.OK, found)
    return made(
        Status.PROBLEM if room < _NO_MEMORY else Status.WARNING,
        f"{found}: the vault alone has 65 MiB as shipped",
        "raise the control group's memory.max" if group is not None and room == group else "free memory",
    )
