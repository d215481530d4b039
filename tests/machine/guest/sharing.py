"""Enclaves of the raw image on Linux's driver, for the tests of sharing: below the Python API, and beside it.

`Raw` holds one enclave through the C library.  `Stranger` is another program, started by exec, that gets the
enclave's descriptor in a message and does what it is told, one step at a time (stranger.py).  `Driver` is the
bare device: what mmap and the ioctls of the driver answer when nobody is careful.
"""

from __future__ import annotations

import array
import ctypes
import errno
import json
import os
import select
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from images import BuiltImage

from teemate._faults import native_error
from teemate._native import ffi, lib

PAGE = 4096
DEVICE = Path("/dev/sgx_enclave")
DEADLINE = 60.0
"""Seconds after which a stranger that does not answer has failed."""

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED = 1, 2, 0x10
EENTER, ERESUME, EEXIT = 2, 3, 4
REG, TCS = 2, 1
_ATTRIBUTE_DEBUG = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


class Operation:
    """What native/enclaves/raw/raw.S does with RSI and RDX."""

    LOAD = 1
    STORE = 2
    LOOP = 5
    UNTIL = 6
    COUNT = 9


@dataclass(frozen=True)
class Segment:
    """A run of pages of one type, at `offset` from the base."""

    offset: int
    size: int
    prot: int
    type: int


@dataclass(frozen=True)
class Geometry:
    """What somebody has to know to open an enclave that somebody else built."""

    backend: int
    base: int
    size: int
    segments: tuple[Segment, ...]

    @property
    def tcs(self) -> list[int]:
        """Offsets of the TCS pages."""
        return [
            part.offset + at for part in self.segments if part.type == TCS for at in range(0, part.size, PAGE)
        ]

    def part(self, prot: int) -> Segment:
        """The largest segment of regular pages with these permissions."""
        return max(
            (part for part in self.segments if part.type == REG and part.prot == prot),
            key=lambda part: part.size,
        )

    def to_json(self) -> dict[str, Any]:
        """For a stranger."""
        rows = [[part.offset, part.size, part.prot, part.type] for part in self.segments]
        return {"backend": self.backend, "base": self.base, "size": self.size, "segments": rows}

    @classmethod
    def from_json(cls, order: dict[str, Any]) -> Geometry:
        """What `to_json` gave."""
        parts = tuple(Segment(*row) for row in order["segments"])
        return cls(order["backend"], order["base"], order["size"], parts)


@dataclass(frozen=True)
class Left:
    """How an entry ended."""

    function: int
    vector: int
    error: int
    rdi: int


def _check(result: int, diag: Any, doing: str) -> None:
    if result < 0:
        raise native_error(result, diag, doing)


