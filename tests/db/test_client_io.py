"""With io = "client" each client does the I/O of its databases itself, and is found when it cheats."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from connections import Connection, SqlError
from losing import lose_epc
from own_descriptors import descriptors
from processes import wait_for_stop
from raw_client import raw_client
from running_broker import RunningBroker
from users import needs_root

import teemate
from teemate import db

HEAD, PAGE = 4096, 4096 + 28
FILES = -18
Begin = Callable[..., RunningBroker]


@pytest.fixture
def own(begin: Begin) -> RunningBroker:
    """A broker whose clients do their I/O themselves."""
    return begin('io = "client"', "revoke_kill = true")


@contextlib.contextmanager
def opened(name: str, **options: bool) -> Iterator[db.Connection]:
    with contextlib.closing(db.connect("db", name, **options)) as connection:
        yield connection


def client(code: str, *, uid: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program that has "db" open as `c`, in a process of its own."""
    user = f"os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})\n" if uid else ""
    program = f"import fcntl, os, pathlib, resource, signal, teemate\nfrom teemate import db\n{user}{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_a_client_works_without_the_warden_and_others_see_it(own: RunningBroker, files: Path) -> None:
    with opened("ledger") as connection:
        assert set(descriptors(files / "ledger").values()) == {os.O_RDWR}
        assert set(descriptors(files / "ledger-wal").values()) == {os.O_RDWR}
        with raw_client(own.socket) as administrator:
            enclaves = administrator.ok("stats")["stats"]["enclaves"]
        warden = enclaves[0]["warden"]["pid"]
        os.kill(warden, signal.SIGSTOP)
        try:
            with connection:
                connection.execute("CREATE TABLE t(v)")
                connection.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(500)])
        finally:
            os.kill(warden, signal.SIGCONT)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        seen = client(
            "c = db.connect('db', 'ledger'); print(c.execute('SELECT count(*) FROM t').fetchone()[0])"
        )
        assert seen.stdout == "500\n", seen.stderr
    assert not descriptors(files / "ledger")
    assert not descriptors(files / "ledger-wal")


def test_copies_deletions_and_other_connections_go_on_as_with_the_warden(
    own: RunningBroker, tmp_path: Path
) -> None:
    with opened("ledger") as connection, opened("ledger") as other:
        connection.executescript("CREATE TABLE t(v); INSERT INTO t VALUES (1)")
        connection.backup("copy")
        connection.export(tmp_path / "out")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(db.OperationalError, match="locked"):
            db.connect("db", "ledger", timeout=0).execute("INSERT INTO t VALUES (2)")
        other.rollback()
    db.import_file("db", tmp_path / "out", "again")
    with opened("again") as again, opened("copy") as copy:
        assert (
            again.execute("SELECT v FROM t").fetchall()
            == copy.execute("SELECT v FROM t").fetchall()
            == [(1,)]
        )
    db.delete("db", "again")
    assert [listing.name for listing in db.databases("db")] == ["copy", "ledger"]
    with opened("again") as again:
        assert again.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


def test_what_a_client_changes_through_its_descriptor_is_found(own: RunningBroker, files: Path) -> None:
    with opened("ledger") as connection:
        connection.executescript("CREATE TABLE t(v); INSERT INTO t VALUES ('old')")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (descriptor,) = descriptors(files / "ledger")
        page = HEAD + PAGE
        before = os.pread(descriptor, PAGE, page)
        connection.executescript("UPDATE t SET v = 'new'; PRAGMA wal_checkpoint(TRUNCATE)")
        right = os.pread(descriptor, PAGE, page)
        assert right != before
        flipped = bytes([right[2000] ^ 1])
        for what, data, at in (("a byte", flipped, page + 2000), ("the page of before", before, page)):
            os.pwrite(descriptor, data, at)
            with opened("ledger", uncached=True) as another, pytest.raises(db.DatabaseTampered):
                pytest.fail(f"{what}: {another.execute('SELECT v FROM t').fetchall()}")
            os.pwrite(descriptor, right, page)
        os.ftruncate(descriptor, page)
        with opened("ledger", uncached=True) as another, pytest.raises(db.DatabaseTampered):
            another.execute("SELECT v FROM t").fetchall()
        os.pwrite(descriptor, right, page)
        with opened("ledger", uncached=True) as another:
            assert another.execute("SELECT v FROM t").fetchall() == [("new",)]


