"""What a connection does with its database as a whole: who may use it, copies of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from teemate import errors as teemate_errors
from teemate.db import _copying, _errors
from teemate.db._opening import answered
from teemate.db._wire import Access, Batch, Description, Grantee, Right, encode_end, encode_limit

__all__ = ["Whole"]

_REPLY = 65536
SIZE_MOST = 8 << 30
"""Bytes that a database can have: as many pages as the enclave keeps account of in one file."""


class Whole:
    """The part of :class:`~teemate.db.Connection` that is about the database, and not about statements."""

    _slot: Any = None
    _has_file: bool
    _transaction: bool
    _forgotten: deque[int]
    _word: ctypes.c_uint32

    if TYPE_CHECKING:

        def _locked(self) -> contextlib.AbstractContextManager[None]: ...

        def _run(self, operation: bytes) -> Batch: ...

        def _begin_call(self) -> None: ...

        def _out_of_use(self) -> bool: ...

    def describe(self) -> Description:
        """Return whose the database is, what this client may do with it, and what others were granted."""
        with self._locked():
            self._needs_file()
            return Description.parse(self._ask("db_describe"))

    def grant(self, *, uid: int | None = None, gid: int | None = None, readonly: bool = True) -> None:
        """Let a user, or a group, use the database: to read it, or to write to it too.

        The owner's to do.  What counts is the uid of a client as the broker sees it, and its first group;
        who connects from now on has the right.  An enclave that several owners share needs
        ``share_between_owners`` in its policy besides.

        Raises
        ------
        Denied
            It is another user's.
        LimitReached
            128 grants are the most.

        """
        self._right(uid, gid, Access.READ if readonly else Access.WRITE)

    def revoke(self, *, uid: int | None = None, gid: int | None = None) -> None:
        """Take a right back; connections that have it get :class:`Denied` from their next call on.

        With that call a transaction that one of them has open is rolled back: one that writes keeps others
        from writing until then, or until its client is gone.
        """
        self._right(uid, gid, Access.NONE)

    def limit(self, size: int) -> None:
        """Have the database grow to `size` bytes and no further, whoever writes to it; 0 lifts that.

        Who would write more gets :class:`LimitReached`; what is larger already stays so.  The owner's to do.
        """
        if not isinstance(size, int) or not 0 <= size <= SIZE_MOST:
            raise _errors.ProgrammingError(f"a size is 0 to {SIZE_MOST} bytes, not {size!r}")
        with self._locked():
            self._needs_file()
            self._ask("db_limit", encode_limit(size))

    def _right(self, uid: int | None, gid: int | None, access: Access) -> None:
        if (uid is None) == (gid is None):
            raise _errors.ProgrammingError("give either a uid or a gid")
        grantee, number = (Grantee.UID, uid) if uid is not None else (Grantee.GID, gid)
        if not isinstance(number, int) or not 0 <= number < 2**32 - 1:
            raise _errors.ProgrammingError(f"{number!r} is no uid or gid")
        with self._locked():
            self._needs_file()
            self._ask("db_grant", Right(grantee, number, access).encode())

    def backup(
        self, target: str, *, pages: int = -1, progress: Callable[[int, int, int], object] | None = None
    ) -> None:
        """Copy the database into the new one `target` of the same enclave, sealed, while others write to it.

        The copy is this user's, and as the database was when it began: what is committed meanwhile is not in
        it, and stays in the log until the copy has ended.  Pages do not leave the enclave.  It is the owner's
        to do.

        Parameters
        ----------
        target
            The name of the new database; not a connection, as with sqlite3.
        pages
            So many at a time, at most 64, and as many as possible when it is not positive.
        progress
            Called after each time as sqlite3 does: with a status (0), the pages that are left, and all.

        Raises
        ------
        DatabaseExists
            There is a database of that name.
        Denied
            It is another user's.

        """
        if not isinstance(target, str):
            raise TypeError("a name of a new database in the same enclave is wanted")

        def left(done: int, all_pages: int) -> None:
            if progress is not None:
                progress(0, all_pages - done, all_pages)

        with self._locked():
            self._needs_file()
            _copying.backup(self, target, pages=pages if pages > 0 else 64, progress=left)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        force: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Write the database to a plain file of SQLite, mode 0600, as it is now.  The owner's to do.

        The file is there when it is complete and on the disk, and takes the place of another one only with
        `force`.

        Raises
        ------
        FileExistsError
            There is a file, and not `force`.
        Denied
            The database is another user's.

        """
        with self._locked():
            self._needs_file()
            _copying.export_file(self, path, force=force, progress=progress)

    def _needs_file(self) -> None:
        if not self._has_file:
            raise _errors.NotSupportedError("a database in memory is its connection's alone")

    def _begin_whole(self) -> None:
        """Before something that no statement may go with; under the lock."""
        if self._transaction:
            raise _errors.ProgrammingError("a transaction is open: commit or roll back first")
        while self._forgotten:
            self._run(encode_end(self._forgotten.popleft()))
        self._begin_call()

    def _ask(self, ecall: str, payload: bytes = b"", *, max_reply: int = _REPLY) -> bytes:
        """Do an ECALL that is about the database as a whole; under the lock."""
        try:
            return answered(
                lambda: self._slot.call(ecall, payload, max_reply=max_reply), f"do {ecall} on the database"
            )
        except teemate_errors.Error as error:
            if isinstance(error, _errors.Error):
                raise
            raise _errors.OperationalError(str(error)) from error
