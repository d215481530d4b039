"""SQLite's numbers by name: result codes, limits, and what an authorizer is asked (https://sqlite.org/rescode.html)."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["NAMES", "NUMBERS"]

_RESULTS = (
    "OK ERROR INTERNAL PERM ABORT BUSY LOCKED NOMEM READONLY INTERRUPT IOERR CORRUPT NOTFOUND FULL CANTOPEN "
    "PROTOCOL EMPTY SCHEMA TOOBIG CONSTRAINT MISMATCH MISUSE NOLFS AUTH FORMAT RANGE NOTADB NOTICE WARNING"
)
# The extended codes of each are its number + 256, + 512, and so on; "." is a number without a name here.
_EXTENDED = {
    "OK": "LOAD_PERMANENTLY SYMLINK",
    "ERROR": "MISSING_COLLSEQ RETRY SNAPSHOT",
    "ABORT": ". ROLLBACK",
    "BUSY": "RECOVERY SNAPSHOT TIMEOUT",
    "LOCKED": "SHAREDCACHE VTAB",
    "READONLY": "RECOVERY CANTLOCK ROLLBACK DBMOVED CANTINIT DIRECTORY",
    "IOERR": (
        "READ SHORT_READ WRITE FSYNC DIR_FSYNC TRUNCATE FSTAT UNLOCK RDLOCK DELETE BLOCKED NOMEM ACCESS "
        "CHECKRESERVEDLOCK LOCK CLOSE DIR_CLOSE SHMOPEN SHMSIZE SHMLOCK SHMMAP SEEK DELETE_NOENT MMAP "
        "GETTEMPPATH CONVPATH VNODE AUTH BEGIN_ATOMIC COMMIT_ATOMIC ROLLBACK_ATOMIC DATA CORRUPTFS"
    ),
    "CORRUPT": "VTAB SEQUENCE INDEX",
    "CANTOPEN": "NOTEMPDIR ISDIR FULLPATH CONVPATH DIRTYWAL SYMLINK",
    "CONSTRAINT": (
        "CHECK COMMITHOOK FOREIGNKEY FUNCTION NOTNULL PRIMARYKEY TRIGGER UNIQUE VTAB ROWID PINNED DATATYPE"
    ),
    "AUTH": "USER",
    "NOTICE": "RECOVER_WAL RECOVER_ROLLBACK",
    "WARNING": "AUTOINDEX",
}
_ACTIONS = (
    "CREATE_INDEX CREATE_TABLE CREATE_TEMP_INDEX CREATE_TEMP_TABLE CREATE_TEMP_TRIGGER CREATE_TEMP_VIEW "
    "CREATE_TRIGGER CREATE_VIEW DELETE DROP_INDEX DROP_TABLE DROP_TEMP_INDEX DROP_TEMP_TABLE "
    "DROP_TEMP_TRIGGER DROP_TEMP_VIEW DROP_TRIGGER DROP_VIEW INSERT PRAGMA READ SELECT TRANSACTION UPDATE "
    "ATTACH DETACH ALTER_TABLE REINDEX ANALYZE CREATE_VTABLE DROP_VTABLE FUNCTION SAVEPOINT RECURSIVE"
)
_LIMITS = (
    "LENGTH SQL_LENGTH COLUMN EXPR_DEPTH COMPOUND_SELECT VDBE_OP FUNCTION_ARG ATTACHED LIKE_PATTERN_LENGTH "
    "VARIABLE_NUMBER TRIGGER_DEPTH WORKER_THREADS"
)


def _results() -> dict[str, int]:
    codes = {f"SQLITE_{name}": number for number, name in enumerate(_RESULTS.split())}
    for name, extended in _EXTENDED.items():
        base = codes[f"SQLITE_{name}"]
        for number, more in enumerate(extended.split(), 1):
            if more != ".":
                codes[f"SQLITE_{name}_{more}"] = base + 256 * number
    return codes | {"SQLITE_ROW": 100, "SQLITE_DONE": 101}


_CODES = _results()
NAMES: Mapping[int, str] = {number: name for name, number in _CODES.items()}
"""The name of every result code, primary or extended."""
NUMBERS: Mapping[str, int] = (
    _CODES
    | {f"SQLITE_{name}": number for number, name in enumerate(_ACTIONS.split(), 1)}
    | {f"SQLITE_LIMIT_{name}": number for number, name in enumerate(_LIMITS.split())}
    | {"SQLITE_DENY": 1, "SQLITE_IGNORE": 2}
)
"""Every constant that the sqlite3 module has, by its name."""
