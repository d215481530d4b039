"""iterdump() writes what makes the database again, as sqlite3's does."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import Any

import pytest

import teemate
from teemate import db

SCRIPT = """
CREATE TABLE person(id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, "its, own" REAL, data BLOB);
INSERT INTO person(name, "its, own", data) VALUES
    ('O''Hara', 1.5, x'00ff'), (NULL, -0.1, NULL), ('semi;colon' || char(10) || 'Zürich', 1e300, '');
CREATE TABLE "quoted ""table"(a, b GENERATED ALWAYS AS (a * 2) VIRTUAL);
INSERT INTO "quoted ""table"(a) VALUES (1), (2);
CREATE TABLE keyed(k TEXT PRIMARY KEY, v) WITHOUT ROWID;
INSERT INTO keyed VALUES ('a', 1), ('b', 2);
CREATE INDEX by_name ON person(name);
CREATE VIEW names AS SELECT name FROM person;
CREATE TRIGGER counted AFTER INSERT ON keyed BEGIN SELECT 1; END;
"""


def rows_of(connection: Any) -> dict[str, list[Any]]:
    tables = ("person", '"quoted ""table"', "keyed", "names", "sqlite_sequence")
    return {table: connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in tables}


def test_a_dump_is_sqlite3s_own_and_makes_the_same_database(enclave: teemate.Enclave) -> None:
    with (
        contextlib.closing(db.connect(enclave)) as ours,
        contextlib.closing(sqlite3.connect(":memory:")) as theirs,
        contextlib.closing(db.connect(enclave)) as again,
    ):
        ours.executescript(SCRIPT)
        theirs.executescript(SCRIPT)
        dumped = list(ours.iterdump())
        # sqlite3's own dies of a name with a comma in some versions, and quotes no name in a sequence.
        assert [line for line in dumped if "sqlite_sequence" not in line] == [
            line for line in theirs.iterdump() if "sqlite_sequence" not in line
        ]
        again.executescript("\n".join(dumped))
        assert rows_of(again) == rows_of(ours) == rows_of(theirs)


def test_a_dump_does_not_depend_on_what_the_connection_makes_of_rows_and_texts(
    enclave: teemate.Enclave,
) -> None:
    with contextlib.closing(db.connect(enclave)) as connection:
        connection.executescript(SCRIPT)
        before = list(connection.iterdump())
        connection.row_factory = lambda _cursor, _row: None
        connection.text_factory = lambda _bytes: 1 / 0
        assert list(connection.iterdump()) == before


def test_a_filter_leaves_out_what_does_not_fit(enclave: teemate.Enclave) -> None:
    with contextlib.closing(db.connect(enclave)) as connection:
        connection.executescript(SCRIPT)
        dumped = list(connection.iterdump(filter="key%"))
    assert dumped == [
        "BEGIN TRANSACTION;",
        "CREATE TABLE keyed(k TEXT PRIMARY KEY, v) WITHOUT ROWID;",
        "INSERT INTO \"keyed\" VALUES('a',1);",
        "INSERT INTO \"keyed\" VALUES('b',2);",
        "COMMIT;",
    ]


def test_a_text_that_is_none_is_an_error_and_not_another_text(enclave: teemate.Enclave) -> None:
    with contextlib.closing(db.connect(enclave)) as connection:
        connection.executescript("CREATE TABLE t(v); INSERT INTO t VALUES (CAST(x'ff' AS TEXT))")
        with pytest.raises(db.OperationalError, match="not UTF-8"):
            list(connection.iterdump())
        connection.close()
        with pytest.raises(db.ProgrammingError, match="closed"):
            connection.iterdump()
