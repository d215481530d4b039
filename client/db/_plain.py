"""Plain files of SQLite, as databases come from and go to."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from teemate.db._errors import NotSupportedError, error_of
from teemate.db._wire import PAGE

__all__ = ["PlainFile", "new_file", "plain_file"]

_BUSY, _CORRUPT, _TOOBIG, _NOTADB, _BUSY_RECOVERY = 5, 11, 18, 26, 261
_MAGIC = b"SQLite format 3\0"
_HEADER = 100
_PAGES_MOST = 1 << 21
"""Records that the enclave keeps account of in one file (native/enclaves/db/shared.h)."""
_LEFT = ("-wal", "-journal")


class PlainFile:
    """A database in a plain file, while nobody writes to it.

    Raises what :func:`plain_file` says.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._before = self._state()
        header = file.read(_HEADER)
        if len(header) < _HEADER or not header.startswith(_MAGIC):
            raise error_of(_NOTADB, f"{path} is not a database of SQLite")
        _check_left(path)
        size = self._before[0]
        self.page_size = int.from_bytes(header[16:18]) or 65536
        if self.page_size == 1:
            self.page_size = 65536
        self.reserved = header[20]
        if size % self.page_size:
            raise error_of(
                _CORRUPT, f"{path} is damaged: its {size} bytes are no number of pages of {self.page_size}"
            )
        self.pages = size // self.page_size
        if header[24:28] == header[92:96] and int.from_bytes(header[28:32]) > self.pages:
            raise error_of(_CORRUPT, f"{path} is damaged: pages at its end are missing")
        if int.from_bytes(header[56:60]) in (2, 3):
            raise NotSupportedError(f"{path} has texts in UTF-16: make it anew with PRAGMA encoding='UTF-8'")

    def _state(self) -> tuple[int, int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns, status.st_ino

    def read(self, first: int, count: int) -> bytes:
        """Return the bytes of `count` pages from page `first` on, counted from 0."""
        self._file.seek(first * self.page_size)
        data = self._file.read(count * self.page_size)
        if len(data) != count * self.page_size:
            raise self._changed()
        return data

    def check_unchanged(self) -> None:
        """Raise an OperationalError when somebody has written to it since it was opened."""
        if self._state() != self._before:
            raise self._changed()
        _check_left(self._path)

    def _changed(self) -> Exception:
        return error_of(_BUSY, f"{self._path} was changed while it was read: end who writes to it")


def _check_left(path: Path) -> None:
    for suffix in _LEFT:
        left = path.with_name(path.name + suffix)
        with contextlib.suppress(FileNotFoundError):
            if left.stat().st_size:
                raise error_of(
                    _BUSY_RECOVERY,
                    f"{left} has changes that are not in {path} yet: end the programs that use it, or run "
                    f"`sqlite3 {path} 'PRAGMA wal_checkpoint(TRUNCATE)'`",
                )


@contextlib.contextmanager
def plain_file(path: Path) -> Iterator[PlainFile]:
    """Open a plain file of SQLite to read its pages; where they are not of our size, those of a copy.

    The copy is plain too, and lies in a folder of this user's alone below ``TMPDIR`` until the block ends.

    Raises
    ------
    DatabaseError
        SQLITE_NOTADB, SQLITE_CORRUPT: it is no database, or its end is missing.
    DataError
        It is larger than a database can be.
    OperationalError
        SQLITE_BUSY_RECOVERY: a log or journal beside it has changes that are not in it yet.
    NotSupportedError
        Its texts are UTF-16.
    OSError
        It cannot be read.

    """
    with contextlib.ExitStack() as stack:
        source = PlainFile(path, stack.enter_context(path.open("rb")))
        if source.page_size != PAGE or source.reserved:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="teemate-import-")))
            copy = folder / "database"
            try:
                _copy_with_our_pages(path, copy)
            except sqlite3.Error as error:
                raise error_of(
                    getattr(error, "sqlite_errorcode", _CORRUPT), f"{path} cannot be copied: {error}"
                ) from None
            source.check_unchanged()
            source = PlainFile(copy, stack.enter_context(copy.open("rb")))
            if source.page_size != PAGE or source.reserved:
                raise NotSupportedError(f"{path} reserves bytes of its pages: make it anew without them")
        if source.pages > _PAGES_MOST:
            raise error_of(
                _TOOBIG,
                f"{path} has {source.pages} pages of {PAGE} bytes: {_PAGES_MOST} are the most (8 GiB)",
            )
        yield source


def _copy_with_our_pages(path: Path, copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        connection.execute(f"PRAGMA page_size={PAGE}")
        connection.execute("VACUUM INTO ?", (str(copy),))


@contextlib.contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[BinaryIO]:
    """Have a file to write, mode 0600: `path` when the block ends without an exception, and else gone.

    Raises
    ------
    FileExistsError
        There is one, and not `force`; also when somebody has made it meanwhile.
    OperationalError
        A log or journal of another database lies beside `path`, which SQLite would take for this one's.

    """
    if not force and path.exists():
        raise FileExistsError(f"{path} exists")
    _check_left(path)
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if force:
            new.replace(path)
        else:
            path.hardlink_to(new)  # which fails when there is one by now
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        new.unlink(missing_ok=True)
