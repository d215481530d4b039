"""``memory``: what clients cost together, in one shared enclave and in one each.

As in the demonstration, an enclave counts once, with its pages, and processes count with what they have
outside of it (``demo/_memory.py`` says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from teemate.bench._measured import Measured
from teemate.bench._rows import Result, Row, Series, plain
from teemate.bench._setting import MIB, Setting
from teemate.demo._memory import Mapped, children, distinct, pss_outside

__all__ = ["bench_memory", "memory_of"]

_CLIENTS = (1, 2, 4, 8, 16, 32, 64)
_AT = 16
"""Clients of the ratios that have targets."""
_PAGE = 4096


class _Step(NamedTuple):
    """So many clients: pages of their enclaves, bytes of everything."""

    clients: int
    pages: int
    total: int
    broker: int
    warden: int


def bench_memory(setting: Setting) -> Result:
    """Let clients come, and look at memory when they are 1, 2, 4, ..."""
    image = setting.image(slots=_CLIENTS[-1])
    at = setting.times(_AT, _AT)
    steps = (1, at) if setting.quick else _CLIENTS
    with setting.broker(image, clients=steps[-1]) as broker, ExitStack() as stack:
        programs = [setting.sharer(broker) for _ in range(steps[-1])]
        shared = _grow(setting, stack, programs, steps, "sharing one", broker.keeper)
    # Half of what is free, so that looking at memory does not push others out of theirs.
    room = _available() // 2 // (image.pages * _PAGE + 16 * MIB)
    fitting = [clients for clients in steps if clients <= room]
    if fitting != list(steps):
        setting.listener.phase(
            f"one enclave each only for up to {fitting[-1:]} clients: memory has room for {room}"
        )
    with ExitStack() as stack:
        programs = [setting.builder(image) for _ in range(fitting[-1])] if fitting else []
        private = _grow(setting, stack, programs, fitting, "one enclave each", None)
    return Result(
        tuple(_rows(shared, private, at)),
        (
            Series("one enclave each", tuple((step.clients, step.total / MIB) for step in private)),
            Series("one shared enclave", tuple((step.clients, step.total / MIB) for step in shared)),
        ),
    )


def _grow(
    setting: Setting,
    stack: ExitStack,
    programs: Sequence[Measured],
    steps: Sequence[int],
    how: str,
    broker: int | None,
) -> list[_Step]:
    setting.listener.phase(f"memory: {how}", len(programs))
    for program in programs:  # all start at once
        stack.push(program.__exit__)
    for program in programs:
        program.ready()
    found: list[_Step] = []
    enclaves: list[Mapped] = []
    for number, program in enumerate(programs, 1):
        program.ask("hold")
        setting.listener.progress(number)
        if number in steps:
            for one in programs[len(enclaves) : number]:
                pages, fd, device, inode, is_device = one.ask("pages")
                enclaves.append(Mapped(one.pid, fd, (device, inode), bool(is_device), pages))
            found.append(_look(enclaves, broker))
    return found


def _look(enclaves: Sequence[Mapped], broker: int | None) -> _Step:
    pages = sum(enclave.pages for enclave in distinct(enclaves))
    service = [] if broker is None else [broker, *children(broker)]
    files = {enclave.file for enclave in enclaves}
    outside = sum(pss_outside(pid, files) for pid in [*(enclave.pid for enclave in enclaves), *service])
    return _Step(
        len(enclaves),
        pages,
        outside + pages * _PAGE,
        memory_of(broker) if broker is not None else 0,
        sum(memory_of(pid) for pid in service[1:]),
    )


def memory_of(pid: int) -> int:
    """Return the resident memory in bytes of `pid` that is no file's: what it allocated, and shared memory.

    Source: proc(5), status.
    """
    total = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "RssAnon":
            total += int(value.split()[0]) * 1024
    return total


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _rows(shared: Sequence[_Step], private: Sequence[_Step], at: int) -> list[Row]:
    rows = []
    for step in shared:
        rows += [
            plain(f"epc_shared_{step.clients}", step.pages, "pages"),
            plain(f"memory_shared_{step.clients}", step.total / MIB, "MiB"),
        ]
    for step in private:
        rows += [
            plain(f"epc_conventional_{step.clients}", step.pages, "pages"),
            plain(f"memory_conventional_{step.clients}", step.total / MIB, "MiB"),
        ]
    first, last = shared[0], shared[-1]
    added = last.clients - first.clients
    rows += [
        plain("memory_broker", last.broker / MIB, "MiB"),
        plain("memory_wardens", last.warden / MIB, "MiB"),
        plain("memory_per_added_client", (last.total - first.total) / added / 1024, "KiB"),
        plain("broker_memory_per_added_client", (last.broker - first.broker) / added / 1024, "KiB"),
    ]
    if len(private) > 1:
        grown = private[-1].total - private[0].total
        rows.append(
            plain(
                "memory_conventional_per_added_client",
                grown / (private[-1].clients - private[0].clients) / 1024,
                "KiB",
            )
        )
    ours = {step.clients: step for step in shared}
    theirs = {step.clients: step for step in private}
    if at in ours and at in theirs:
        epc = theirs[at].pages / ours[at].pages
        everything = theirs[at].total / ours[at].total
        rows += [
            plain("epc_ratio", epc, "times", relative_to=f"epc_shared_{at}", ratio=epc),
            plain("pss_ratio", everything, "times", relative_to=f"memory_shared_{at}", ratio=everything),
        ]
    return rows