class Raw:
    """An enclave through the C library; what fails raises the error of the Python API."""

    def __init__(self, native: Any, geometry: Geometry, image: BuiltImage | None = None) -> None:
        self.native = native
        self.geometry = geometry
        self.image = image

    @classmethod
    def create(cls, image: BuiltImage, *, debug: bool = False, backend: int = lib.TEEMATE_SGX) -> Self:
        """Build one; it is not mapped yet."""
        handle, diag = ffi.new("struct teemate_enclave **"), ffi.new("struct teemate_diag *")
        fd = os.open(image.sgxs, os.O_RDONLY | os.O_CLOEXEC)
        try:
            signature = image.sigstruct.read_bytes()
            attributes = _ATTRIBUTE_DEBUG if debug else 0
            _check(lib.teemate_create(backend, 0, attributes, fd, signature, handle, diag), diag, "create")
        finally:
            os.close(fd)
        info = ffi.new("struct teemate_enclave_info *")
        _check(lib.teemate_enclave_describe(handle[0], info), None, "describe")
        found = ffi.new("struct teemate_segment[]", 128)
        count = lib.teemate_enclave_segments(handle[0], found, 128)
        parts = tuple(Segment(part.offset, part.size, part.prot, part.type) for part in found[0:count])
        return cls(handle[0], Geometry(backend, info.base, info.size, parts), image)

    def create_twin(self) -> Raw:
        """Build another enclave of the same image."""
        assert self.image is not None
        return Raw.create(self.image)

    @classmethod
    def open(cls, fd: int, geometry: Geometry) -> Self:
        """Take over the descriptor of one that somebody else built; it is not mapped yet."""
        handle, diag = ffi.new("struct teemate_enclave **"), ffi.new("struct teemate_diag *")
        parts = ffi.new("struct teemate_segment[]", len(geometry.segments))
        for part, segment in zip(parts, geometry.segments, strict=True):
            part.offset, part.size, part.prot, part.type = (
                segment.offset, segment.size, segment.prot, segment.type,
            )  # fmt: skip
        error = lib.teemate_open(
            geometry.backend, fd, geometry.base, geometry.size, parts, len(geometry.segments), handle, diag
        )
        _check(error, diag, "open")
        return cls(handle[0], geometry)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap it and close its descriptor."""
        if self.native is not None:
            lib.teemate_close(self.native)
            self.native = None

    @property
    def fd(self) -> int:
        """The enclave's descriptor; it stays the enclave's."""
        return int(lib.teemate_enclave_fd(self.native))

    def map(self, *, tcs: bool = True) -> Self:
        """Map everything, the TCSs as well unless told otherwise."""
        diag = ffi.new("struct teemate_diag *")
        _check(lib.teemate_map(self.native, diag), diag, "map")
        for offset in self.geometry.tcs if tcs else []:
            _check(lib.teemate_map_tcs(self.native, offset, diag), diag, "map a TCS")
        return self

    def enter(self, operation: int, rsi: int = 0, rdx: int = 0, *, tcs: int = 0) -> Left:
        """Enter through the TCS of this number and stay until the enclave leaves."""
        regs, run = ffi.new("struct teemate_regs *"), ffi.new("struct sgx_enclave_run *")
        regs.rdi, regs.rsi, regs.rdx = operation, rsi, rdx
        function = EENTER
        while True:
            error = lib.teemate_enter(self.native, self.geometry.tcs[tcs], regs, function, 0, run)
            if error != lib.TEEMATE_PAUSED:
                break
            function = run.function
        _check(error, None, "enter")
        assert error == lib.TEEMATE_LEFT
        return Left(run.function, run.exception_vector, run.exception_error_code, regs.rdi)

    def call(self, operation: int, rsi: int = 0, rdx: int = 0, *, tcs: int = 0) -> int:
        """Enter, and return RDI after a regular EEXIT."""
        left = self.enter(operation, rsi, rdx, tcs=tcs)
        assert left.function == EEXIT, left
        return left.rdi


class Stranger:
    """Another program with the enclave's descriptor; an error there is raised here by its name."""

    def __init__(self, raw: Raw | None = None, *, launcher: tuple[str, ...] = ()) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            program = [sys.executable, str(Path(__file__).with_name("stranger.py")), str(theirs.fileno())]
            self.process = subprocess.Popen([*launcher, *program], pass_fds=[theirs.fileno()])
        self._socket = ours
        ours.settimeout(DEADLINE)
        if raw is not None:
            self.give(raw)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        try:
            self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def give(self, raw: Raw, *, wait: bool = True) -> None:
        """Send it the enclave's descriptor; it opens and maps the enclave."""
        message = json.dumps({"do": "open", "geometry": raw.geometry.to_json()}).encode()
        socket.send_fds(self._socket, [message], [raw.fd])
        if wait:
            self.answer()

    def start(self, do: str, **arguments: Any) -> None:
        """Tell it what to do next, and do not wait."""
        self._socket.send(json.dumps({"do": do, **arguments}).encode())

    def answer(self) -> Any:
        """Wait for what it says."""
        data, fds, _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
        assert data, "the stranger ended"
        answer = json.loads(data)
        if "error" in answer:
            raise StrangerError(answer["error"], answer["message"])
        if fds:
            return Raw.open(fds[0], Geometry.from_json(answer["geometry"]))  # not mapped here yet
        return answer["result"]

    def device(self) -> int:
        """A descriptor of the device that it opens; the caller owns it."""
        self.start("device")
        _, (fd,), _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
        return fd

    def answered(self) -> bool:
        """Whether it has said something already."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def do(self, do: str, **arguments: Any) -> Any:
        """Tell it, and wait."""
        self.start(do, **arguments)
        return self.answer()

    def call(self, operation: int, rsi: int = 0, rdx: int = 0, *, tcs: int = 0) -> int:
        """Let it enter."""
        return int(self.do("call", operation=operation, rsi=rsi, rdx=rdx, tcs=tcs))

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait(DEADLINE)


class StrangerError(Exception):
    """What a stranger could not do; ``name`` is the type of its error."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


