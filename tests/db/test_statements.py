"""SQLite in the enclave: what goes in as parameters comes out as rows, and errors say what SQLite says."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable

import pytest
from connections import (
    CHANGES,
    CONSTRAINT,
    CURSOR,
    CURSORS,
    DESCRIBE,
    END,
    EXECUTE,
    FETCH,
    INTERRUPTED,
    MORE,
    PARAMETERS,
    READS,
    REQUEST,
    ROOM,
    STATEMENTS,
    TRANSACTION,
    Connection,
    SqlError,
    operation,
)
from hypothesis import given
from hypothesis import strategies as st
from processes import repeatedly

import teemate

Connect = Callable[..., Connection]

COUNT = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT {}) SELECT n FROM c"
SLOW = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) FROM c"


def test_values_of_every_type_come_back_as_they_went_in(connect: Connect) -> None:
    db = connect()
    row = (
        None,
        0,
        -1,
        2**63 - 1,
        -(2**63),
        0.0,
        -1.5,
        math.inf,
        1e-300,
        "",
        "ä\0ö",
        "x" * 70000,
        b"",
        b"\0\xff" * 9,
    )
    marks = ", ".join("?" * len(row))
    assert db.sql(f"SELECT {marks}", *row, max_reply=1 << 20) == [row]


def test_any_rows_come_back_from_a_table(connect: Connect) -> None:
    db = connect()
    db.script("CREATE TABLE t(a, b, c)")
    value = st.one_of(
        st.none(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False),
        st.text(st.characters(exclude_categories=["Cs"])),
        st.binary(),
    )

    @given(st.lists(st.tuples(value, value, value), max_size=20))
    def rows_come_back(rows: list[tuple[object, ...]]) -> None:
        db.sql("DELETE FROM t")
        if rows:
            (result,) = db.run(operation(EXECUTE, "INSERT INTO t VALUES (?, ?, ?)", rows))  # type: ignore[arg-type]
            assert result.changes == len(rows)
        assert db.sql("SELECT a, b, c FROM t ORDER BY rowid") == rows

    rows_come_back()


def test_names_and_types_of_columns_are_told_when_asked_for(connect: Connect) -> None:
    db = connect()
    db.script("CREATE TABLE t(number INTEGER, at [time stamp])")
    (result,) = db.run(operation(EXECUTE, "SELECT number, at AS 'when', 1 + 1 FROM t", flags=DESCRIBE))
    assert result.columns == (("number", "INTEGER"), ("when", "time stamp"), ("1 + 1", None))
    assert result.flags & READS
    (result,) = db.run(operation(EXECUTE, "SELECT number FROM t"))
    assert result.columns == ()
    assert result.width == 1


def test_parameters_are_found_by_name(connect: Connect) -> None:
    db = connect()
    (result,) = db.run(operation(EXECUTE, "SELECT :b, @a, $b", [(1, "two", 3.0)], keys=["a", "b", "unused"]))
    assert result.rows == [("two", 1, "two")]
    with pytest.raises(SqlError) as failed:
        db.run(operation(EXECUTE, "SELECT :b, :missing", [(1,)], keys=["b"]))
    assert failed.value.code == PARAMETERS


def test_a_hundred_reads_are_one_call(connect: Connect) -> None:
    db = connect()
    db.script("CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT)")
    db.run(operation(EXECUTE, "INSERT INTO t VALUES (?, ?)", [(n, f"value {n}") for n in range(100)]))
    reads = [operation(EXECUTE, "SELECT v FROM t WHERE id = ?", [(n,)]) for n in range(100)]
    assert [result.rows for result in db.run(*reads)] == [[(f"value {n}",)] for n in range(100)]


def test_what_does_not_fit_into_one_reply_is_fetched(connect: Connect) -> None:
    db = connect()
    (first,) = db.run(operation(EXECUTE, COUNT.format(1000), rows=10))
    assert first.rows == [(n,) for n in range(1, 11)]
    assert first.flags & MORE
    (second,) = db.run(operation(FETCH, cursor=first.cursor), max_reply=4096)
    assert second.flags & MORE
    (third,) = db.run(operation(FETCH, cursor=first.cursor))
    assert not third.flags & MORE
    assert first.rows + second.rows + third.rows == [(n,) for n in range(1, 1001)]
    with pytest.raises(SqlError) as failed:
        db.run(operation(FETCH, cursor=first.cursor))
    assert failed.value.code == CURSOR


def test_a_cursor_keeps_the_parameters_that_it_began_with(connect: Connect) -> None:
    db = connect()
    text = "SELECT ?1 || n FROM (" + COUNT.format(50) + ")"
    (first,) = db.run(operation(EXECUTE, text, [("row ",)], rows=1))
    db.sql("SELECT ?", "x" * 5000)  # what lay where the request was
    (rest,) = db.run(operation(FETCH, cursor=first.cursor))
    assert rest.rows == [(f"row {n}",) for n in range(2, 51)]


def test_a_row_too_long_for_the_reply_tells_what_it_needs(connect: Connect) -> None:
    db = connect()
    with pytest.raises(SqlError) as failed:
        db.run(operation(EXECUTE, "SELECT zeroblob(100000)"))
    assert failed.value.code == ROOM
    (result,) = db.run(operation(FETCH, cursor=failed.value.row), max_reply=failed.value.needed)
    assert result.rows == [(bytes(100000),)]


def test_operations_that_no_reply_has_room_for_are_not_begun(connect: Connect) -> None:
    db = connect()
    db.script("CREATE TABLE t(v)")
    work = [operation(EXECUTE, "SELECT zeroblob(400)"), operation(EXECUTE, "INSERT INTO t VALUES (1)")] * 10
    results = db.run(*work, max_reply=4096)
    assert len(results) < len(work)
    assert db.sql("SELECT count(*) FROM t") == [(sum(1 for result in results if result.flags & CHANGES),)]


def test_errors_are_sqlites_own(connect: Connect) -> None:
    db = connect()
    with pytest.raises(SqlError, match='near "SELEC": syntax error') as failed:
        db.sql("  SELEC 1")
    assert (failed.value.code, failed.value.offset) == (1, 2)
    db.script("CREATE TABLE t(v UNIQUE)")
    with pytest.raises(SqlError, match=r"UNIQUE constraint failed: t\.v") as failed:
        db.run(operation(EXECUTE, "INSERT INTO t VALUES (?)", [(1,), (2,), (1,)]))
    assert (failed.value.code & 0xFF, failed.value.code, failed.value.row) == (CONSTRAINT, 2067, 2)
    assert db.sql("SELECT v FROM t") == [(1,), (2,)]


@pytest.mark.parametrize(
    ("text", "sets", "code"),
    [
        ("SELECT 1; SELECT 2", [], STATEMENTS),
        ("SELECT ?, ?", [(1,)], PARAMETERS),
        ("SELECT ?", [], PARAMETERS),
        ("SELECT 1", [(1,)], PARAMETERS),
        ("DELETE FROM sqlite_master WHERE name = ?", [], 1),
    ],
)
def test_wrong_numbers_are_refused(connect: Connect, text: str, sets: list[tuple[int]], code: int) -> None:
    with pytest.raises(SqlError) as failed:
        connect().run(operation(EXECUTE, text, sets))
    assert failed.value.code == code


def test_comments_and_blanks_are_no_second_statement(connect: Connect) -> None:
    db = connect()
    assert db.sql("SELECT 1; -- a comment\n /* and another */ ;") == [(1,)]
    assert db.sql("  -- nothing") == []


def test_a_transaction_begins_by_itself_when_that_is_asked_for(connect: Connect) -> None:
    db = connect()
    (made,) = db.run(operation(EXECUTE, "CREATE TABLE t(v)", begin=1))
    assert not made.flags & TRANSACTION
    (put,) = db.run(operation(EXECUTE, "INSERT INTO t VALUES (1)", begin=2))
    assert put.flags & TRANSACTION
    assert put.last_rowid == 1
    db.sql("ROLLBACK")
    assert db.sql("SELECT * FROM t") == []


def test_rows_that_a_change_returns_are_told_with_their_number(connect: Connect) -> None:
    db = connect()
    db.script("CREATE TABLE t(v)")
    (result,) = db.run(operation(EXECUTE, "INSERT INTO t VALUES (1), (2), (3) RETURNING v * 10"))
    assert (result.rows, result.changes) == ([(10,), (20,), (30,)], 3)


def test_no_more_cursors_are_opened_than_the_connection_may_have(connect: Connect) -> None:
    db = connect(cursors=3)
    begin = operation(EXECUTE, COUNT.format(100), rows=1)
    cursors = [db.run(begin)[0].cursor for _ in range(3)]
    with pytest.raises(SqlError) as failed:
        db.run(begin)
    assert failed.value.code == CURSORS
    db.run(operation(END, cursor=cursors[0]), operation(END, cursor=12345))
    assert db.run(begin)[0].cursor not in cursors


def test_memory_ends_at_the_limit_and_comes_back(connect: Connect) -> None:
    db = connect(memory=2 << 20)
    with pytest.raises(SqlError, match="out of memory") as failed:
        db.sql("SELECT length(zeroblob(3000000) || 'x')")
    assert failed.value.code == 7
    assert db.sql("SELECT 1") == [(1,)]


def test_a_statement_is_stopped_by_a_word_in_the_callers_memory(connect: Connect) -> None:
    db = connect()
    word = ctypes.c_uint32(0)
    timer = threading.Timer(0.05, setattr, (word, "value", 1))
    timer.start()
    with pytest.raises(SqlError) as failed:
        db.run(operation(EXECUTE, SLOW), interrupt=ctypes.addressof(word))
    timer.join()
    assert failed.value.code == INTERRUPTED
    assert db.sql("SELECT 1") == [(1,)]


def test_a_statement_is_stopped_from_another_slot(connect: Connect) -> None:
    db, other = connect(), connect()
    request = db.index.to_bytes(8, "little") + db.number.to_bytes(8, "little")
    with (
        repeatedly(lambda: other.slot.call("db_interrupt", request)),
        pytest.raises(SqlError) as failed,
    ):
        db.sql(SLOW)
    assert failed.value.code == INTERRUPTED
    # only the one that ran, however long the next ones are
    for _ in range(2):
        assert db.sql(f"SELECT count(*) FROM ({COUNT.format(50_000)})") == [(50_000,)]
    other.slot.call("db_interrupt", request)  # while nothing runs
    assert db.sql(f"SELECT count(*) FROM ({COUNT.format(50_000)})") == [(50_000,)]


def test_each_slot_has_its_own_memory_database(connect: Connect) -> None:
    one, two = connect(), connect()
    one.script("CREATE TABLE t(v)")
    two.script("CREATE TABLE t(w)")
    with pytest.raises(teemate.CallFailed):
        Connection(one.slot)
    one.close()
    again = Connection(one.slot)
    assert again.sql("SELECT name FROM sqlite_master") == []


def test_other_files_are_out_of_reach(connect: Connect) -> None:
    db = connect()
    for text in ("ATTACH 'other' AS o", "VACUUM INTO 'copy'", "VACUUM INTO 'co' || 'py'"):
        with pytest.raises(SqlError) as failed:
            db.sql(text)
        assert failed.value.code & 0xFF in (1, 23)


def test_no_expression_leads_to_another_database_or_twice_to_ones_own(connect: Connect) -> None:
    db, other = connect("accounts"), connect("other")
    for made in (db, other):
        made.script("CREATE TABLE t(v)")
    for text, values in (
        ("ATTACH 'oth' || 'er' AS o", ()),
        ("ATTACH ? AS o", ("other",)),
        ("ATTACH ? AS o", ("other-wal",)),
        ("ATTACH lower('ACCOUNTS') AS o", ()),
        ("ATTACH (SELECT 'accounts') AS o", ()),
    ):
        with pytest.raises(SqlError) as failed:
            db.sql(text, *values)
        assert failed.value.code & 0xFF in (1, 23), text
    for text in ("ATTACH ':memory:' AS m", "ATTACH '' AS n", "VACUUM"):
        db.sql(text)
    assert [row[1] for row in db.sql("PRAGMA database_list")] == ["main", "m", "n"]


def test_deep_expressions_and_json_end_before_the_stack_does(connect: Connect) -> None:
    db = connect()
    for text in (
        "SELECT " + "(" * 150 + "1" + ")" * 150,
        "SELECT " + "-" * 3000 + "1",
        "SELECT 1" + " + 1" * 5000,
        "SELECT json('" + "[" * 5000 + "]" * 5000 + "')",
        "SELECT " + "abs(" * 150 + "1" + ")" * 150,
        "SELECT * FROM " + "(SELECT * FROM " * 90 + "(SELECT 1)" + ")" * 90,
    ):
        try:
            db.sql(text)
        except SqlError as failed:
            assert failed.code & 0xFF in (1, 7, 18)  # noqa: PT017
    assert db.sql("SELECT 1") == [(1,)]


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"\1",
        bytes(16),
        (1).to_bytes(4, "little") + bytes(12),
        (1).to_bytes(4, "little") + bytes(12) + b"\xff" * 28,
        (1).to_bytes(4, "little") + bytes(12) + b"\1\0\4" + bytes(25),
        (9).to_bytes(4, "little") + bytes(12) + operation(EXECUTE, "SELECT ?", [("x",)])[:-1],
        (1).to_bytes(4, "little")
        + bytes(12)
        + operation(EXECUTE, "SELECT ?, ?", [(1, 2)]).replace(b"\2", b"\xff"),
    ],
    ids=lambda request: f"{len(request)} bytes",
)
def test_requests_that_cannot_be_are_refused(connect: Connect, request_: bytes) -> None:
    db = connect()
    try:
        reply = db.slot.call("db_run", request_)
    except teemate.CallFailed as failed:
        assert failed.status == -1  # noqa: PT017
    else:
        assert not reply or int.from_bytes(reply[4:8], "little", signed=True) in (REQUEST, PARAMETERS)
    assert db.sql("SELECT 1") == [(1,)]
