"""Confidential databases: SQLite in the enclave, as PEP 249 has it and the sqlite3 module is used.

::

    import teemate
    from teemate import db

    with teemate.connect() as broker, broker.attach("db") as enclave:
        connection = db.connect(enclave)            # or db.connect("db"), which attaches by itself
        with connection:                            # one transaction
            connection.execute("CREATE TABLE person(name TEXT, born INTEGER)")
            connection.executemany("INSERT INTO person VALUES (?, ?)", [("Ada", 1815), ("Alan", 1912)])
        for name, born in connection.execute("SELECT * FROM person ORDER BY born"):
            print(name, born)
        connection.close()

Each connection takes a slot and has SQLite's own memory in it.  Statements, parameters and rows
pass through this process; pages, caches and temporary tables stay in the enclave.

:func:`open_connection` has the same names for trio; :func:`async_import_file`, :func:`async_databases` and
:func:`async_delete` do what :func:`import_file`, :func:`databases` and :func:`delete` do.

What of sqlite3 is not here calls back into the program (functions, collations, authorizers, progress
handlers), or reads the database as bytes (serialize, extensions): such methods raise
:class:`NotSupportedError`, ``create_function`` not before a statement uses the function.  Rows are
fetched ahead, in batches: a statement may have read further than the program has when its transaction ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from teemate.db._blob import Blob
from teemate.db._codes import NUMBERS
from teemate.db._connection import Connection, connect
from teemate.db._copying import databases, delete, import_file
from teemate.db._cursor import Cursor
from teemate.db._errors import (
    DatabaseError,
    DatabaseExists,
    DatabaseTampered,
    DataError,
    Denied,
    Error,
    IntegrityError,
    InterfaceError,
    InternalError,
    LimitReached,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    Warning,  # noqa: A004
)
from teemate.db._row import Row
from teemate.db._statement import complete_statement
from teemate.db._types import (
    PARSE_COLNAMES,
    PARSE_DECLTYPES,
    Binary,
    Date,
    DateFromTicks,
    PrepareProtocol,
    Time,
    TimeFromTicks,
    Timestamp,
    TimestampFromTicks,
    adapt,
    adapters,
    converters,
    register_adapter,
    register_converter,
)
from teemate.db._wire import Access, Description, Grantee, Listing, Right

if TYPE_CHECKING:
    from teemate.db._trio import (
        AsyncConnection,
        AsyncCursor,
        async_databases,
        async_delete,
        async_import_file,
        open_connection,
    )

__all__ = [
    "PARSE_COLNAMES",
    "PARSE_DECLTYPES",
    "Access",
    "AsyncConnection",
    "AsyncCursor",
    "Binary",
    "Blob",
    "Connection",
    "Cursor",
    "DataError",
    "DatabaseError",
    "DatabaseExists",
    "DatabaseTampered",
    "Date",
    "DateFromTicks",
    "Denied",
    "Description",
    "Error",
    "Grantee",
    "IntegrityError",
    "InterfaceError",
    "InternalError",
    "LimitReached",
    "Listing",
    "NotSupportedError",
    "OperationalError",
    "PrepareProtocol",
    "ProgrammingError",
    "Right",
    "Row",
    "Time",
    "TimeFromTicks",
    "Timestamp",
    "TimestampFromTicks",
    "Warning",
    "adapt",
    "adapters",
    "apilevel",
    "async_databases",
    "async_delete",
    "async_import_file",
    "complete_statement",
    "connect",
    "converters",
    "databases",
    "delete",
    "import_file",
    "open_connection",
    "paramstyle",
    "register_adapter",
    "register_converter",
    "sqlite_version",
    "sqlite_version_info",
    "threadsafety",
]

_TRIO = frozenset(
    {
        "AsyncConnection",
        "AsyncCursor",
        "async_databases",
        "async_delete",
        "async_import_file",
        "open_connection",
    }
)
apilevel = "2.0"
threadsafety = 1
"""Threads may share the module; connections only where `check_same_thread` is off."""
paramstyle = "qmark"
"""And ``:name`` with a mapping."""
sqlite_version_info = (3, 54, 0)
"""Of the SQLite that the image is built from."""
sqlite_version = ".".join(map(str, sqlite_version_info))


def __getattr__(name: str) -> Any:
    """Return one of the constants SQLITE_*, or what is for trio, loaded when it is first asked for."""
    if name in _TRIO:
        from importlib import import_module

        return getattr(import_module("teemate.db._trio"), name)
    try:
        return NUMBERS[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