# ---- the bare driver -------------------------------------------------------------------------


def map_bare(fd: int, address: int, size: int, prot: int, flags: int = MAP_SHARED) -> int:
    """Call mmap as it is; returns 0 and unmaps again, or the errno."""
    fixed = MAP_FIXED if address else 0
    place = _libc.mmap(address, size, prot, flags | fixed, fd, 0)
    if place in (None, ctypes.c_void_p(-1).value):
        return ctypes.get_errno()
    _libc.munmap(place, size)
    return 0


def keep_mapped(fd: int, address: int, size: int, prot: int) -> None:
    """Map, and leave it there."""
    place = _libc.mmap(address, size, prot, MAP_SHARED | MAP_FIXED, fd, 0)
    if place != address:
        raise OSError(ctypes.get_errno(), "mmap")


def protect(address: int, size: int, prot: int) -> int:
    """Call mprotect as it is; returns 0 or the errno."""
    return ctypes.get_errno() if _libc.mprotect(address, size, prot) else 0


RESTRICT = 0xC028A405
"""SGX_IOC_ENCLAVE_RESTRICT_PERMISSIONS: offset, length, permissions, result, count."""


def restrict(fd: int, offset: int, length: int, permissions: int) -> tuple[int, int]:
    """One ioctl: its errno (0: done) and the bytes that were done."""
    request = ctypes.create_string_buffer(struct.pack("<5Q", offset, length, permissions, 0, 0), 40)
    error = ctypes.get_errno() if _libc.ioctl(fd, RESTRICT, request) else 0
    return error, struct.unpack("<5Q", request.raw)[4]


def maps(pid: int | str = "self") -> list[tuple[int, int, str, str]]:
    """Start, end, permissions and name of a process's mappings."""
    rows = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in words[0].split("-"))
        rows.append((start, end, words[1], words[5] if len(words) > 5 else ""))
    return rows


def touch(address: int, size: int) -> None:
    """Read a byte of every page from outside: that gives all ones, and brings the page in."""
    for at in range(address, address + size, PAGE):
        ctypes.string_at(at, 1)


def swapped() -> int:
    """Bytes of shared memory in this machine: evicted EPC pages lie there, and little else."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split(":")
        if name == "Shmem":
            return int(value.split()[0]) * 1024
    raise OSError(errno.ENODATA, "no Shmem in /proc/meminfo")


def epc_size() -> int:
    """Bytes of EPC that the kernel has."""
    nodes = Path("/sys/devices/system/node").glob("node*/x86/sgx_total_bytes")
    return sum(int(node.read_text()) for node in nodes)


def word_in_memory(value: int = 0) -> tuple[Any, int]:
    """A word of this process that a thread inside an enclave can wait for: its holder, and its address."""
    holder = array.array("Q", [value])
    return holder, holder.buffer_info()[0]
