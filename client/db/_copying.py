"""Whole databases, page by page: out to a plain file, in from one, and into a new one of the same enclave.

Pages of a plain file pass through this process; those of a backup stay in the enclave.  What comes out is the
database as it was when the copy began, while others write to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from teemate._enclave import Enclave
from teemate.db import _errors
from teemate.db._errors import error_of
from teemate.db._opening import name_of
from teemate.db._plain import new_file, plain_file
from teemate.db._wire import (
    PAGE,
    PAGES,
    CopyKind,
    Listing,
    decode_copying,
    decode_listed,
    encode_copied,
    encode_copy,
    encode_list,
    encode_pages,
)

if TYPE_CHECKING:
    from teemate.db._whole import Whole

__all__ = [
    "Progress",
    "backup",
    "databases",
    "databases_by",
    "delete",
    "delete_by",
    "export_file",
    "import_by",
    "import_file",
]

Progress = Callable[[int, int], object]
"""Called with the pages that are copied, and how many there are."""
_INTERRUPT = 9
_REPLY = PAGE * PAGES + 64


class _Copy:
    """A copy that is under way on a connection."""

    def __init__(self, connection: Whole, pages: int) -> None:
        self.pages, self.done = pages, 0
        self._connection = connection

    def move(self, data: bytes = b"", count: int = PAGES) -> bytes:
        """Copy the next pages, no more than there are; `data`: they come from outside."""
        if self._connection._word.value:
            raise error_of(_INTERRUPT, "interrupted")
        count = len(data) // PAGE if data else min(count, PAGES, self.pages - self.done)
        reply = self._connection._ask("db_pages", encode_pages(count, data), max_reply=_REPLY)
        self.done, self.pages, pages = decode_copying(reply)
        return pages


@contextlib.contextmanager
def _copying(connection: Whole, kind: CopyKind, name: bytes = b"", pages: int = 0) -> Iterator[_Copy]:
    """Copy for the time of the block; after an exception nothing is left of a new database."""
    connection._begin_whole()
    _, pages, _ = decode_copying(connection._ask("db_copy", encode_copy(kind, name, pages)))
    try:
        yield _Copy(connection, pages)
        word = ctypes.addressof(connection._word)
        connection._ask("db_copied", encode_copied(keep=True, interrupt=word))
    except BaseException:
        if not connection._out_of_use():
            with contextlib.suppress(_errors.Error):
                connection._ask("db_copied", encode_copied(keep=False))
        raise


def export_file(
    connection: Whole, path: str | os.PathLike[str], *, force: bool, progress: Progress | None
) -> None:
    """See :meth:`Connection.export`."""
    with (
        new_file(Path(path), force=force) as file,
        _copying(connection, CopyKind.OUT) as copy,
    ):
        while copy.done < copy.pages:
            file.write(copy.move())
            if progress is not None:
                progress(copy.done, copy.pages)


def backup(connection: Whole, name: str, *, pages: int, progress: Progress | None) -> None:
    """See :meth:`Connection.backup`."""
    with _copying(connection, CopyKind.TO, name_of(name)) as copy:
        while copy.done < copy.pages:
            copy.move(count=pages)
            if progress is not None:
                progress(copy.done, copy.pages)


def import_file(
    enclave: Enclave | str,
    path: str | os.PathLike[str],
    database: str,
    *,
    progress: Progress | None = None,
) -> None:
    """Make the new database `database` in `enclave` of a plain file of SQLite that nobody writes to.

    It is there, and this user's, when this returns, and not before; a file that is damaged makes none
    (``PRAGMA integrity_check`` in the enclave).  The file stays as it is.  Files whose pages are not of 4096
    bytes are copied first: see ``TMPDIR``.

    Raises
    ------
    DatabaseExists
        There is a database of that name.
    DatabaseError
        SQLITE_NOTADB, SQLITE_CORRUPT: the file is no database, or it is damaged.
    DataError
        It is larger than a database can be.
    OperationalError
        SQLITE_BUSY_RECOVERY: a log or journal beside it has changes that are not in it yet.
    LimitReached
        The enclave's `storage_limit`, or the disk.
    NotSupportedError
        Its texts are UTF-16, or its pages have reserved bytes.
    OSError
        It cannot be read.

    """
    from teemate.db._connection import connect

    with contextlib.closing(connect(enclave)) as connection:
        import_by(connection, Path(path), database, progress=progress)


def import_by(connection: Whole, path: Path, database: str, *, progress: Progress | None) -> None:
    """Do :func:`import_file` by way of a connection that is open, whose interrupt() ends it."""
    name = name_of(database)
    with (
        plain_file(path) as file,
        connection._locked(),
        _copying(connection, CopyKind.IN, name, file.pages) as copy,
    ):
        while copy.done < copy.pages:
            copy.move(file.read(copy.done, min(PAGES, copy.pages - copy.done)))
            if progress is not None:
                progress(copy.done, copy.pages)
        file.check_unchanged()


def databases(enclave: Enclave | str) -> list[Listing]:
    """Return the databases of `enclave` that this user may use, by name.

    One that another client is just making is not among them.
    """
    from teemate.db._connection import connect

    with contextlib.closing(connect(enclave)) as connection:
        return databases_by(connection)


def databases_by(connection: Whole) -> list[Listing]:
    """Do :func:`databases` by way of a connection that is open."""
    found: dict[str, Listing] = {}
    following = 0
    with connection._locked():
        while True:
            following, listings = decode_listed(connection._ask("db_list", encode_list(following)))
            found.update((listing.name, listing) for listing in listings)
            if not following:
                return [found[name] for name in sorted(found)]


def delete(enclave: Enclave | str, database: str) -> None:
    """Delete the database `database` of `enclave`, which is this user's and nobody has open.

    No error when there is none.

    Raises
    ------
    Denied
        It is another user's.
    OperationalError
        SQLITE_BUSY: somebody has it open.

    """
    from teemate.db._connection import connect

    with contextlib.closing(connect(enclave)) as connection:
        delete_by(connection, database)


def delete_by(connection: Whole, database: str) -> None:
    """Do :func:`delete` by way of a connection that is open."""
    name = name_of(database)
    with connection._locked():
        connection._ask("db_delete", name)
