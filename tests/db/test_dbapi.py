"""teemate.db does with a database in the enclave what sqlite3 does with one of its own."""

from __future__ import annotations

import array
import contextlib
import datetime
import gc
import math
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import repeatedly, wait_until

import teemate
from teemate import db
from teemate.db._statement import statement_of

Open = Callable[..., Any]

SLOW = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) FROM c"


@pytest.fixture
def connect(enclave: teemate.Enclave) -> Iterator[Open]:
    """Open databases in the enclave, and close them."""
    opened: list[Any] = []

    def one(database: str = ":memory:", **options: Any) -> Any:
        opened.append(db.connect(enclave, database, **options))
        return opened[-1]

    yield one
    for connection in opened:
        connection.close()


@pytest.fixture
def plain() -> Iterator[sqlite3.Connection]:
    """The real sqlite3."""
    connection = sqlite3.connect(":memory:")
    yield connection
    connection.close()


def test_values_of_any_type_come_back(connect: Open) -> None:
    connection = connect()
    values = st.one_of(
        st.none(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False),
        st.text(st.characters(exclude_categories=["Cs"])),
        st.binary(),
    )

    @given(st.lists(values, min_size=1, max_size=30))
    def come_back(row: list[object]) -> None:
        (read,) = connection.execute("SELECT " + ", ".join("?" * len(row)), row).fetchall()
        assert list(read) == row
        assert list(map(type, read)) == list(map(type, row))

    come_back()


def test_a_nan_is_null_as_with_sqlite3(connect: Open, plain: sqlite3.Connection) -> None:
    assert connect().execute("SELECT ?", (math.nan,)).fetchone() == (None,)
    assert plain.execute("SELECT ?", (math.nan,)).fetchone() == (None,)


def test_dates_come_back_where_the_column_says_so(connect: Open) -> None:
    connection = connect(detect_types=db.PARSE_DECLTYPES | db.PARSE_COLNAMES)
    day, moment = datetime.date(2026, 2, 28), datetime.datetime(2026, 2, 28, 23, 59, 1, 20)
    connection.execute("CREATE TABLE t(day date, moment timestamp)")
    connection.execute("INSERT INTO t VALUES (?, ?)", (day, moment))
    assert connection.execute("SELECT * FROM t").fetchone() == (day, moment)
    assert connection.execute('SELECT max(day) AS "latest [date]" FROM t').fetchone() == (day,)


def test_more_rows_than_one_answer_holds_come_in_batches(connect: Open) -> None:
    connection = connect()
    connection.execute("CREATE TABLE t(n, text)")
    rows = [(n, f"{n} " * 200) for n in range(1500)]
    assert connection.executemany("INSERT INTO t VALUES (?, ?)", iter(rows)).rowcount == 1500
    cursor = connection.execute("SELECT * FROM t ORDER BY n")
    assert cursor.fetchone() == rows[0]
    assert cursor.fetchmany(200) == rows[1:201]
    assert cursor.fetchall() == rows[201:]
    assert cursor.fetchall() == []
    assert list(connection.execute("SELECT * FROM t ORDER BY n")) == rows


def test_a_row_longer_than_an_answer_comes_whole(connect: Open) -> None:
    connection = connect()
    long = "ä" * 300000
    cursor = connection.execute("SELECT 1, ? UNION ALL SELECT 2, 'short' ORDER BY 1", (long,))
    assert cursor.fetchall() == [(1, long), (2, "short")]
    assert [column[0] for column in cursor.description] == ["1", "?"]


def test_a_column_that_was_added_is_there_in_a_statement_that_was_kept(connect: Open) -> None:
    connection = connect()
    connection.execute("CREATE TABLE t(a)")
    connection.execute("INSERT INTO t VALUES (1)")
    for added in ("b", "c"):
        connection.execute("SELECT * FROM t").fetchall()
        connection.execute(f"ALTER TABLE t ADD {added}")
    cursor = connection.execute("SELECT * FROM t")
    assert [column[0] for column in cursor.description] == ["a", "b", "c"]
    assert cursor.fetchall() == [(1, None, None)]


def test_a_later_row_that_is_longer_than_an_answer_comes_whole(connect: Open) -> None:
    connection = connect()
    three = "SELECT 'a' UNION ALL SELECT hex(zeroblob(100000)) UNION ALL SELECT 'z'"
    rows = connection.execute(three).fetchall()
    assert [len(text) for (text,) in rows] == [1, 200000, 1]


def test_cursors_that_were_dropped_take_no_place(connect: Open) -> None:
    connection = connect(cursors=4)
    connection.execute("CREATE TABLE t(n)")
    connection.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(1000)])
    for _ in range(20):
        assert connection.execute("SELECT n FROM t").fetchone() == (0,)
    kept = [connection.execute("SELECT n FROM t") for _ in range(4)]
    with pytest.raises(db.OperationalError, match="more cursors are open"):
        connection.execute("SELECT n FROM t")
    kept[0].close()
    assert connection.execute("SELECT n FROM t").fetchone() == (0,)


def test_leaving_a_connection_commits_or_rolls_back(connect: Open) -> None:
    connection = connect()
    connection.execute("CREATE TABLE t(n)")
    with connection:
        connection.execute("INSERT INTO t VALUES (1)")
        assert connection.in_transaction
    assert not connection.in_transaction
    with contextlib.suppress(ZeroDivisionError), connection:
        connection.execute("INSERT INTO t VALUES (2)")
        raise ZeroDivisionError
    assert connection.execute("SELECT n FROM t").fetchall() == [(1,)]


