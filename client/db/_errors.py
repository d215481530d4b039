"""The exceptions of PEP 249, and which of them a result code of SQLite is."""

from __future__ import annotations

from teemate import errors
from teemate.db._codes import NAMES

__all__ = [
    "DataError",
    "DatabaseError",
    "DatabaseExists",
    "DatabaseTampered",
    "Denied",
    "Error",
    "IntegrityError",
    "InterfaceError",
    "InternalError",
    "LimitReached",
    "NotSupportedError",
    "OperationalError",
    "ProgrammingError",
    "Warning",
    "error_of",
]


class Warning(Exception):  # noqa: A001, N818  its name in PEP 249
    """Something of importance, though no error."""


class Error(Exception):
    """Base of all that follow.

    What the enclave or the broker says (a slot that was revoked, an enclave that is gone) is an
    :class:`OperationalError` whose ``__cause__`` is the :class:`teemate.Error`.
    """

    sqlite_errorcode: int
    """SQLite's extended result code, where the error is SQLite's."""
    sqlite_errorname: str


class InterfaceError(Error):
    """This module was used wrongly."""


class DatabaseError(Error):
    """Something is wrong with the database, or with what it was asked for."""


class DataError(DatabaseError):
    """A value is too large."""


class OperationalError(DatabaseError):
    """The database cannot do it now, or does not understand the statement."""


class IntegrityError(DatabaseError):
    """A constraint does not hold."""


class InternalError(DatabaseError):
    """SQLite, or the enclave, has met what should not be."""


class ProgrammingError(DatabaseError):
    """The program is wrong: parameters that do not fit, a connection that is closed."""


class NotSupportedError(DatabaseError):
    """It cannot be done in an enclave: no function of this program can be called from inside."""


class DatabaseTampered(DatabaseError):  # noqa: N818
    """A file is not what the enclave wrote: it was changed, swapped, or an older one was put back.

    Nothing that was read from it is to be trusted any more: close, and restore a backup.
    """


class Denied(OperationalError, errors.Denied):  # noqa: N818
    """The caller has no right to do this with the database: its owner can grant it.

    Also a :class:`teemate.Denied`.
    """


class DatabaseExists(OperationalError):  # noqa: N818
    """There is a database of that name: take another one, or delete it."""


class LimitReached(OperationalError, errors.LimitReached):  # noqa: N818
    """A limit was met, which ``detail`` names with the setting that raises it.

    Also a :class:`teemate.LimitReached`.
    """


TAMPERED, PARAMETERS, STATEMENTS, CURSOR, CURSORS, ROOM, TIME, REQUEST, STORAGE = range(-1, -10, -1)
DENIED, EXISTS, RIGHTS, COPYING, SIZE, SPACE, HEAP, FORMAT, FILES = range(-10, -19, -1)
_OWN: dict[int, tuple[type[Error], str]] = {
    TAMPERED: (DatabaseTampered, ""),
    PARAMETERS: (ProgrammingError, ""),
    STATEMENTS: (ProgrammingError, "You can only execute one statement at a time."),
    CURSOR: (InterfaceError, ""),
    ROOM: (DataError, ""),
    REQUEST: (InternalError, ""),
    STORAGE: (OperationalError, ""),
    DENIED: (Denied, ""),
    EXISTS: (DatabaseExists, ""),
    COPYING: (ProgrammingError, ""),
    FORMAT: (NotSupportedError, ""),
    FILES: (OperationalError, ""),
}
_NOMEM = 7
_LIMITS: dict[int, tuple[str, dict[str, object]]] = {
    CURSORS: ("or connect with more `cursors`", {"limit": "cursors", "setting": "connect(cursors=)"}),
    TIME: (
        "connect with a longer `statement_timeout`",
        {"limit": "statement_timeout", "setting": "connect(statement_timeout=)"},
    ),
    SIZE: (
        "delete some of it, or have its owner raise the limit (`teemate db limit`)",
        {"limit": "size of a database", "setting": "teemate db limit"},
    ),
    SPACE: ("", {"limit": "storage_limit", "setting": "[[enclave]] storage_limit, and the host's disk"}),
    RIGHTS: ("", {"limit": "grants of a database", "setting": "none"}),
    HEAP: (
        "close connections, or lay the image out with a larger heap",
        {"limit": "heap of the enclave", "setting": "teemate image build --heap"},
    ),
    _NOMEM: ("connect with more `memory`", {"limit": "memory", "setting": "connect(memory=)"}),
}
"""What to do about a limit, and `detail`."""
_BY_NAME: dict[str, type[Error]] = {
    "INTERNAL NOTFOUND": InternalError,
    "ERROR PERM ABORT BUSY LOCKED NOMEM READONLY INTERRUPT IOERR FULL CANTOPEN PROTOCOL EMPTY SCHEMA": (
        OperationalError
    ),
    "TOOBIG": DataError,
    "CONSTRAINT MISMATCH": IntegrityError,
    "MISUSE RANGE": InterfaceError,
}
_CLASSES = {f"SQLITE_{name}": kind for names, kind in _BY_NAME.items() for name in names.split()}


def error_of(code: int, message: str) -> Error:
    """Return the exception for SQLite's `code`, or for one of enum db_own_code."""
    limit = _LIMITS.get(code if code < 0 else code & 0xFF)
    if limit is not None:
        remedy, detail = limit
        error: Error = LimitReached(f"{message}: {remedy}" if remedy else message, detail)
    elif code < 0:
        kind, text = _OWN.get(code, (InternalError, ""))
        return kind(text or message)
    else:
        error = _CLASSES.get(NAMES.get(code & 0xFF, ""), DatabaseError)(message)
    if code >= 0:
        error.sqlite_errorcode = code
        error.sqlite_errorname = NAMES.get(code, NAMES.get(code & 0xFF, "unknown"))
    return error
