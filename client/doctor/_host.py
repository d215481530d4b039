"""The host as the checks see it: files below a root, and what only the machine itself answers.

Tests give another root and another machine; so each check can be shown every way a host can be
wrong without such a host.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, final

__all__ = ["BrokerAnswer", "Choice", "DeviceTrial", "Host", "Machine", "Mapping", "ProbeResult", "Unit"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What libteemate makes of a backend's name: None when it cannot be had, with the reason."""

    backend: str | None
    reason: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTrial:
    """How opening a device and mapping a page of it for execution went: errnos, 0 for success."""

    open_errno: int = 0
    map_errno: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Whether a tiny enclave could be created, mapped, entered and left; else the error's text."""

    works: bool
    text: str
    """What failed, or how long it took."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerAnswer:
    """What the socket gave: an errno of connect(), or a complaint, or what the broker said."""

    errno: int = 0
    complaint: str = ""
    name: str = ""
    version: int = 0
    backend: str = ""
    wanted: str = ""
    enclaves: tuple[tuple[str, str, int, int, int], ...] = ()
    """Name, backend, base, size (bytes) and pages of those that this user may see."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A unit of the service manager, as it tells."""

    load: str
    active: str
    sub: str
    result: str
    file_state: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """A line of /proc/PID/maps."""

    start: int
    end: int
    path: str


class Machine(Protocol):
    """What files do not tell."""

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int] | None:
        """Return eax, ebx, ecx and edx; None when there is no such leaf."""

    def xcr0(self) -> int:
        """Return the components that XSAVE saves; 0 when it is off."""

    def vdso_enters(self) -> bool:
        """Whether the vDSO has ``__vdso_sgx_enter_enclave``."""

    def choose(self, wanted: str) -> Choice:
        """Return what libteemate takes for `wanted`."""

    def try_device(self, path: Path) -> DeviceTrial:
        """Open a device and map a page of it for execution."""

    def try_open(self, path: Path) -> int:
        """Open a device for reading and writing; the errno, or 0."""

    def identity(self) -> tuple[int, tuple[int, ...]]:
        """Return the effective uid, and the gids of this process."""

    def probe(self, backends: Sequence[str]) -> dict[str, ProbeResult]:
        """Run a tiny enclave on each backend."""

    def ask_broker(self, path: str) -> BrokerAnswer:
        """Say hello at a socket, and ask for the enclaves; bounded in time."""

    def unit(self, name: str) -> Unit | None:
        """Ask the service manager; None when it does not answer."""


@final
@dataclass(frozen=True, slots=True)
class Host:
    """Files below `root`, and the machine."""

    machine: Machine
    root: Path = field(default=Path("/"))
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def path(self, name: str) -> Path:
        """Return where `name`, an absolute path on the host, is."""
        return self.root / name.lstrip("/")

    def text(self, name: str, limit: int = 1 << 20) -> str | None:
        """Return a file's text; None when it is not there or may not be read."""
        try:
            with self.path(name).open("rb") as file:
                return file.read(limit).decode(errors="replace")
        except OSError:
            return None

    def line(self, name: str) -> str | None:
        """Return a file's text without white space around it."""
        text = self.text(name)
        return None if text is None else text.strip()

    def number(self, name: str) -> int | None:
        """Return a file's number; None also when it holds none ("max")."""
        try:
            return int(self.line(name) or "")
        except ValueError:
            return None

    def exists(self, name: str) -> bool:
        """Whether the path is there, as far as this process may know."""
        try:
            self.path(name).lstat()
        except OSError:
            return False
        return True

    def stat(self, name: str) -> os.stat_result | int:
        """Return the stat of what `name` is or leads to, or the errno."""
        try:
            return self.path(name).stat()
        except OSError as error:
            return error.errno or errno.EIO

    def names(self, folder: str) -> list[str]:
        """Return what lies in a folder, sorted; nothing when it cannot be read."""
        try:
            return sorted(os.listdir(self.path(folder)))
        except OSError:
            return []

    def fields(self, name: str) -> dict[str, str]:
        """Return the ``key: value`` lines of a file; the first counts."""
        found: dict[str, str] = {}
        for line in (self.text(name) or "").splitlines():
            key, colon, value = line.partition(":")
            if colon:
                found.setdefault(key.strip(), value.strip())
        return found

    def mappings(self, pid: str = "self") -> list[Mapping] | None:
        """Return what a process has mapped; None when that may not be read."""
        try:
            text = self.path(f"/proc/{pid}/maps").read_text(errors="replace")
        except ProcessLookupError:
            return []  # it has ended and waits to be reaped
        except OSError:
            return None
        return list(_parse_maps(text))

    def group_name(self, gid: int) -> str:
        """Return a group's name, or its number."""
        for line in (self.text("/etc/group") or "").splitlines():
            fields = line.split(":")
            if len(fields) > 2 and fields[2] == str(gid):
                return fields[0]
        return str(gid)

    def mode(self, what: os.stat_result) -> str:
        """Say whose a file is, and who may use it."""
        mode = stat.S_IMODE(what.st_mode)
        return f"mode {mode:04o}, owner {what.st_uid}, group {self.group_name(what.st_gid)}"

    def kernel_log(self, word: str) -> list[str] | None:
        """Return the kernel's messages that hold `word`, without their time; None: may not be read."""
        try:
            fd = os.open(self.path("/dev/kmsg"), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        found: list[str] = []
        try:
            for _ in range(50_000):  # more than a log holds: one that grows while we read ends as well
                try:
                    record = os.read(fd, 8192)
                except BrokenPipeError:
                    continue  # overwritten while we read: the next record is there
                except OSError:  # EAGAIN: the end; EPERM: dmesg_restrict
                    break
                if not record:
                    break
                for line in record.decode(errors="replace").splitlines():
                    head, semicolon, message = line.partition(";")
                    if semicolon and word in message and head[:1].isdigit():
                        found.append(message)
        finally:
            os.close(fd)
        return found


def _parse_maps(text: str) -> Iterator[Mapping]:
    for line in text.splitlines():
        fields = line.split(None, 5)
        start, dash, end = fields[0].partition("-") if fields else ("", "", "")
        if dash:
            path = fields[5] if len(fields) > 5 else ""
            yield Mapping(start=int(start, 16), end=int(end, 16), path=path)
