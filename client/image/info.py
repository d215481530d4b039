"""What an image is made of, for `teemate image info` and for programs."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import sgxs
from ._problem import problem
from .layout import HEADER_SIZE, ImageHeader
from .sgxs import PAGE, PT_TCS, Add, Create, Extend, Unmeasured
from .sigstruct import SIZE, Sigstruct

__all__ = ["ImageInfo", "SegmentInfo", "TcsInfo", "inspect", "measure_file", "read_sigstruct"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentInfo:
    """A run of pages that touch and have one type and the same permissions; offset and size in bytes."""

    offset: int
    size: int
    permissions: str
    type: str
    measured: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TcsInfo:
    """A TCS as the image has it.  Offsets from the base."""

    offset: int
    entry: int
    ssa: int
    nssa: int
    fs: int
    gs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """All of an image but its code.  `measured` and `size` in bytes; `header` is None for bare images."""

    size: int
    pages: int
    measured: int
    file_size: int
    ssa_frame_pages: int
    mrenclave: bytes
    header: ImageHeader | None
    segments: tuple[SegmentInfo, ...]
    tcs: tuple[TcsInfo, ...]


def inspect(path: Path) -> ImageInfo:
    """Read the SGXS file at `path` and describe it.

    Raises :class:`~teemate.errors.ImageError` with the offset of the record that is wrong, OSError.
    """
    reader = _Inspector()
    digest = measure_file(path)
    with path.open("rb") as stream:
        for record in sgxs.read(stream):
            reader.take(record)
        file_size = stream.tell()
    create = reader.create
    if create is None:  # read() has yielded a Create or raised
        raise problem("sgxs", "the stream is empty", offset=0)
    return ImageInfo(
        size=create.size,
        pages=reader.pages,
        measured=reader.measured,
        file_size=file_size,
        ssa_frame_pages=create.ssa_frame_pages,
        mrenclave=digest,
        header=ImageHeader.from_bytes(bytes(reader.first)),
        segments=tuple(reader.finish()),
        tcs=tuple(_tcs(offset, bytes(data)) for offset, data in reader.tcs.items()),
    )


class _Inspector:
    def __init__(self) -> None:
        self.create: Create | None = None
        self.pages = 0
        self.measured = 0
        self.first = bytearray(HEADER_SIZE)
        self.tcs: dict[int, bytearray] = {}
        self._segments: list[SegmentInfo] = []
        self._run: tuple[Add, int, int] | None = None  # its first page, its end, measured bytes in it

    def take(self, record: sgxs.Record) -> None:
        match record:
            case Create():
                self.create = record
            case Add():
                self._page(record)
            case Extend() | Unmeasured():
                self._data(record)

    def _page(self, add: Add) -> None:
        self.pages += 1
        if add.type == PT_TCS:
            self.tcs[add.offset] = bytearray(PAGE)
        run = self._run
        if run and run[1] == add.offset and run[0].flags == add.flags:
            self._run = (run[0], add.offset + PAGE, run[2])
            return
        self._close()
        self._run = (add, add.offset + PAGE, 0)

    def _data(self, record: Extend | Unmeasured) -> None:
        if isinstance(record, Extend) and self._run:
            self.measured += len(record.data)
            self._run = (self._run[0], self._run[1], self._run[2] + len(record.data))
        if record.offset == 0:
            self.first[:] = record.data[:HEADER_SIZE]
        page = self.tcs.get(record.offset & ~(PAGE - 1))
        if page is not None:
            start = record.offset % PAGE
            page[start : start + len(record.data)] = record.data

    def _close(self) -> None:
        if self._run:
            add, end, measured = self._run
            self._segments.append(
                SegmentInfo(
                    offset=add.offset,
                    size=end - add.offset,
                    permissions="" if add.type == PT_TCS else add.permissions,
                    type="TCS" if add.type == PT_TCS else "REG",
                    measured=measured,
                )
            )

    def finish(self) -> list[SegmentInfo]:
        self._close()
        self._run = None
        return self._segments


def _tcs(offset: int, data: bytes) -> TcsInfo:
    def word(at: int, size: int = 8) -> int:
        return int.from_bytes(data[at : at + size], "little")

    return TcsInfo(offset=offset, ssa=word(16), nssa=word(28, 4), entry=word(32), fs=word(48), gs=word(56))


def measure_file(path: Path) -> bytes:
    """Return MRENCLAVE (32 bytes) of the SGXS file at `path`.

    libteemate measures where it is installed; elsewhere (while TeeMate itself is being built)
    :func:`teemate.image.sgxs.measure` does, with the same result.
    Raises :class:`~teemate.errors.ImageError` with the offset of the record that is wrong.
    """
    try:
        native: Any = importlib.import_module("teemate._native")
    except ImportError:
        with path.open("rb") as stream:
            return sgxs.measure(stream)
    ffi, lib = native.ffi, native.lib
    info = ffi.new("struct teemate_image_info *")
    diag = ffi.new("struct teemate_diag *")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = lib.teemate_image_measure(fd, info, diag)
    finally:
        os.close(fd)
    if status:
        text = ffi.string(diag.text).decode(errors="replace")
        if not text:
            text = os.strerror(-status)
        raise problem("sgxs", text, offset=int(diag.offset), errno=-status)
    return bytes(ffi.buffer(info.mrenclave))


def read_sigstruct(path: Path) -> Sigstruct:
    """Read a SIGSTRUCT from its file.  Raises ImageError for another length, OSError."""
    with path.open("rb") as file:
        return Sigstruct.from_bytes(file.read(SIZE + 1))
