"""Every limit ends what would go beyond it with an error that names it, and the connection goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from connections import database_image
from processes import repeatedly, wait_until
from running_broker import RunningBroker

import teemate
from teemate import db
from teemate.db._wire import encode_execute, encode_set

Open = Callable[..., Any]

SLOW = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) FROM c"
NUMBERS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < ?)"
FILL = f"{NUMBERS} SELECT randomblob(1000) FROM c"


@pytest.fixture
def connect(enclave: teemate.Enclave) -> Iterator[Open]:
    """Open databases in the enclave, and close them."""
    with contextlib.ExitStack() as opened:
        yield lambda name=":memory:", **options: opened.enter_context(
            contextlib.closing(db.connect(enclave, name, **options))
        )


@contextlib.contextmanager
def reached(limit: str, setting: str) -> Iterator[None]:
    """Expect an error about that limit, of this module and of TeeMate."""
    with pytest.raises(db.LimitReached) as failed:
        yield
    assert isinstance(failed.value, teemate.LimitReached)
    assert isinstance(failed.value, db.OperationalError)
    assert failed.value.code == "limit-reached"
    assert (failed.value.detail["limit"], failed.value.detail["setting"]) == (limit, setting)
    assert limit.split()[0] in str(failed.value)


def test_memory(connect: Open) -> None:
    connection = connect(memory=2 << 20)
    connection.execute("CREATE TABLE t(v)")
    with reached("memory", "connect(memory=)"):
        connection.execute(f"INSERT INTO t {FILL}", (5000,))
    connection.rollback()
    assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_open_cursors(connect: Open) -> None:
    connection = connect(cursors=3)
    numbers = f"{NUMBERS.replace('?', '500')} SELECT n FROM c"
    cursors = [connection.execute(numbers) for _ in range(3)]
    with reached("cursors", "connect(cursors=)"):
        connection.execute(numbers)
    cursors.pop().close()
    assert len(connection.execute(numbers).fetchall()) == 500


def test_statement_time(connect: Open) -> None:
    connection = connect(statement_timeout=0.3)
    with reached("statement_timeout", "connect(statement_timeout=)"):
        connection.execute(SLOW)
    assert connection.execute("SELECT 1").fetchone() == (1,)


def test_size_of_a_database_whoever_writes_and_whatever_they_set(connect: Open) -> None:
    owner, other = connect("ledger"), connect("ledger")
    owner.execute("CREATE TABLE t(v)")
    anything = "PRAGMA max_page_count = 100000"
    other.execute("SELECT * FROM t").fetchall()  # or its statements are made anew, with the schema
    with pytest.raises(db.ProgrammingError):  # it has no parameter: the enclave keeps it, and it has not run
        other._run(encode_execute(anything.encode(), [encode_set([1])], parameters=1, rows=1))
    owner.limit(1 << 20)
    assert owner.describe().size_limit == 1 << 20
    for connection in (other, owner, connect("ledger")):
        connection.execute(anything).fetchall()
        with reached("size of a database", "teemate db limit"), connection:
            connection.execute(f"INSERT INTO t {FILL}", (2000,))
        assert not connection.in_transaction
        assert owner.describe().size <= 1 << 20
    with other:
        other.execute(f"INSERT INTO t {FILL}", (500,))
    owner.limit(0)
    with other:
        other.execute(f"INSERT INTO t {FILL}", (2000,))
    assert owner.execute("SELECT count(*) FROM t").fetchone() == (2500,)
    assert owner.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_what_is_larger_than_a_new_limit_stays_and_can_shrink(connect: Open) -> None:
    connection = connect("ledger", isolation_level=None)
    connection.execute("CREATE TABLE t(v)")
    connection.execute(f"INSERT INTO t {FILL}", (1000,))
    connection.limit(100_000)
    with reached("size of a database", "teemate db limit"):
        connection.execute(f"INSERT INTO t {FILL}", (10,))
    connection.execute("DELETE FROM t WHERE rowid > 20")
    connection.execute("VACUUM")
    connection.execute(f"INSERT INTO t {FILL}", (10,))
    assert connection.execute("SELECT count(*) FROM t").fetchone() == (30,)


@pytest.mark.parametrize("size", [-1, (8 << 30) + 1, "1M"])
def test_a_size_is_one_that_can_be(connect: Open, size: Any) -> None:
    with pytest.raises(db.ProgrammingError):
        connect("ledger").limit(size)


def test_storage_of_all_files(
    broker: Callable[..., RunningBroker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    running = broker(
        f'[broker]\nstate_directory = "{tmp_path / "state"}"\n'
        f'[[enclave]]\nname = "db"\nimage = "{database_image()}"\nstorage = true\nstorage_limit = 600_000\n'
        f"[[enclave.attach]]\nuid = {os.geteuid()}\n"
    )
    monkeypatch.setenv("TEEMATE_SOCKET", running.socket)
    with contextlib.closing(db.connect("db", "ledger")) as connection:
        connection.execute("CREATE TABLE t(v)")
        with reached("storage_limit", "[[enclave]] storage_limit, and the host's disk"), connection:
            connection.execute(f"INSERT INTO t {FILL}", (2000,))
        with connection:
            connection.execute("INSERT INTO t VALUES ('small')")
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (1,)


@pytest.mark.parametrize("what", ["statement", "copy"])
def test_another_thread_ends_a_statement_that_runs_and_a_copy_too(connect: Open, what: str) -> None:
    connection = connect("ledger", check_same_thread=False)
    connection.execute("CREATE TABLE t(v)")
    with connection:
        connection.execute(f"INSERT INTO t {FILL}", (500,))
    actions = {
        "statement": lambda: connection.execute(SLOW),
        "copy": lambda: connection.backup(
            "copy", pages=1, progress=lambda *_: wait_for_interrupt(connection)
        ),
    }
    with repeatedly(connection.interrupt), pytest.raises(db.OperationalError, match="interrupted") as failed:
        actions[what]()
    assert failed.value.sqlite_errorname == "SQLITE_INTERRUPT"
    connection.backup("copy")
    assert connect("copy").execute("SELECT count(*) FROM t").fetchone() == (500,)


def wait_for_interrupt(connection: Any) -> None:
    wait_until(lambda: connection._word.value == 1, "nobody interrupts")