@needs_root
def test_who_may_read_only_gets_descriptors_that_only_read(own: RunningBroker) -> None:
    made = client(
        "c = db.connect('db', 'ledger'); c.executescript('CREATE TABLE t(v); INSERT INTO t VALUES (7)')\n"
        "c.grant(uid=4002)",
        uid=4001,
    )
    assert made.returncode == 0, made.stderr
    read = client(
        "def modes():\n"
        "    for name in os.listdir('/proc/self/fd'):\n"
        "        try: path = pathlib.Path('/proc/self/fd/' + name).readlink().name\n"
        "        except OSError: continue\n"
        "        if path.startswith('ledger'):\n"
        "            yield path, fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE\n"
        "c = db.connect('db', 'ledger')\n"
        "print(sorted(modes()), c.execute('SELECT v FROM t').fetchone())\n"
        "for name, writable in ('ledger', 1), ('ledger-wal', 1), ('ledger-root', 0), ('../db', 0):\n"
        "    try: c._slot._enclave.open_file(c._slot, name, writable=bool(writable))\n"
        "    except teemate.errors.NotFound: print('not lent')\n"
        "try: c.execute('INSERT INTO t VALUES (8)')\n"
        "except db.Denied: print('denied')\n"
        "c.close()\n",
        uid=4002,
    )
    assert read.stdout == (
        f"[('ledger', {os.O_RDONLY}), ('ledger-wal', {os.O_RDONLY})] (7,)\n" + "not lent\n" * 4 + "denied\n"
    ), read.stderr
    refused = client("db.connect('db', 'ledger')", uid=4003)
    assert "Denied" in refused.stderr


def test_nothing_is_lent_of_a_database_that_is_not_open_in_the_slot(own: RunningBroker) -> None:
    with opened("ledger") as first:
        enclave = first._slot._enclave
        enclave.acquire()
        with enclave.slot() as slot:
            with pytest.raises(teemate.NotFound, match="lends slot"):
                enclave.open_file(slot, "ledger", writable=False)
            with contextlib.closing(Connection(slot, "ledger", take_files=False)) as connection:
                enclave.open_file(slot, "ledger", writable=True)
                with pytest.raises(SqlError) as failed:
                    connection.sql("SELECT 1")
                assert failed.value.code == FILES
            with pytest.raises(teemate.NotFound, match="lends slot"):
                enclave.open_file(slot, "ledger", writable=False)
        with raw_client(own.socket) as other:
            other.fails("files.open", "not-found", grant=enclave.grant, slot=first._slot.index, file="ledger")


def test_a_client_that_dies_in_the_middle_of_a_write_leaves_nothing_half_done(own: RunningBroker) -> None:
    with opened("ledger") as connection:
        connection.executescript("CREATE TABLE t(n INTEGER PRIMARY KEY, v)")
        rows = [(n, "x" * 2000) for n in range(60)]
        with connection:
            connection.executemany("INSERT INTO t VALUES (?, ?)", rows)
        # The log begins anew over these frames, so something else is known of the place that is torn.
        connection.execute("PRAGMA wal_checkpoint(RESTART)")
        torn = 60 + 5 * (24 + 4096 + 28) + 1000
        for _ in range(3):
            dead = client(
                "c = db.connect('db', 'ledger')\n"
                "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
                f"resource.setrlimit(resource.RLIMIT_FSIZE, ({torn}, {torn}))\n"
                "with c: c.execute(\"UPDATE t SET v = 'lost'\")\n"
            )
            assert dead.returncode == -signal.SIGXFSZ, dead.stderr
            with opened("ledger", uncached=True) as another, another:
                assert another.execute("SELECT count(*) FROM t WHERE v = ?", ("x" * 2000,)).fetchone() == (
                    60,
                )
                another.execute("INSERT INTO t(v) VALUES ('kept')")
                another.execute("DELETE FROM t WHERE v = 'kept'")
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_what_clients_have_written_does_not_spoil_the_account_of_the_others(begin: Begin) -> None:
    begin('io = "client"', "revoke_kill = true", "storage_limit = 200_000")
    with opened("large") as connection, connection:
        connection.execute("CREATE TABLE t(v)")
        connection.executemany("INSERT INTO t VALUES (?)", [("x" * 4000,)] * 200)
    db.delete("db", "large")
    with opened("small") as connection, connection:
        connection.execute("CREATE TABLE t(v)")


def test_where_the_policy_says_nothing_no_client_gets_a_descriptor(begin: Begin, files: Path) -> None:
    begin()
    with opened("ledger") as connection:
        assert not descriptors(files / "ledger")
        slot = connection._slot
        with pytest.raises(teemate.Unsupported, match='io = "client"'):
            slot._enclave.open_file(slot, "ledger", writable=False)
        with pytest.raises(teemate.CallFailed):
            slot.call("db_direct")
        connection.execute("CREATE TABLE t(v)")


def test_who_had_the_files_of_an_enclave_that_is_built_anew_is_gone_when_its_successor_has_them(
    begin: Begin,
) -> None:
    # Its warden says that it cannot enter any more.
    begin('io = "client"', "revoke_kill = true", "revoke_grace = 0.1", expect_errors=True)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, signal\nfrom teemate import db\nc = db.connect('db', 'ledger')\n"
            "c.executescript('CREATE TABLE t(v); INSERT INTO t VALUES (1)')\n"
            "os.kill(os.getpid(), signal.SIGSTOP)",
        ]
    )
    try:
        wait_for_stop(holder.pid)
        with opened("ledger") as connection:
            lose_epc(connection._slot._enclave)
            with pytest.raises(db.OperationalError):
                connection.execute("SELECT 1")
        with opened("ledger") as connection:
            assert holder.poll() == -signal.SIGKILL
            assert connection.execute("SELECT v FROM t").fetchall() == [(1,)]
    finally:
        holder.kill()
        holder.wait()
