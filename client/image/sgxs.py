"""SGXS streams: write them, and read them record by record.

The format is Fortanix's (rust-sgx, doc/SGXS.md), in its canonical form: 64-byte records,
little endian, pages in ascending order.  EEXTEND and UNMEASRD are followed by the 256 bytes
that they are about; what UNMEASRD brings is loaded and not measured.  MRENCLAVE is
the SHA-256 of everything else (SDM volume 3D, ECREATE, EADD, EEXTEND: what they feed to the
measurement has the shape of these records).

Both directions work in constant memory: an image may be larger than the machine.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from typing import BinaryIO

from ._problem import problem

__all__ = [
    "CHUNK",
    "PAGE",
    "PT_REG",
    "PT_TCS",
    "Add",
    "Create",
    "Extend",
    "PageFlags",
    "Record",
    "Unmeasured",
    "Writer",
    "measure",
    "read",
]

PAGE = 4096
CHUNK = 256
RECORD = 64

PT_TCS = 1
PT_REG = 2


class PageFlags(IntFlag):
    """SECINFO.FLAGS: permissions in bits 0 to 2, the page type in bits 8 to 15 (SDM 3D, "SECINFO.FLAGS")."""

    R = 1
    W = 2
    X = 4
    TCS = PT_TCS << 8
    REG = PT_REG << 8


_ECREATE = b"ECREATE\0"
_EADD = b"EADD\0\0\0\0"
_EEXTEND = b"EEXTEND\0"
_UNMEASRD = b"UNMEASRD"
_UNSIZED = b"UNSIZED\0"

_CREATE = struct.Struct("<8sIQ44x")
_ADD = struct.Struct("<8sQQ40x")
_CHUNK = struct.Struct("<8sQ48x")

# A run of EADDs is written in blocks of this many records (256 KiB).
_BATCH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Create:
    """ECREATE: `size` of ELRANGE in bytes, `ssa_frame_pages` pages per SSA frame."""

    at: int
    size: int
    ssa_frame_pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """EADD of the page `offset` bytes above the base; `flags` are SECINFO.FLAGS."""

    at: int
    offset: int
    flags: int

    @property
    def type(self) -> int:
        """The page type, SECINFO.FLAGS bits 15:8."""
        return self.flags >> 8 & 0xFF

    @property
    def permissions(self) -> str:
        """The permissions as in ``ls``: ``rw-``."""
        return "".join(
            letter if self.flags & bit else "-" for letter, bit in zip("rwx", (1, 2, 4), strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Extend:
    """EEXTEND: 256 bytes of `data` that are loaded and measured."""

    at: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmeasured:
    """UNMEASRD: 256 bytes of `data` that are loaded and not measured."""

    at: int
    offset: int
    data: bytes


Record = Create | Add | Extend | Unmeasured
"""`at` of each is where the record starts in the stream, in bytes."""


class Writer:
    """Writes one SGXS stream to `stream` (which stays the caller's) and measures it on the way.

    Raises :class:`~teemate.errors.ImageError` for what no canonical stream may hold: the
    writer is where a mistake of a layout would first be seen.
    """

    def __init__(self, stream: BinaryIO, *, size: int, ssa_frame_pages: int) -> None:
        if size < 2 * PAGE or size & (size - 1):
            raise problem(
                "sgxs", f"the size of ELRANGE must be a power of two of at least two pages, not {size:#x}"
            )
        self._stream = stream
        self._size = size
        self._next = 0
        self._hash = hashlib.sha256()
        self._pages = 0
        self._emit(_CREATE.pack(_ECREATE, ssa_frame_pages, size))

    def _emit(self, measured: bytes) -> None:
        self._stream.write(measured)
        self._hash.update(measured)

    def _claim(self, offset: int, pages: int) -> None:
        if offset % PAGE or offset < self._next or offset + pages * PAGE > self._size:
            raise problem(
                "sgxs",
                f"page {offset:#x} is not aligned, not above the one before it, or not below {self._size:#x}",
            )
        self._next = offset + pages * PAGE
        self._pages += pages

    def page(self, offset: int, flags: int, data: bytes, *, measured: bool = True) -> None:
        """Add one page with 4096 bytes of `data`, all of them measured or none."""
        if len(data) != PAGE:
            raise problem("sgxs", f"a page has {PAGE} bytes, not {len(data)}")
        self._claim(offset, 1)
        parts = [_ADD.pack(_EADD, offset, flags)]
        tag = _EEXTEND if measured else _UNMEASRD
        for start in range(0, PAGE, CHUNK):
            parts.append(_CHUNK.pack(tag, offset + start))
            parts.append(data[start : start + CHUNK])
        if measured:
            self._emit(b"".join(parts))
        else:
            self._emit(parts[0])
            self._stream.write(b"".join(parts[1:]))

    def zeros(self, offset: int, flags: int, pages: int) -> None:
        """Add `pages` pages of zeros by EADD alone: what they hold is not measured."""
        self._claim(offset, pages)
        for first in range(0, pages, _BATCH):
            last = min(first + _BATCH, pages)
            self._emit(b"".join([_ADD.pack(_EADD, offset + n * PAGE, flags) for n in range(first, last)]))

    @property
    def pages(self) -> int:
        """How many pages were added."""
        return self._pages

    def mrenclave(self) -> bytes:
        """MRENCLAVE of what was written so far, 32 bytes."""
        return self._hash.digest()


def measure(stream: BinaryIO) -> bytes:
    """Return MRENCLAVE (32 bytes) of the stream, after checking every record.

    This is the way for where libteemate is not at hand; ``teemate.image.measure_file`` prefers
    the library.
    """
    digest = hashlib.sha256()
    for record in read(stream):
        match record:
            case Create():
                digest.update(_CREATE.pack(_ECREATE, record.ssa_frame_pages, record.size))
            case Add():
                digest.update(_ADD.pack(_EADD, record.offset, record.flags))
            case Extend():
                digest.update(_CHUNK.pack(_EEXTEND, record.offset))
                digest.update(record.data)
            case Unmeasured():
                pass
    return digest.digest()


def _exactly(stream: BinaryIO, length: int) -> bytes:
    """Read `length` bytes, or as many as there are."""
    data = stream.read(length)
    while data and len(data) < length:
        more = stream.read(length - len(data))
        if not more:
            break
        data += more
    return data


def read(stream: BinaryIO) -> Iterator[Record]:
    """Yield the records of the stream, each checked against all before it.

    Raises :class:`~teemate.errors.ImageError` with the offset of the record that is wrong;
    records before it have been yielded by then, so use none before the end where that matters.
    """
    create = _first(_exactly(stream, RECORD))
    yield create
    at = RECORD
    page: int | None = None
    seen = 0  # chunks of this page that have come, a bit each
    while header := _exactly(stream, RECORD):
        if len(header) != RECORD:
            raise problem(
                "sgxs", f"the stream ends inside of a record, {len(header)} of 64 bytes are there", offset=at
            )
        tag = header[:8]
        if tag == _EADD:
            add = _add(header, at, page, create.size)
            page, seen = add.offset, 0
            yield add
            at += RECORD
        elif tag in (_EEXTEND, _UNMEASRD):
            _, offset = _CHUNK.unpack(header)
            _reserved(header, 16, at, "EEXTEND" if tag == _EEXTEND else "UNMEASRD")
            if page is None or offset & ~(PAGE - 1) != page or offset % CHUNK:
                where = "no page" if page is None else f"page {page:#x}"
                raise problem(
                    "sgxs", f"256 bytes for {offset:#x} follow {where}, which they are no part of", offset=at
                )
            bit = 1 << (offset % PAGE // CHUNK)
            if seen & bit:
                raise problem("sgxs", f"the bytes at {offset:#x} come twice", offset=at)
            seen |= bit
            data = _exactly(stream, CHUNK)
            if len(data) != CHUNK:
                raise problem("sgxs", f"the stream ends inside of the data for {offset:#x}", offset=at)
            kind = Extend if tag == _EEXTEND else Unmeasured
            yield kind(at=at, offset=offset, data=data)
            at += RECORD + CHUNK
        else:
            raise problem("sgxs", f"there is no record with the tag {tag!r}", offset=at)


def _first(header: bytes) -> Create:
    if len(header) != RECORD:
        raise problem(
            "sgxs", f"this is no SGXS stream: it has {len(header)} bytes, a record has 64", offset=0
        )
    if header[:8] == _UNSIZED:
        raise problem(
            "sgxs", "the size of the enclave is still open (UNSIZED): finish the image first", offset=0
        )
    if header[:8] != _ECREATE:
        raise problem("sgxs", "this is no SGXS stream: it does not start with ECREATE", offset=0)
    _, ssa_frame_pages, size = _CREATE.unpack(header)
    _reserved(header, 20, 0, "ECREATE")
    if size < 2 * PAGE or size & (size - 1):
        raise problem(
            "sgxs",
            f"the size of ELRANGE must be a power of two of at least two pages, not {size:#x}",
            offset=0,
        )
    if ssa_frame_pages == 0:
        raise problem("sgxs", "an SSA frame must have at least one page", offset=0)
    return Create(at=0, size=size, ssa_frame_pages=ssa_frame_pages)


def _add(header: bytes, at: int, before: int | None, size: int) -> Add:
    _, offset, flags = _ADD.unpack(header)
    _reserved(header, 24, at, "EADD")
    if offset % PAGE or offset >= size:
        raise problem(
            "sgxs", f"page {offset:#x} is not aligned or not inside of ELRANGE ({size:#x} bytes)", offset=at
        )
    if before is not None and offset <= before:
        raise problem(
            "sgxs", f"page {offset:#x} comes after page {before:#x}: pages ascend, each comes once", offset=at
        )
    add = Add(at=at, offset=offset, flags=flags)
    if flags & ~0xFF07 or add.type not in (PT_TCS, PT_REG):
        raise problem("sgxs", f"page {offset:#x} has flags {flags:#x}: no such page can be added", offset=at)
    # SDM 3D, EADD: a TCS has no permissions of its own; a writable page is readable.
    if add.type == PT_TCS and flags & 7:
        raise problem("sgxs", f"the TCS at {offset:#x} has permissions (flags {flags:#x})", offset=at)
    if flags & PageFlags.W and not flags & PageFlags.R:
        raise problem("sgxs", f"page {offset:#x} is writable and not readable", offset=at)
    return add


def _reserved(header: bytes, start: int, at: int, name: str) -> None:
    if any(header[start:]):
        raise problem("sgxs", f"reserved bytes of {name} are not zero", offset=at)
