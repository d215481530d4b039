"""A database as the text of statements that make it again, as ``.dump`` of SQLite's shell writes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from teemate.db import _errors

if TYPE_CHECKING:
    from teemate.db._connection import Connection

__all__ = ["dump"]

_SEQUENCE, _STATISTICS = "sqlite_sequence", "sqlite_stat1"
_VIRTUAL = re.compile(r"\s*CREATE\s+VIRTUAL\s+TABLE\b", re.IGNORECASE)


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _texts(connection: Connection, columns: list[str], rest: str, *parameters: str) -> Iterator[list[str]]:
    """Yield rows of texts; read as blobs, since the connection may make anything of texts and rows."""
    cursor = connection.cursor()
    cursor.row_factory = None
    blobs = ", ".join(f"CAST({column} AS BLOB)" for column in columns)
    for row in cursor.execute(f"SELECT {blobs} {rest}", parameters):
        try:
            yield [str(blob, "utf-8") for blob in row]
        except UnicodeDecodeError as error:
            raise _errors.OperationalError(f"a text is not UTF-8 and cannot be dumped: {error}") from None


def _rows(connection: Connection, table: str, names: list[str]) -> Iterator[str]:
    """Yield an INSERT for each row; SQLite's quote() writes the values as it reads them."""
    values = " || ',' || ".join(f"quote({_identifier(name)})" for name in names)
    for (row,) in _texts(connection, [values], f"FROM {_identifier(table)}"):
        yield f"INSERT INTO {_identifier(table)} VALUES({row});"


def dump(connection: Connection, pattern: str | None) -> Iterator[str]:
    """See :meth:`Connection.iterdump`."""
    only, parameters = ("", []) if pattern is None else (" AND name LIKE ?", [pattern])
    schema = "FROM sqlite_master WHERE sql NOT NULL AND type"
    tables = list(_texts(connection, ["name", "sql"], f"{schema} = 'table'{only} ORDER BY name", *parameters))
    writes_schema = False
    yield "BEGIN TRANSACTION;"
    for name, sql in tables:
        if name == _STATISTICS:
            yield 'ANALYZE "sqlite_master";'
        elif name.startswith("sqlite_"):
            continue
        elif _VIRTUAL.match(sql):
            if not writes_schema:
                writes_schema = True
                yield "PRAGMA writable_schema=ON;"
            yield (
                "INSERT INTO sqlite_master(type,name,tbl_name,rootpage,sql)"
                f"VALUES('table',{_literal(name)},{_literal(name)},0,{_literal(sql)});"
            )
            continue
        else:
            yield f"{sql};"
        # Generated columns are not among them: nothing is inserted there.
        columns = _texts(connection, ["name"], "FROM pragma_table_info(?)", name)
        yield from _rows(connection, name, [column for (column,) in columns])
    others = f"{schema} IN ('index', 'trigger', 'view'){only}"
    for (sql,) in _texts(connection, ["sql"], others, *parameters):
        yield f"{sql};"
    if writes_schema:
        yield "PRAGMA writable_schema=OFF;"
    # After the rows, whose insertion has counted already.
    if any(name == _SEQUENCE for name, _ in tables):
        yield 'DELETE FROM "sqlite_sequence";'
        yield from _rows(connection, _SEQUENCE, ["name", "seq"])
    yield "COMMIT;"
