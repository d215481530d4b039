"""teemate.db on trio: the same answers, and cancelling ends what runs in the enclave."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from connections import database_image
from raw_client import raw_client
from running_broker import RunningBroker

import teemate
from teemate import db

SLOW = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) FROM c"
ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c)"


async def test_statements_rows_and_transactions_are_those_of_the_synchronous_api(
    enclave: teemate.Enclave,
) -> None:
    async with db.open_connection(enclave, "ledger") as connection:
        connection.row_factory = db.Row
        async with connection.transaction():
            await connection.execute("CREATE TABLE t(n INTEGER, v)")
            cursor = await connection.executemany(
                "INSERT INTO t VALUES (?, ?)", [(n, n * n) for n in range(500)]
            )
            assert cursor.rowcount == 500
            assert await connection.total_changes() == 500
        rows = [
            row
            async for row in await connection.execute("SELECT n, v FROM t WHERE n >= :from", {"from": 100})
        ]
        assert [(row["n"], row["v"]) for row in rows] == [(n, n * n) for n in range(100, 500)]
        cursor = await connection.execute("SELECT n FROM t")
        assert cursor.description is not None
        assert cursor.description[0][0] == "n"
        assert tuple(await cursor.fetchone()) == (0,)
        assert [tuple(row) for row in await cursor.fetchmany(2)] == [(1,), (2,)]
        assert len(await cursor.fetchall()) == 497
        assert await cursor.fetchone() is None
        with pytest.raises(db.OperationalError, match="no such column"):
            await _delete_and_fail(connection)
        assert (await (await connection.execute("SELECT count(*) FROM t")).fetchone())[0] == 500
        with pytest.raises(db.OperationalError, match="no such table"):
            await connection.execute("SELECT * FROM absent")
        await connection.executescript("CREATE TABLE u(v); INSERT INTO u VALUES (1)")
    with contextlib.closing(db.connect(enclave, "ledger")) as again:
        assert again.execute("SELECT count(*) FROM t, u").fetchone() == (500,)


async def _delete_and_fail(connection: db.AsyncConnection) -> None:
    async with connection.transaction():
        await connection.execute("DELETE FROM t")
        await connection.execute("SELECT missing FROM t")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def cancelled_while_it_runs(action: Callable[[], Any]) -> None:
    """Cancel it when it has begun, whenever that is."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await trio.sleep(0.05)
                scope.cancel()

            nursery.start_soon(cancel)
            await action()
    assert scope.cancelled_caught


async def test_a_cancelled_statement_ends_in_the_enclave_and_the_connection_goes_on(
    enclave: teemate.Enclave,
) -> None:
    async with db.open_connection(enclave, "ledger") as connection:
        await connection.execute("CREATE TABLE t(v)")
        for _ in range(3):
            await cancelled_while_it_runs(lambda: connection.execute(SLOW))
            assert await (await connection.execute("SELECT 7")).fetchone() == (7,)
        await connection.execute("INSERT INTO t VALUES ('begun')")
        assert connection.in_transaction
        await cancelled_while_it_runs(lambda: connection.execute(f"INSERT INTO t {ENDLESS} SELECT 1 FROM c"))
        assert not connection.in_transaction  # SQLite rolls back what an interrupted change was part of
        assert await (await connection.execute("SELECT count(*) FROM t")).fetchone() == (0,)
        with contextlib.closing(db.connect(enclave, "ledger")) as other, other:
            other.execute("INSERT INTO t VALUES ('no lock is left')")


async def test_a_scope_that_is_cancelled_before_ends_a_statement_too(enclave: teemate.Enclave) -> None:
    async with db.open_connection(enclave) as connection:
        with trio.CancelScope() as scope:
            scope.cancel()
            await connection.execute(SLOW)
        assert scope.cancelled_caught
        assert await (await connection.execute("SELECT 1")).fetchone() == (1,)


async def test_a_transaction_that_is_cancelled_is_rolled_back(enclave: teemate.Enclave) -> None:
    async with db.open_connection(enclave, "ledger") as connection:
        await connection.execute("CREATE TABLE t(v)")

        async def work() -> None:
            async with connection.transaction():
                await connection.execute("INSERT INTO t VALUES (1)")
                await connection.execute(SLOW)

        await cancelled_while_it_runs(work)
        assert not connection.in_transaction
        assert await (await connection.execute("SELECT count(*) FROM t")).fetchone() == (0,)


async def test_a_cancelled_read_of_rows_leaves_the_connection_usable(enclave: teemate.Enclave) -> None:
    async with db.open_connection(enclave) as connection:
        cursor = await connection.execute(f"{ENDLESS} SELECT n FROM c")
        assert await cursor.fetchone() == (1,)
        await cancelled_while_it_runs(cursor.fetchall)
        assert await (await connection.execute("SELECT 1")).fetchone() == (1,)
        await cursor.aclose()


async def test_tasks_share_a_connection_by_turns_and_one_interrupts_another(enclave: teemate.Enclave) -> None:
    async with db.open_connection(enclave) as connection:
        await connection.execute("CREATE TABLE t(v)")

        async def insert(number: int) -> None:
            for _ in range(20):
                await connection.execute("INSERT INTO t VALUES (?)", (number,))

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(insert, number)
        assert await (await connection.execute("SELECT count(*) FROM t")).fetchone() == (100,)
        over = trio.Event()

        async def interrupt() -> None:
            while not over.is_set():
                connection.interrupt()
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(interrupt)
            with pytest.raises(db.OperationalError, match="interrupted"):
                await connection.execute(SLOW)
            over.set()


