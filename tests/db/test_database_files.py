"""Databases in files: what is committed stays, and connections see each other's as SQLite promises."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from connections import BUSY, CREATE, EXECUTE, READONLY, Connection, SqlError, operation

import teemate

Connect = Callable[..., Connection]
Life = Callable[[], teemate.Enclave]


def fill(db: Connection, rows: int = 100) -> None:
    db.script("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
    db.run(
        operation(
            EXECUTE, "INSERT INTO t VALUES (?, ?)", [(n, f"PLAIN{n:05}" * 20) for n in range(rows)], begin=2
        )
    )
    db.sql("COMMIT")


def test_what_was_committed_is_there_in_the_enclaves_next_life(life: Life) -> None:
    for number in range(3):
        with life() as enclave, enclave.slot() as slot:
            db = Connection(slot, "accounts")
            if not number:
                db.script("CREATE TABLE t(v)")
            db.sql("INSERT INTO t VALUES (?)", number)
            assert db.sql("SELECT v FROM t") == [(n,) for n in range(number + 1)]
            assert db.sql("PRAGMA integrity_check") == [("ok",)]
            if number == 1:
                assert db.sql("PRAGMA wal_checkpoint(TRUNCATE)")[0][0] == 0


def test_nothing_of_it_can_be_read_in_the_files(connect: Connect, storage: Path) -> None:
    db = connect("accounts")
    fill(db, 500)
    db.sql("PRAGMA wal_checkpoint(FULL)")
    files = {path.name: path.read_bytes() for path in storage.iterdir()}
    assert set(files) == {"accounts", "accounts-root", "accounts-wal"}
    for name, data in files.items():
        assert len(data) > (100_000 if name != "accounts-root" else 8000)
        for text in (b"PLAIN", b"SQLite", b"CREATE", b"accounts"):
            assert text not in data


def test_files_are_the_owners_alone(connect: Connect, storage: Path) -> None:
    fill(connect("accounts"))
    assert {path.stat().st_mode & 0o777 for path in storage.iterdir()} == {0o600}


def test_a_reader_sees_what_was_there_when_it_began(connect: Connect) -> None:
    one, two = connect("accounts"), connect("accounts")
    fill(one, 3)
    two.sql("BEGIN")
    assert two.sql("SELECT count(*) FROM t") == [(3,)]
    one.sql("DELETE FROM t WHERE id = 1")
    assert two.sql("SELECT count(*) FROM t") == [(3,)]
    two.sql("COMMIT")
    assert two.sql("SELECT count(*) FROM t") == [(2,)]


def test_one_writes_and_the_other_is_told_so_or_waits(connect: Connect) -> None:
    one, two = connect("accounts"), connect("accounts")
    three = connect("accounts", busy_ms=60_000)
    fill(one, 3)
    one.sql("BEGIN IMMEDIATE")
    with pytest.raises(SqlError, match="locked") as failed:
        two.sql("BEGIN IMMEDIATE")
    assert failed.value.code == BUSY
    waiting = threading.Thread(target=three.sql, args=("UPDATE t SET v = 'three' WHERE id = 1",))
    waiting.start()
    one.sql("UPDATE t SET v = 'one' WHERE id = 1")
    one.sql("COMMIT")
    waiting.join()
    assert two.sql("SELECT v FROM t WHERE id = 1") == [("three",)]


def test_closing_and_losing_the_slot_roll_back(enclave: teemate.Enclave, connect: Connect) -> None:
    other = connect("accounts")
    fill(other, 3)
    with enclave.slot() as slot:
        db = Connection(slot, "accounts")
        db.sql("BEGIN IMMEDIATE")
        db.sql("DELETE FROM t")
        db.close()
        assert other.sql("SELECT count(*) FROM t") == [(3,)]
        db = Connection(slot, "accounts")
        db.sql("BEGIN IMMEDIATE")
        db.sql("DELETE FROM t")
    assert other.sql("SELECT count(*) FROM t") == [(3,)]


def test_a_read_only_connection_writes_nothing(connect: Connect, storage: Path) -> None:
    with pytest.raises(SqlError, match="unable to open"):
        connect("accounts", flags=READONLY)
    assert list(storage.iterdir()) == []
    db = connect("accounts")
    fill(db, 3)
    reader = connect("accounts", flags=READONLY)
    assert reader.sql("SELECT count(*) FROM t") == [(3,)]
    for text in ("DELETE FROM t", "CREATE TABLE u(v)", "PRAGMA user_version = 3"):
        with pytest.raises(SqlError, match="readonly"):
            reader.sql(text)
    db.sql("DELETE FROM t WHERE id = 0")
    assert reader.sql("SELECT count(*) FROM t") == [(2,)]


def test_a_database_stays_in_the_mode_that_all_have(connect: Connect) -> None:
    db = connect("accounts")
    fill(db, 3)
    for text, answer in (("PRAGMA journal_mode=DELETE", "wal"), ("PRAGMA locking_mode=EXCLUSIVE", "normal")):
        assert db.sql(text) == [(answer,)]
    db.sql("PRAGMA page_size=8192")
    db.sql("VACUUM")
    assert db.sql("PRAGMA page_size") == [(4096,)]
    assert db.sql("PRAGMA integrity_check") == [("ok",)]
    assert connect("accounts").sql("SELECT count(*) FROM t") == [(3,)]


def test_a_transaction_larger_than_the_cache_is_rolled_back_and_committed(connect: Connect) -> None:
    db, other = connect("accounts"), connect("accounts")
    db.sql("PRAGMA cache_size = 20")
    fill(db, 10)
    insert = "INSERT INTO t(v) VALUES (zeroblob(1500))"
    db.sql("BEGIN")
    db.run(*[operation(EXECUTE, insert)] * 600, max_reply=1 << 20)
    db.sql("SAVEPOINT s")
    db.sql("UPDATE t SET v = 'changed'")
    db.sql("ROLLBACK TO s")
    assert other.sql("SELECT count(*) FROM t") == [(10,)]
    db.sql("COMMIT")
    assert other.sql("SELECT count(*), max(v = 'changed') FROM t") == [(610, 0)]
    db.sql("BEGIN")
    db.sql("DELETE FROM t")
    db.sql("ROLLBACK")
    db.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    assert other.sql("SELECT count(*) FROM t") == [(610,)]
    assert other.sql("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("cache", [4, 7, 10, 13])
def test_what_was_rolled_back_is_written_over_nobody_elses_commit(connect: Connect, cache: int) -> None:
    one, two = connect("accounts"), connect("accounts")
    fill(one, 200)
    one.sql(f"PRAGMA cache_size = {cache}")  # so that pages go into the log before the end
    one.sql("BEGIN")
    one.sql("UPDATE t SET v = lower(v)")
    one.sql("ROLLBACK")
    two.sql("UPDATE t SET v = id")
    for db in (one, two):
        assert db.sql("SELECT count(*) FROM t WHERE v = id") == [(200,)]
    one.close()
    assert two.sql("SELECT count(*) FROM t WHERE v = id") == [(200,)]
    assert Connection(one.slot, "accounts").sql("PRAGMA integrity_check") == [("ok",)]


def test_an_enclave_without_storage_says_so(diskless: teemate.Enclave) -> None:
    with diskless.slot() as slot, pytest.raises(SqlError, match="no storage"):
        Connection(slot, "accounts")


def test_a_deletion_that_was_cut_short_is_gone_on_with(connect: Connect, storage: Path) -> None:
    for name in ("accounts-wal", "accounts-root"):
        (storage / name).write_bytes(b"left")
    connect().slot.call("db_delete", b"accounts")
    assert list(storage.iterdir()) == []


def test_a_database_is_deleted_when_nobody_has_it(connect: Connect, storage: Path) -> None:
    db, boss = connect("accounts"), connect()
    fill(db, 3)
    for slot in (boss.slot, db.slot):  # its own caller's connection counts too
        with pytest.raises(teemate.CallFailed):
            slot.call("db_delete", b"accounts")
    assert db.sql("SELECT count(*) FROM t") == [(3,)]
    db.close()
    boss.slot.call("db_delete", b"accounts")
    assert list(storage.iterdir()) == []
    with pytest.raises(SqlError):
        Connection(db.slot, "accounts", flags=0)
    again = Connection(db.slot, "accounts", flags=CREATE)
    assert again.sql("SELECT * FROM sqlite_schema") == []


def test_names_without_a_database_take_no_memory_that_stays(connect: Connect) -> None:
    boss = connect()

    def free() -> int:
        return struct.unpack("<8Q", boss.slot.call("db_statistics"))[5]

    def come_and_go(names: range) -> None:
        for n in names:
            with pytest.raises(SqlError):
                Connection(slot, f"missing{n}", flags=0)
            boss.slot.call("db_delete", b"never%d" % n)
            if not n % 5:
                fill(Connection(slot, f"made{n}"), 3)
                slot.call("db_close")
                boss.slot.call("db_delete", b"made%d" % n)

    slot = connect().slot
    slot.call("db_close")
    come_and_go(range(5))
    before = free()
    come_and_go(range(5, 50))
    assert free() >= before - 65536  # one alone takes some 50 KiB


@pytest.mark.parametrize("name", ["", ".x", "-x", "a/b", "a-wal", "a-journal", "x" * 49, "a\0b", "ä"])
def test_names_that_cannot_be_are_refused(enclave: teemate.Enclave, name: str) -> None:
    with enclave.slot() as slot, pytest.raises(teemate.CallFailed) as failed:
        Connection(slot, name, flags=CREATE)
    assert failed.value.status == -1
