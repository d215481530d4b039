"""The three ways to a database that ``bench db`` compares, and the memory that each takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import final

from teemate.bench._measured import Measured
from teemate.bench._setting import MIB, Setting
from teemate.demo._memory import children, pss_outside
from teemate.demo._prepare import ENCLAVE
from teemate.errors import Unsupported

__all__ = ["PLAIN", "PRIVATE", "SHARED", "Ways", "enclave_files"]

SHARED, PRIVATE, PLAIN = "shared", "private", "plain"
PROGRAM = Path(__file__).resolve().parents[1] / "libexec" / "teemate-database"
"""There when the C library was built."""
_ROWS = 310_000
"""Of 200 bytes each: 64 MiB of pages."""
_ROWS_OF_A_PAGE = 19
_KEPT_PAGE = 4224
"""Bytes of the cache for a page, what finds it included (native/enclaves/db/cache.c)."""
_SLOT_SHARE = MIB
"""CACHE_SLOT_SHARE."""
_OTHER_SLOTS = 3
"""The warden's two, and one for I/O."""
_PAGE = 4096
_WINDOW = range(0x4000_0000_0000, 0x4100_0000_0000)
"""Where enclaves lie."""
_NAME = "bench"


@final
class Ways:
    """A broker with one enclave for all, images and files for an enclave each, a file for none."""

    def __init__(self, stack: ExitStack, setting: Setting, *, clients: int) -> None:
        if not PROGRAM.is_file():
            raise Unsupported("`bench db` measures a C program, which was not built: libcbor is missing")
        self._setting = setting
        self.rows = round(_ROWS * min(1.0, setting.scale * 2))
        # Beside the table's: the tree above it, and what was written last.
        pages = self.rows // _ROWS_OF_A_PAGE + 500
        cache = -(-pages * _KEPT_PAGE // _PAGE) * _PAGE
        self._shared, self._private = (
            setting.database_image(heap=cache + (slots + _OTHER_SLOTS) * _SLOT_SHARE, slots=slots)
            for slots in (clients, 1)
        )
        self._broker = stack.enter_context(setting.broker(self._shared, clients=clients, storage=True))
        self._folder = setting.new_folder("private")
        self._file = setting.new_folder("plain") / _NAME
        self._library = _sqlite_library()
        self.names = (SHARED, PRIVATE, PLAIN) if self._library else (SHARED, PRIVATE)
        if self._library is None:
            setting.listener.phase("plain sqlite3 is left out: this Python has none in a file of its own")

    def make(self) -> None:
        """Make the database, for each way the same."""
        self._setting.listener.phase(f"making a database of {self.rows * 64 // _ROWS} MiB")
        for way in (SHARED, PLAIN):
            if way in self.names:
                with self.program(way) as program:
                    program.ask("make")
        # Both images have one signer, so either's enclaves can open what the other's have made.
        for file in self._broker.state.rglob(f"{_NAME}*"):
            shutil.copy(file, self._folder)
        with self.program(SHARED) as first:  # the enclave that is shared has been at work for long
            first.ask("hold")
            first.ask("fill")

    def program(self, way: str) -> Measured:
        """Return a program that works with the database, to be entered.

        Those with an enclave each only read: they have the files together.
        """
        words = {
            SHARED: (self._broker.socket, ENCLAVE, _NAME),
            PRIVATE: (
                str(self._private.sgxs), str(self._private.sigstruct), self._setting.backend,
                str(self._folder), _NAME,
            ),
            PLAIN: (str(self._library), str(self._file)),
        }  # fmt: skip
        return Measured(f"{PROGRAM.name} {way}", [str(PROGRAM), str(self.rows), way, *words[way]])

    def programs(self, stack: ExitStack, way: str, count: int) -> list[Measured]:
        """Start so many."""
        started = [self.program(way) for _ in range(count)]
        for program in started:
            stack.push(program.__exit__)
        for program in started:
            program.ready()
        return started

    def memory(self, way: str, programs: Sequence[Measured]) -> int:
        """Return the bytes that they take, with what serves them: as ``bench memory`` counts.

        Each enclave with all its pages, everything else by its share.  Not what the host keeps of files.
        """
        pids = [program.pid for program in programs]
        pages = {SHARED: self._shared.pages, PRIVATE: self._private.pages * len(pids), PLAIN: 0}[way]
        if way == SHARED:
            pids += [self._broker.keeper, *children(self._broker.keeper)]
        return pages * _PAGE + sum(pss_outside(pid, enclave_files(pid)) for pid in pids)


def enclave_files(pid: int) -> set[tuple[int, int]]:
    """Return device and inode of what `pid` has mapped where enclaves lie."""
    found = set()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, _, _, device, inode, *_ = line.split(maxsplit=5)
        if int(inode) and int(place.partition("-")[0], 16) in _WINDOW:
            major, minor = device.split(":")
            found.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
    return found


def _sqlite_library() -> str | None:
    """Return the file of the SQLite that this Python uses; None when it is a part of Python itself."""
    import sqlite3  # noqa: F401 - it is to be mapped

    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")[2]
        if "libsqlite3" in path:
            return f"/{path}"
    return None