async def test_leaving_the_block_ends_what_runs_for_other_tasks(enclave: teemate.Enclave) -> None:
    async def count(connection: db.AsyncConnection) -> None:
        with pytest.raises(db.Error, match=r"interrupted|closed"):
            await connection.execute(SLOW)
        ended.append(connection)

    ended: list[db.AsyncConnection] = []
    async with trio.open_nursery() as nursery:
        async with db.open_connection(enclave) as connection:
            nursery.start_soon(count, connection)
            nursery.start_soon(count, connection)
            await trio.testing.wait_all_tasks_blocked()
    assert len(ended) == 2


async def test_the_loop_goes_on_while_a_statement_runs(enclave: teemate.Enclave) -> None:
    async with db.open_connection(enclave) as connection:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while turns < 50:
                await trio.sleep(0.001)
                turns += 1
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            await connection.execute(SLOW)
        assert turns == 50


async def test_copies_and_rights_are_there_too_and_a_cancelled_copy_leaves_nothing(
    enclave: teemate.Enclave, tmp_path: Path, storage: Path
) -> None:
    async with db.open_connection(enclave, "ledger") as connection:
        await connection.executescript("CREATE TABLE t(v); INSERT INTO t VALUES (1)")
        await connection.backup("copy")
        await connection.export(tmp_path / "out")
        await connection.grant(uid=4002)
        await connection.revoke(uid=4002)
        await connection.limit(1 << 20)
        assert (await connection.describe()).size_limit == 1 << 20
        assert connection.access is db.Access.OWNER
        with trio.CancelScope() as scope:
            scope.cancel()
            await connection.backup("second")
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            scope.cancel()
            await connection.export(tmp_path / "second")
        assert scope.cancelled_caught
        assert await (await connection.execute("SELECT count(*) FROM t")).fetchone() == (1,)
    assert names(storage) == {"ledger", "ledger-root", "ledger-wal", "copy", "copy-root"}
    assert names(tmp_path) == {"out", "storage"}


async def test_a_database_that_is_not_open_comes_in_is_listed_and_is_deleted(
    enclave: teemate.Enclave, tmp_path: Path, storage: Path
) -> None:
    async with db.open_connection(enclave, "ledger") as connection:
        await connection.executescript("CREATE TABLE t(v); INSERT INTO t VALUES ('x'), (NULL)")
        dumped = [statement async for statement in connection.iterdump()]
        await connection.export(tmp_path / "out")
    assert dumped == list(memory(dumped).iterdump())
    with trio.CancelScope() as scope:
        scope.cancel()
        await db.async_import_file(enclave, tmp_path / "out", "again")
    assert scope.cancelled_caught
    assert names(storage) == {"ledger", "ledger-root", "ledger-wal"}
    seen: list[tuple[int, int]] = []
    await db.async_import_file(enclave, tmp_path / "out", "again", progress=lambda *at: seen.append(at))
    assert seen == [(2, 2)]
    assert [listing.name for listing in await db.async_databases(enclave)] == ["again", "ledger"]
    async with db.open_connection(enclave, "again") as connection:
        with pytest.raises(db.OperationalError) as failure:
            await db.async_delete(enclave, "again")
        assert failure.value.sqlite_errorname == "SQLITE_BUSY"
        assert await (await connection.execute("SELECT count(*) FROM t")).fetchone() == (2,)
    await db.async_delete(enclave, "again")
    assert [listing.name for listing in await db.async_databases(enclave)] == ["ledger"]


def memory(statements: list[str]) -> sqlite3.Connection:
    """Return what plain sqlite3 makes of a dump."""
    connection = sqlite3.connect(":memory:")
    connection.executescript("\n".join(statements))
    return connection


async def test_by_way_of_the_broker_by_name_and_on_an_attached_enclave(
    broker: Callable[..., RunningBroker], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = broker(
        f'[[enclave]]\nname = "db"\nimage = "{database_image()}"\nslots_per_client = 16\n'
        f"[[enclave.attach]]\nuid = {os.geteuid()}\n"
    )
    monkeypatch.setenv("TEEMATE_SOCKET", running.socket)
    async with db.open_connection("db") as one, db.open_connection("db") as two:
        await one.execute("CREATE TABLE t(v)")
        with pytest.raises(db.OperationalError, match="no such table"):
            await two.execute("SELECT * FROM t")
        with raw_client(running.socket) as others:
            free = others.ok("enclaves")["enclaves"][0]["slots"]["free"]
            others.ok("attach", enclave="db", slots=free)
            await cancelled_while_it_runs(lambda: _opened("db"))
    async with teemate.open_broker() as client, client.attach("db", slots=1) as enclave:
        for _ in range(3):
            async with db.open_connection(enclave) as connection:
                assert await (await connection.execute("SELECT 1")).fetchone() == (1,)
                await cancelled_while_it_runs(lambda: _opened(enclave))


async def _opened(enclave: Any) -> None:
    async with db.open_connection(enclave):
        raise AssertionError("there is no free slot")