def test_ctrl_c_leaves_a_with_block_as_itself(enclave: teemate.Enclave, connect: Open) -> None:
    connection = connect()
    connection.execute("CREATE TABLE t(n)")

    def press(before: int) -> None:
        wait_until(lambda: enclave.statistics().pauses > before, "the statement runs")
        os.kill(os.getpid(), signal.SIGINT)

    def work() -> None:
        with connection:
            connection.execute("INSERT INTO t VALUES (1)")
            threading.Thread(target=press, args=(enclave.statistics().pauses,)).start()
            connection.execute(SLOW)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not connection.in_transaction
    with pytest.raises(db.OperationalError, match="out of use"):
        connection.execute("SELECT 1")


def test_what_executemany_has_taken_is_done_when_its_iterator_fails(
    connect: Open, plain: sqlite3.Connection
) -> None:
    def rows() -> Iterator[tuple[int]]:
        yield (1,)
        yield (2,)
        raise ZeroDivisionError

    for connection in (connect(), plain):
        connection.execute("CREATE TABLE t(n)")
        with pytest.raises(ZeroDivisionError):
            connection.executemany("INSERT INTO t VALUES (?)", rows())
        assert connection.execute("SELECT n FROM t").fetchall() == [(1,), (2,)]


def test_a_statement_is_ended_from_another_thread(connect: Open) -> None:
    connection = connect(check_same_thread=False)
    with repeatedly(connection.interrupt), pytest.raises(db.OperationalError, match="interrupted") as ended:
        connection.execute(SLOW)
    assert ended.value.sqlite_errorname == "SQLITE_INTERRUPT"
    assert connection.execute("SELECT 1").fetchone() == (1,)


def test_memory_ends_at_the_limit(connect: Open) -> None:
    connection = connect(memory=2 << 20)
    with pytest.raises(db.OperationalError, match="connect with more `memory`") as ended:
        connection.execute("SELECT length(zeroblob(3000000) || 'x')")
    assert ended.value.sqlite_errorname == "SQLITE_NOMEM"
    assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_slot_is_free_again_when_nobody_has_the_connection(enclave: teemate.Enclave) -> None:
    for _ in range(40):  # more than there are slots
        db.connect(enclave).execute("CREATE TABLE t(n)")
    gc.collect()
    assert enclave.statistics().free == enclave.statistics().slots


def test_parts_of_a_blob_whose_items_have_more_than_a_byte_follow_one_another(
    connect: Open, plain: sqlite3.Connection
) -> None:
    read = []
    for connection in (connect(), plain):
        connection.execute("CREATE TABLE t(b)")
        connection.execute("INSERT INTO t VALUES (zeroblob(16))")
        with connection.blobopen("t", "b", 1) as blob:
            blob.write(array.array("H", [1, 2]))
            assert blob.tell() == 4
            blob.write(array.array("I", [3]))
        read.append(connection.execute("SELECT b FROM t").fetchone())
    assert read[0] == read[1]


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", ".hidden", "x" * 49, "a-wal", "a b", "ä"])
def test_names_that_no_database_has_are_refused(connect: Open, name: str) -> None:
    with pytest.raises(db.OperationalError, match="is no name of a database") as refused:
        connect(name)
    assert refused.value.sqlite_errorname == "SQLITE_CANTOPEN"


def test_what_would_call_back_says_so(connect: Open) -> None:
    connection = connect()
    with pytest.raises(db.NotSupportedError, match="nothing of this program is called from inside"):
        connection.create_collation("c", lambda one, two: 0)


def test_a_function_of_the_program_is_refused_where_it_is_used(connect: Open) -> None:
    connection = connect()
    connection.create_function("Shout", 1, str.upper)
    with pytest.raises(db.NotSupportedError, match="the function SHOUT is this program's"):
        connection.execute("SELECT SHOUT('a')")
    with pytest.raises(db.OperationalError, match="no such function: whisper"):
        connection.execute("SELECT whisper('a')")
    with pytest.raises(db.NotSupportedError):  # else SQLite's own would be called, and nobody see it
        connection.create_function("UPPER", 1, str.lower)


@pytest.mark.parametrize(
    ("sql", "count", "names"),
    [
        ("SELECT ?, ?", 2, ()),
        ("SELECT ?3, ?", 4, ("3",)),
        ("SELECT :a, @b, $c, :a", 3, ("a", "b", "c")),
        ("SELECT ':a', \"?\", [?], `:b`, x'00' -- ?\n, /* ? */ ?", 1, ()),
        ("SELECT 'it''s ?', ? /* open ?", 1, ()),
        ("SELECT a->'$.b' FROM t WHERE x=:x1", 1, ("x1",)),
    ],
)
def test_parameters_are_counted_as_sqlite_counts_them(
    plain: sqlite3.Connection, sql: str, count: int, names: tuple[str, ...]
) -> None:
    statement = statement_of(sql)
    assert (statement.parameters, statement.names) == (count, names)
    if " t " not in sql:
        text = sql.replace("[?]", "1").replace("`:b`", "1")  # which are columns that there are not
        with pytest.raises(sqlite3.ProgrammingError, match=f"uses {count}, and there are {count + 1}"):
            plain.execute(text, (0,) * (count + 1))


PIECES = [
    "SELECT 1",
    ";",
    "'",
    '"',
    "`",
    "[",
    "]",
    "--",
    "/*",
    "*/",
    "\n",
    " ",
    "x",
    "create ",
    "temp ",
    "trigger ",
    "end",
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_what_is_complete_is_what_sqlite_says_is_complete(text: str) -> None:
    assert db.complete_statement(text) == sqlite3.complete_statement(text)
