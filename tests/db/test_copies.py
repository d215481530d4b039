"""Plain files of SQLite come in and go out, and databases are copied while others write to them."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from connections import database_image
from processes import repeatedly
from running_broker import RunningBroker

import teemate
from teemate import db
from teemate.cli import db_whole
from teemate.db._plain import PlainFile

Open = Callable[..., Any]
Life = Callable[[], teemate.Enclave]


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
def shared(
    broker: Callable[..., RunningBroker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> RunningBroker:
    """A broker whose enclave "db" has little storage."""
    running = broker(
        f'[broker]\nstate_directory = "{tmp_path / "state"}"\n'
        f'[[enclave]]\nname = "db"\nimage = "{database_image()}"\nstorage = true\nstorage_limit = 400_000\n'
        f"[[enclave.attach]]\nuid = {os.geteuid()}\n"
    )
    monkeypatch.setenv("TEEMATE_SOCKET", running.socket)
    return running


def plain(path: Path, rows: int = 3000, pragmas: str = "") -> Path:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            f"{pragmas}; CREATE TABLE t(id INTEGER PRIMARY KEY, v); CREATE INDEX i ON t(v)"
        )
        connection.executemany("INSERT INTO t(v) VALUES (?)", [(f"value {n:09}" * 5,) for n in range(rows)])
        connection.commit()
    return path


def content(connection: Any) -> tuple[list[Any], list[Any]]:
    schema = connection.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name").fetchall()
    return schema, connection.execute("SELECT * FROM t ORDER BY id").fetchall()


def plain_content(path: Path) -> tuple[list[Any], list[Any]]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return content(connection)


def test_a_plain_file_comes_in_and_goes_out_as_it_was(
    enclave: teemate.Enclave, connect: Open, tmp_path: Path, storage: Path
) -> None:
    source = plain(tmp_path / "plain.sqlite")
    seen: list[tuple[int, int]] = []
    db.import_file(enclave, source, "ledger", progress=lambda *at: seen.append(at))
    pages = source.stat().st_size // 4096
    assert seen[-1] == (pages, pages)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    connection = connect("ledger")
    assert content(connection) == plain_content(source)
    assert b"value 0000" not in (storage / "ledger").read_bytes()
    connection.execute("INSERT INTO t(v) VALUES ('written here')")
    connection.commit()
    out = tmp_path / "out.sqlite"
    connection.export(out)
    assert out.stat().st_mode & 0o777 == 0o600
    assert plain_content(out) == content(connection)
    assert out.read_bytes()[18:20] == b"\1\1"  # no log belongs to it
    assert sorted(path.name for path in tmp_path.iterdir() if path != storage) == [
        "out.sqlite",
        "plain.sqlite",
    ]


def test_what_came_in_is_there_in_the_enclaves_next_life(life: Life, tmp_path: Path) -> None:
    source = plain(tmp_path / "plain.sqlite")
    with life() as enclave:
        db.import_file(enclave, source, "ledger")
    with life() as enclave, contextlib.closing(db.connect(enclave, "ledger", create=False)) as connection:
        assert content(connection) == plain_content(source)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_other_page_sizes_come_in_as_ours(enclave: teemate.Enclave, connect: Open, tmp_path: Path) -> None:
    for size in (1024, 65536):
        source = plain(tmp_path / f"{size}.sqlite", 200, f"PRAGMA page_size={size}")
        db.import_file(enclave, source, f"of-{size}")
        assert content(connect(f"of-{size}")) == plain_content(source)
        assert source.read_bytes()[16:18] == size.to_bytes(3)[1:] if size < 65536 else b"\0\1"


def test_a_name_that_is_taken_is_not_imported_to(
    enclave: teemate.Enclave, connect: Open, tmp_path: Path
) -> None:
    source = plain(tmp_path / "plain.sqlite", 10)
    with contextlib.closing(db.connect(enclave, "ledger")) as connection:
        connection.execute("CREATE TABLE mine(v)")
    for _ in range(2):
        with pytest.raises(db.DatabaseExists):
            db.import_file(enclave, source, "ledger")
    assert connect("ledger").execute("SELECT name FROM sqlite_schema").fetchall() == [("mine",)]


def _header(path: Path, offset: int, value: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value)


def _shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


DAMAGES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "no database": (lambda path: path.write_text("no database" * 1000), 26, "not a database"),
    "too short": (lambda path: path.write_bytes(path.read_bytes()[:50]), 26, "not a database"),
    "half a page": (lambda path: os.truncate(path, path.stat().st_size - 100), 11, "no number of pages"),
    "pages missing": (_shorter, 11, "pages at its end are missing"),
    "a page of zeros": (lambda path: _header(path, 5 * 4096, bytes(4096)), 11, "damaged"),
    "a wrong tree": (lambda path: _header(path, 3 * 4096 + 20, b"\xff" * 500), 11, "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_sound_database_does_not_come_in(
    enclave: teemate.Enclave, connect: Open, tmp_path: Path, storage: Path, damage: str
) -> None:
    source = plain(tmp_path / "plain.sqlite")
    break_it, code, text = DAMAGES[damage]
    break_it(source)
    with pytest.raises(db.DatabaseError, match=text) as failed:
        db.import_file(enclave, source, "ledger")
    assert failed.value.sqlite_errorcode & 0xFF == code
    assert list(storage.iterdir()) == []
    with pytest.raises(db.OperationalError, match="unable to open"):
        connect("ledger", create=False)


def test_a_file_with_a_log_that_is_not_in_it_does_not_come_in(
    enclave: teemate.Enclave, connect: Open, tmp_path: Path
) -> None:
    path = tmp_path / "plain.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as writer:
        writer.executescript("PRAGMA journal_mode=WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
        with pytest.raises(db.OperationalError, match="wal_checkpoint") as failed:
            db.import_file(enclave, path, "ledger")
        assert failed.value.sqlite_errorname == "SQLITE_BUSY_RECOVERY"
        writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.import_file(enclave, path, "ledger")
    assert content(connect("ledger"))[1] == []


def test_a_file_that_is_written_to_meanwhile_does_not_come_in(
    enclave: teemate.Enclave, tmp_path: Path, storage: Path
) -> None:
    source = plain(tmp_path / "plain.sqlite")

    def write(done: int, pages: int) -> None:
        with contextlib.closing(sqlite3.connect(source)) as connection, connection:
            connection.execute("UPDATE t SET v = 'changed' WHERE id = 1")

    with pytest.raises(db.OperationalError, match="changed while it was read"):
        db.import_file(enclave, source, "ledger", progress=write)
    assert list(storage.iterdir()) == []


def test_texts_in_utf_16_are_refused(enclave: teemate.Enclave, tmp_path: Path) -> None:
    source = plain(tmp_path / "plain.sqlite", 3, "PRAGMA encoding='UTF-16'")
    with pytest.raises(db.NotSupportedError, match="UTF-16"):
        db.import_file(enclave, source, "ledger")


def test_the_enclave_itself_looks_at_what_comes_in(enclave: teemate.Enclave, tmp_path: Path) -> None:
    data = plain(tmp_path / "plain.sqlite").read_bytes()
    pages = len(data) // 4096
    broken = data[: 5 * 4096] + bytes(4096) + data[6 * 4096 :]
    for content, keep in ((broken, 11), (b"x" * len(data), 26)):
        with contextlib.closing(db.connect(enclave)) as connection:
            call = connection._slot.call
            call("db_copy", struct.pack("<IIQ", 3, 6, pages) + b"ledger")

            def bring(data: bytes = content, call: Callable[..., bytes] = call) -> None:
                for at in range(0, pages, 64):
                    some = min(64, pages - at)
                    call("db_pages", struct.pack("<II", some, 0) + data[at * 4096 : (at + some) * 4096])
                call("db_copied", struct.pack("<IIQ", 1, 0, 0))

            with pytest.raises(teemate.CallFailed) as failed:
                bring()
            assert failed.value.status == 1
            assert struct.unpack_from("<i", failed.value.reply, 4)[0] == keep


def test_an_interruption_that_comes_late_is_not_the_end_of_what_comes_in_next(
    connect: Open, tmp_path: Path
) -> None:
    data = plain(tmp_path / "plain.sqlite").read_bytes()
    pages = len(data) // 4096
    connection, other = connect(), connect()
    call, opened = connection._slot.call, connection._opened
    call("db_copy", struct.pack("<IIQ", 3, 6, pages) + b"ledger")
    for at in range(0, pages, 64):
        some = min(64, pages - at)
        call("db_pages", struct.pack("<II", some, 0) + data[at * 4096 : (at + some) * 4096])
    other._slot.call("db_interrupt", struct.pack("<IIQ", opened.slot, 0, opened.connection))
    call("db_copied", struct.pack("<IIQ", 1, 0, 0))
    assert content(connect("ledger")) == plain_content(tmp_path / "plain.sqlite")


def test_ctrl_c_ends_an_import_also_when_all_of_it_is_in(
    enclave: teemate.Enclave, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = plain(tmp_path / "plain.sqlite")
    whole = []

    def press(self: PlainFile) -> None:
        whole.append(self)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(PlainFile, "check_unchanged", press)
    monkeypatch.setattr(db_whole, "_attached", lambda *_: contextlib.nullcontext(enclave))
    assert db_whole.import_.callback is not None
    with pytest.raises(KeyboardInterrupt):
        db_whole.import_.callback(enclave="db", file=source, database="ledger", path=None)
    assert whole
    assert list(storage.iterdir()) == []


def test_an_export_overwrites_only_what_it_is_told_to(connect: Open, tmp_path: Path) -> None:
    connection = connect("ledger")
    connection.executescript("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
    path = tmp_path / "out.sqlite"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        connection.export(path)
    assert path.read_text() == "mine"
    (tmp_path / "out.sqlite-wal").write_text("another database's")
    with pytest.raises(db.OperationalError, match="has changes"):
        connection.export(path, force=True)
    (tmp_path / "out.sqlite-wal").unlink()

    def stop(done: int, pages: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        connection.export(path, force=True, progress=stop)
    assert path.read_text() == "mine"
    connection.execute("INSERT INTO t(v) VALUES (1)")  # it is as usable as before
    connection.commit()
    connection.export(path, force=True)
    assert plain_content(path) == content(connection)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.sqlite", "storage"]


@pytest.mark.parametrize("how", ["backup", "export"])
def test_a_copy_is_one_moment_of_a_database_that_others_write_to(
    enclave: teemate.Enclave, connect: Open, tmp_path: Path, how: str
) -> None:
    writer, reader = connect("bank", check_same_thread=False, timeout=60), connect("bank")
    writer.execute("CREATE TABLE account(id INTEGER PRIMARY KEY, balance INTEGER, note)")
    writer.executemany("INSERT INTO account VALUES (?, 1000, ?)", [(n, "x" * 2000) for n in range(300)])
    writer.commit()
    turn = threading.Event()
    writes = 0

    def transfer() -> None:
        nonlocal writes
        with writer:
            one, two = writes % 300, writes * 7 % 300
            writer.execute("UPDATE account SET balance = balance - 1 WHERE id = ?", (one,))
            writer.execute("UPDATE account SET balance = balance + 1 WHERE id = ?", (two,))
        writes += 1
        turn.set()

    def after_some(*_: int) -> None:
        """Let some be committed between two steps."""
        turn.clear()
        assert turn.wait(60)

    with repeatedly(transfer):
        if how == "backup":
            reader.backup("copy", pages=16, progress=after_some)
            copy = connect("copy")
        else:
            reader.export(tmp_path / "out", progress=after_some)
            copy = sqlite3.connect(tmp_path / "out")
    assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert copy.execute("SELECT sum(balance), count(*) FROM account").fetchone() == (300_000, 300)
    assert reader.execute("SELECT sum(balance) FROM account").fetchone() == (300_000,)
    copy.close()


def test_a_backup_is_a_database_of_its_own(life: Life, storage: Path) -> None:
    with life() as enclave, contextlib.closing(db.connect(enclave, "one")) as one:
        one.executescript("CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t(v) VALUES ('a'), ('b')")
        seen: list[tuple[int, int, int]] = []
        one.backup("two", pages=1, progress=lambda *at: seen.append(at))
        assert seen[-1] == (0, 0, len(seen))
        with pytest.raises(db.DatabaseExists):
            one.backup("two")
        with pytest.raises(db.OperationalError):
            one.backup("one")
        one.executescript("DELETE FROM t")
        with contextlib.closing(db.connect(enclave, "two")) as two:
            assert len(content(two)[1]) == 2
    for path in storage.iterdir():
        assert b"SQLite" not in path.read_bytes()
    with life() as enclave:
        for name, rows in (("one", 0), ("two", 2)):
            with contextlib.closing(db.connect(enclave, name, create=False)) as connection:
                assert len(content(connection)[1]) == rows


def test_a_copy_needs_a_database_in_a_file_and_no_open_transaction(connect: Open, tmp_path: Path) -> None:
    with pytest.raises(db.NotSupportedError, match="in memory"):
        connect().export(tmp_path / "out")
    connection = connect("ledger")
    connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
    connection.execute("INSERT INTO t(v) VALUES (1)")
    for copy in (lambda: connection.export(tmp_path / "out"), lambda: connection.backup("copy")):
        with pytest.raises(db.ProgrammingError, match="transaction is open"):
            copy()
    assert connection.in_transaction
    with pytest.raises(TypeError):
        connection.backup(sqlite3.connect(":memory:"))


def test_a_copy_that_is_refused_leaves_a_transaction_what_it_is(connect: Open) -> None:
    connection = connect("ledger")
    connection.execute("CREATE TABLE t(v)")
    connection.execute("INSERT INTO t VALUES (1)")
    for kind, name in ((1, b""), (2, b"copy")):
        with pytest.raises(teemate.CallFailed):
            connection._slot.call("db_copy", struct.pack("<IIQ", kind, len(name), 0) + name)
    connection.rollback()
    assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_while_it_is_copied_a_connection_does_nothing_else(connect: Open) -> None:
    connection = connect("ledger")
    connection.executescript("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")

    def ask(*_: int) -> None:
        with pytest.raises(db.ProgrammingError, match="copy"):
            connection.execute("COMMIT")

    connection.backup("copy", progress=ask)
    assert content(connect("copy")) == content(connection)


def test_a_name_is_taken_while_a_copy_makes_it_and_free_when_that_was_given_up(
    enclave: teemate.Enclave, connect: Open, storage: Path
) -> None:
    connection = connect("ledger")
    connection.executescript("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")

    def meanwhile(*_: int) -> None:
        with pytest.raises(db.OperationalError):
            connect("ledger").backup("copy")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        connection.backup("copy", progress=meanwhile)
    assert {path.name for path in storage.iterdir()} == {"ledger", "ledger-root", "ledger-wal"}
    connection.backup("copy")
    assert content(connect("copy")) == content(connection)


def test_a_copy_whose_maker_is_gone_leaves_the_name_free(shared: RunningBroker, tmp_path: Path) -> None:
    with teemate.connect() as broker, broker.attach("db") as enclave, enclave.slot() as slot:
        slot.call("db_open", struct.pack("<IIIIQII", 1, 4, 0, 0, 0, 0, 0))
        slot.call("db_copy", struct.pack("<IIQ", 3, 4, 100) + b"copy")
        first = b"SQLite format 3\0\x10\0\1\1" + bytes(4076)
        slot.call("db_pages", struct.pack("<II", 3, 0) + first + bytes(8192))
    assert (tmp_path / "state" / "enclaves" / "db" / "copy").stat().st_size > 3 * 4096
    with pytest.raises(db.OperationalError, match="unable to open"):
        db.connect("db", "copy", create=False)
    with contextlib.closing(db.connect("db", "copy")) as new:
        new.executescript("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
        assert new.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert new.execute("PRAGMA page_count").fetchone() == (2,)


def test_a_storage_that_is_full_makes_no_half_database(shared: RunningBroker, tmp_path: Path) -> None:
    large, small = plain(tmp_path / "large", 6000), plain(tmp_path / "small", 100)
    with pytest.raises(db.LimitReached, match="no room") as failed:
        db.import_file("db", large, "ledger")
    assert failed.value.detail["limit"] == "storage_limit"
    db.import_file("db", small, "ledger")
    with contextlib.closing(db.connect("db", "ledger", create=False)) as connection:
        assert content(connection) == plain_content(small)
