"""The exceptions of PEP 249, and which of them a result code of SQLite is."""

from __future__ import annotations

from teemate.db._codes import NAMES

__all__ = [
    "DataError",
    "DatabaseError",
    "DatabaseTampered",
    "Error",
    "IntegrityError",
    "InterfaceError",
    "InternalError",
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


TAMPERED, PARAMETERS, STATEMENTS, CURSOR, CURSORS, ROOM, TIME, REQUEST, STORAGE = range(-1, -10, -1)
_OWN: dict[int, tuple[type[Error], str]] = {
    TAMPERED: (DatabaseTampered, ""),
    PARAMETERS: (ProgrammingError, ""),
    STATEMENTS: (ProgrammingError, "You can only execute one statement at a time."),
    CURSOR: (InterfaceError, ""),
    CURSORS: (OperationalError, ""),
    ROOM: (DataError, ""),
    TIME: (OperationalError, ""),
    REQUEST: (InternalError, ""),
    STORAGE: (OperationalError, ""),
}
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
_NOMEM = 7


def error_of(code: int, message: str) -> Error:
    """Return the exception for SQLite's `code`, or for one of enum db_own_code."""
    if code < 0:
        kind, text = _OWN.get(code, (InternalError, ""))
        return kind(text or message)
    error = _CLASSES.get(NAMES.get(code & 0xFF, ""), DatabaseError)(
        f"{message}: connect with more `memory`" if code & 0xFF == _NOMEM else message
    )
    error.sqlite_errorcode = code
    error.sqlite_errorname = NAMES.get(code, NAMES.get(code & 0xFF, "unknown"))
    return error
