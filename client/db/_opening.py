"""How a database is asked for: its name, what is wanted of it, what the enclave answers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from teemate import errors as teemate_errors
from teemate._grant import GrantedEnclave
from teemate.db import _errors
from teemate.db._errors import error_of
from teemate.db._wire import CREATE, DB_FAILED, MEMORY, READONLY, Access, Opened, decode_failure

if TYPE_CHECKING:
    from teemate._slot import Slot

__all__ = ["LEVELS", "answered", "isolation", "name_of", "named", "take_files"]

LEVELS = {"": 1, "DEFERRED": 1, "IMMEDIATE": 2, "EXCLUSIVE": 3}
"""Levels of isolation, as enum db_begin."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}", re.ASCII)
_CANTOPEN = 14


def isolation(level: str | None) -> str | None:
    """Check a level of isolation, which comes back as LEVELS has it."""
    if level is not None and not isinstance(level, str):
        raise TypeError(f"isolation_level must be str or None, not {type(level).__name__}")
    if level is not None and level.upper() not in LEVELS:
        raise ValueError("isolation_level string must be '', 'DEFERRED', 'IMMEDIATE', or 'EXCLUSIVE'")
    return None if level is None else level.upper()


def name_of(database: Any) -> bytes:
    """Check a name of a database that has files."""
    name = os.fsdecode(database)
    if not _NAME.fullmatch(name) or name.endswith(("-wal", "-root", "-journal")):
        raise error_of(
            _CANTOPEN,
            f"unable to open database file: {name!r} is no name of a database: 1 to 48 of A-Z a-z 0-9 . _ -, "
            "beginning with a letter or digit, and not ending in -wal, -root or -journal",
        )
    return name.encode()


def named(database: Any, *, readonly: bool, create: bool) -> tuple[bytes, int]:
    """Return the name of what connect() was asked for, and enum db_open_flags."""
    if os.fsdecode(database) in (":memory:", ""):
        return b"", MEMORY
    return name_of(database), READONLY if readonly else CREATE if create else 0


def take_files(slot: Slot, database: bytes, opened: Opened) -> None:
    """Have this process read and write the files of the database that was opened, if it is to do so."""
    if not opened.files:
        return
    enclave = slot._enclave
    if not isinstance(enclave, GrantedEnclave):
        raise _errors.InternalError("a private enclave lends no files")
    for name in (database.decode(), f"{database.decode()}-wal")[: opened.files]:
        enclave.open_file(slot, name, writable=opened.access > Access.READ)
    slot.call("db_direct")


def answered(call: Callable[[], bytes], what: str) -> bytes:
    """Do an ECALL that answers an error with DB_FAILED; `what` failed, for messages."""
    try:
        return call()
    except teemate_errors.CallFailed as error:
        if error.status != DB_FAILED:
            raise _errors.OperationalError(f"cannot {what}: {error}") from error
        failure = decode_failure(error.reply)
        raise error_of(failure.code, failure.message) from None
