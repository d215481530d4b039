"""The enclave of the tests about files (tests/storage/files_enclave.c), and how to talk to it."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Protocol

from elves import compile_elf
from images import BuiltImage, Images

from teemate.image import LayoutOptions, SigParams, layout_image, sign_with_key

READ_ONLY, CREATE = 1, 2
ENOENT, EIO, EBADF, EACCES, EINVAL, ENOSPC, EDEADLK, ENOSYS, ELOOP, ESTALE = (
    2, 5, 9, 13, 22, 28, 35, 38, 40, 116,
)  # fmt: skip
MOST = 65536
"""TM_FILE_MOST."""

_ORDER = struct.Struct("<IIQQ")
_SOURCE = Path(__file__).resolve().parent / "storage" / "files_enclave.c"


def build_files_image(
    images: Images,
    folder: Path,
    *,
    io_slots: int = 1,
    slots: int = 6,
    test_build: str | None = None,
    elf: Path | None = None,
) -> BuiltImage:
    """Build and sign it, from `elf` if that was compiled already."""
    stem = folder / f"files-{io_slots}-{slots}-{test_build or ''}"
    hole = images.test_build if test_build is None else test_build
    if elf is None:
        compile_elf([_SOURCE], stem.with_suffix(".elf"), test_build=hole)
    else:
        os.link(elf, stem.with_suffix(".elf"))
    options = LayoutOptions(slots=slots, io_slots=io_slots, heap=4 << 20, debug=True)
    built = layout_image(stem.with_suffix(".elf"), stem.with_suffix(".sgxs"), options)
    signed = sign_with_key(SigParams(debug_allowed=True).unsigned(built.mrenclave), images.key)
    stem.with_suffix(".sig").write_bytes(signed.to_bytes())
    return BuiltImage(
        name="files",
        sgxs=stem.with_suffix(".sgxs"),
        sigstruct=stem.with_suffix(".sig"),
        elf=stem.with_suffix(".elf"),
        mrenclave=built.mrenclave,
        slots=slots,
    )


def order(handle: int = 0, flags: int = 0, offset: int = 0, length: int = 0, data: bytes = b"") -> bytes:
    """Return struct order, and what follows it."""
    return _ORDER.pack(handle, flags, offset, length) + data


class Slot(Protocol):
    """What can be called."""

    def call(self, name: str, payload: bytes, *, max_reply: int) -> bytes: ...


class Files:
    """tm_file_*() of the enclave's, through one slot: results as they are, negative errnos too."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def _ask(self, name: str, payload: bytes) -> tuple[int, bytes]:
        reply = self._slot.call(name, payload, max_reply=MOST + 8)
        return int.from_bytes(reply[:8], "little", signed=True), reply[8:]

    def open(self, name: str, flags: int = CREATE) -> int:
        """Return a handle."""
        return self._ask("open", order(flags=flags, data=name.encode()))[0]

    def close(self, handle: int) -> int:
        return self._ask("close", order(handle))[0]

    def read(self, handle: int, offset: int, length: int) -> bytes | int:
        """Return what was read, or why not."""
        result, data = self._ask("read", order(handle, offset=offset, length=length))
        return result if result < 0 else data

    def write(self, handle: int, offset: int, data: bytes) -> int:
        return self._ask("write", order(handle, offset=offset, data=data))[0]

    def sync(self, handle: int) -> int:
        return self._ask("sync", order(handle))[0]

    def size(self, handle: int) -> int:
        return self._ask("size", order(handle))[0]

    def truncate(self, handle: int, size: int) -> int:
        return self._ask("truncate", order(handle, offset=size))[0]

    def delete(self, name: str) -> int:
        return self._ask("delete", order(data=name.encode()))[0]

    def locked(self) -> int:
        """Ask for a size while a mutex is held."""
        return self._ask("locked", order())[0]

    def at_reset(self) -> int:
        """What tm_on_slot_reset() heard."""
        return self._ask("at_reset", order())[0]

    def append(self, handle: int, first: int, count: int) -> int:
        """Write so many records of 64 bytes from that one on, each synced."""
        return self._ask("append", order(handle, offset=first, length=count))[0]
