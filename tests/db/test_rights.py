"""A database is its maker's, who lets others read it or write to it: the enclave sees to that."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from connections import CREATE, READONLY, database_image
from running_broker import RunningBroker
from users import needs_root, slots_of

import teemate
from teemate import db
from teemate.db import Access, Grantee, Right

Life = Callable[[], teemate.Enclave]
As = Callable[..., Any]

ALICE, BOB, CAROL = (4001, 4001), (4002, 4002), (4003, 500)
USERS = (ALICE, BOB, CAROL)

pytestmark = needs_root

HEADS = 4096
"""Bytes of both heads, at the file's beginning."""


class _Slots:
    """What connect() takes for an enclave: only the slots of one user."""

    def __init__(self, enclave: teemate.Enclave, user: tuple[int, int]) -> None:
        self._enclave, self._number = enclave, USERS.index(user)

    @contextlib.contextmanager
    def slot(self, wait: float = 0) -> Iterator[Any]:
        """Take slots until one is this user's; which one a slot is bound to goes by its number."""
        with contextlib.ExitStack() as others:
            while True:
                lease = self._enclave.slot(wait=wait)
                slot = lease.__enter__()
                if (slot.index - _FIRST) % len(USERS) == self._number:
                    break
                others.callback(lease.__exit__, None, None, None)
            others.close()
            try:
                yield slot
            finally:
                lease.__exit__(None, None, None)


_FIRST = 3
"""The first client slot: 0 and 1 are the warden's, 2 does its files."""


@pytest.fixture
def lives(life: Life) -> Iterator[Callable[[], As]]:
    """Begin a life of the enclave; what comes back opens its databases for a user."""
    with contextlib.ExitStack() as all_of_them:

        def begin() -> As:
            all_of_them.close()
            with slots_of(USERS):
                enclave = all_of_them.enter_context(life())

            def connect(user: tuple[int, int], database: str = "ledger", **options: Any) -> Any:
                connection = db.connect(_Slots(enclave, user), database, **options)  # type: ignore[arg-type]
                return all_of_them.enter_context(contextlib.closing(connection))

            connect.enclave_of = lambda user: _Slots(enclave, user)  # type: ignore[attr-defined]
            return connect

        yield begin


@pytest.fixture
def as_user(lives: Callable[[], As]) -> As:
    """Open databases for a user; Alice has made one."""
    connect = lives()
    with contextlib.closing(connect(ALICE)) as connection:
        connection.executescript("CREATE TABLE t(v); INSERT INTO t VALUES ('hers')")
    return connect


def test_a_database_is_its_makers_alone(as_user: As) -> None:
    for user in (BOB, CAROL):
        for options in ({}, {"readonly": True}, {"create": False}):
            with pytest.raises(db.Denied, match="its owner can grant it") as failed:
                as_user(user, **options)
            assert isinstance(failed.value, teemate.Denied)
            assert failed.value.code == "denied"
    assert as_user(BOB, "his").access is Access.OWNER
    assert as_user(ALICE).describe().owner == 4001


def test_who_may_read_reads_and_writes_nothing_whatever_they_ask_for(as_user: As) -> None:
    alice = as_user(ALICE)
    alice.grant(uid=4002)
    bob = as_user(BOB)
    assert bob.access is Access.READ
    assert bob.execute("SELECT v FROM t").fetchall() == [("hers",)]
    for text in (
        "INSERT INTO t VALUES (1)",
        "DROP TABLE t",
        "CREATE TABLE u(v)",
        "PRAGMA user_version=3",
        "VACUUM",
    ):
        with pytest.raises(db.Denied):
            bob.execute(text)
        if bob.in_transaction:
            bob.rollback()
    with contextlib.suppress(db.Error):
        bob.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    alice.execute("INSERT INTO t VALUES ('more')")
    alice.commit()
    assert bob.execute("SELECT count(*) FROM t").fetchone() == (2,)
    for whole in (
        lambda: bob.grant(uid=4003),
        lambda: bob.revoke(uid=4002),
        lambda: bob.backup("copy"),
        lambda: bob.export("/nowhere/at/all"),
    ):
        with pytest.raises((db.Denied, FileNotFoundError)):
            whole()
    assert bob.describe().rights == ()
    with pytest.raises(db.Denied):
        as_user(CAROL)


def test_a_reader_that_asks_the_enclave_itself_is_not_let_write(as_user: As) -> None:
    as_user(ALICE).grant(uid=4002)
    bob = as_user(BOB, isolation_level=None)
    for flags in (0, CREATE, READONLY):
        bob._slot.call("db_close")
        head = flags.to_bytes(4, "little")
        bob._slot.call("db_open", b"\1\0\0\0" + head + bytes(20) + (6).to_bytes(4, "little") + b"ledger")
        with pytest.raises(db.OperationalError):
            bob.execute("INSERT INTO t VALUES (1)")
        bob.execute("SELECT * FROM t").fetchall()
    assert as_user(ALICE).execute("SELECT count(*) FROM t").fetchone() == (1,)


def test_who_may_write_writes_and_owns_nothing(as_user: As, tmp_path: Path) -> None:
    as_user(ALICE).grant(uid=4002, readonly=False)
    bob = as_user(BOB)
    assert bob.access is Access.WRITE
    with bob:
        bob.execute("INSERT INTO t VALUES ('his')")
    for whole in (
        lambda: bob.export(tmp_path / "out"),
        lambda: bob.backup("copy"),
        lambda: bob.grant(uid=4003),
    ):
        with pytest.raises(db.Denied):
            whole()
    assert not (tmp_path / "out").exists()
    assert as_user(ALICE).execute("SELECT count(*) FROM t").fetchone() == (2,)


def test_a_group_has_what_it_was_granted_and_the_better_right_counts(as_user: As) -> None:
    alice = as_user(ALICE)
    alice.grant(gid=500)
    assert as_user(CAROL).access is Access.READ
    with pytest.raises(db.Denied):
        as_user(BOB)
    alice.grant(uid=4003, readonly=False)
    assert as_user(CAROL).access is Access.WRITE
    alice.revoke(uid=4003)
    assert as_user(CAROL).access is Access.READ


def test_a_right_that_is_taken_back_is_gone_from_the_next_call_on(as_user: As) -> None:
    alice = as_user(ALICE)
    alice.grant(uid=4002, readonly=False)
    bob, reader = as_user(BOB), as_user(BOB, readonly=True)
    bob.execute("INSERT INTO t VALUES ('his')")
    alice.grant(uid=4002)
    with pytest.raises(db.Denied):
        bob.commit()
    assert not bob.in_transaction
    assert reader.execute("SELECT count(*) FROM t").fetchone() == (1,)
    alice.execute("INSERT INTO t VALUES ('free again')")  # what he had begun holds no lock
    alice.commit()
    alice.revoke(uid=4002)
    for connection in (bob, reader):
        with pytest.raises(db.Denied):
            connection.execute("SELECT * FROM t")
    with pytest.raises(db.Denied):
        as_user(BOB)


def test_rights_are_there_in_the_enclaves_next_life(lives: Callable[[], As]) -> None:
    connect = lives()
    alice = connect(ALICE)
    alice.executescript("CREATE TABLE t(v)")
    for uid in range(5000, 5010):
        alice.grant(uid=uid)
    for uid in range(5000, 5009):
        alice.revoke(uid=uid)
    alice.grant(uid=4002, readonly=False)
    alice.grant(gid=500)
    rights = alice.describe().rights
    assert set(rights) == {
        Right(Grantee.UID, 5009, Access.READ),
        Right(Grantee.UID, 4002, Access.WRITE),
        Right(Grantee.GID, 500, Access.READ),
    }
    connect = lives()
    assert connect(BOB).access is Access.WRITE
    assert connect(CAROL).access is Access.READ
    description = connect(ALICE).describe()
    assert (description.owner, description.access, description.rights) == (4001, Access.OWNER, rights)


def test_a_grant_that_power_cut_short_leaves_what_was_before(lives: Callable[[], As], storage: Path) -> None:
    connect = lives()
    alice = connect(ALICE)
    alice.executescript("CREATE TABLE t(v)")
    alice.grant(uid=4002)
    before = (storage / "ledger").read_bytes()
    alice.revoke(uid=4002)
    alice.close()
    after = (storage / "ledger").read_bytes()
    changed = [n for n in range(0, 4096, 512) if before[n : n + 512] != after[n : n + 512]]
    assert len(changed) >= 2
    for torn in (changed[:1], changed[1:]):  # sectors that were written
        data = bytearray(before)
        for n in torn:
            data[n : n + 512] = after[n : n + 512]
        (storage / "ledger").write_bytes(data)
        connect = lives()
        assert connect(BOB).access is Access.READ
        assert connect(ALICE).describe().rights == (Right(Grantee.UID, 4002, Access.READ),)


def test_an_older_head_that_is_put_back_in_this_life_gives_nobody_anything(
    as_user: As, storage: Path
) -> None:
    alice = as_user(ALICE)
    alice.grant(uid=4002)
    before = (storage / "ledger").read_bytes()[:4096]
    alice.revoke(uid=4002)
    with (storage / "ledger").open("r+b") as file:
        file.write(before)
    with pytest.raises(db.Denied):
        as_user(BOB)


@pytest.mark.parametrize("since", ["a commit", "a checkpoint", "a checkpoint and a commit"])
def test_rights_that_were_taken_back_do_not_come_back_with_an_older_head(
    lives: Callable[[], As], storage: Path, since: str
) -> None:
    alice = lives()(ALICE)
    alice.executescript("CREATE TABLE t(v); INSERT INTO t VALUES (1)")
    alice.grant(uid=4002)
    granted = (storage / "ledger").read_bytes()[:HEADS]
    alice.revoke(uid=4002)
    if "checkpoint" in since:
        alice.executescript("INSERT INTO t VALUES (2)")
        alice.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    if "commit" in since:
        alice.executescript("INSERT INTO t VALUES (3)")
    connect = lives()
    now = (storage / "ledger").read_bytes()
    (storage / "ledger").write_bytes(granted + now[HEADS:])
    for user in (BOB, ALICE):
        with pytest.raises(db.DatabaseTampered):
            connect(user)
    connect = lives()
    (storage / "ledger").write_bytes(now)
    assert connect(ALICE).execute("SELECT max(v) FROM t").fetchone() == (3 if "commit" in since else 2,)
    with pytest.raises(db.Denied):
        connect(BOB)


def test_there_may_be_so_many_grants_and_the_error_says_so(as_user: As) -> None:
    alice = as_user(ALICE)
    for uid in range(10_000, 10_128):
        alice.grant(uid=uid)
    with pytest.raises(db.LimitReached, match="128 grants") as failed:
        alice.grant(uid=4002)
    assert failed.value.detail["limit"] == "grants of a database"
    alice.grant(uid=10_005, readonly=False)
    alice.revoke(uid=10_000)
    alice.grant(uid=4002)
    assert as_user(BOB).access is Access.READ


def test_only_its_owner_deletes_a_database(as_user: As, storage: Path) -> None:
    as_user(ALICE).grant(uid=4002, readonly=False)
    bob = as_user(BOB, ":memory:")
    with pytest.raises(teemate.CallFailed) as failed:
        bob._slot.call("db_delete", b"ledger")
    assert int.from_bytes(failed.value.reply[4:8], "little", signed=True) in (-10, 5)
    assert (storage / "ledger").exists()


def test_in_a_new_life_too_only_its_owner_deletes_it(lives: Callable[[], As], storage: Path) -> None:
    lives()(ALICE).executescript("CREATE TABLE t(v)")
    connect = lives()
    with pytest.raises(teemate.CallFailed) as failed:
        connect(BOB, ":memory:")._slot.call("db_delete", b"ledger")
    assert int.from_bytes(failed.value.reply[4:8], "little", signed=True) == -10
    assert (storage / "ledger").exists()
    connect(ALICE, ":memory:")._slot.call("db_delete", b"ledger")
    assert list(storage.iterdir()) == []


def test_a_list_has_the_databases_that_a_user_may_use_in_a_new_life_too(lives: Callable[[], As]) -> None:
    connect = lives()
    for n in range(40):
        with contextlib.closing(connect(ALICE, f"ledger-of-the-month-{n:02}")) as connection:
            connection.execute("CREATE TABLE t(v)")
            if not n % 10:
                connection.grant(uid=4002)
    connect(BOB, "his")
    mine = [f"ledger-of-the-month-{n:02}" for n in range(40)]
    for _ in range(2):
        assert [(one.name, one.access) for one in listed(connect, ALICE)] == [
            (name, Access.OWNER) for name in mine
        ]
        assert [(one.name, one.owner, one.access) for one in listed(connect, BOB)] == [
            ("his", 4002, Access.OWNER),
            *((name, 4001, Access.READ) for name in mine[::10]),
        ]
        assert listed(connect, CAROL) == []
        connect = lives()


def listed(connect: As, user: tuple[int, int]) -> list[db.Listing]:
    return db.databases(connect.enclave_of(user))  # type: ignore[attr-defined]


def test_a_copy_is_its_makers_and_not_those_of_whom_the_first_was_granted_to(as_user: As) -> None:
    alice = as_user(ALICE)
    alice.grant(uid=4002)
    alice.backup("copy")
    assert as_user(ALICE, "copy").describe().rights == ()
    with pytest.raises(db.Denied):
        as_user(BOB, "copy")


@pytest.mark.parametrize("ids", [{}, {"uid": 1, "gid": 1}, {"uid": -1}, {"uid": 2**32}, {"gid": "users"}])
def test_a_grant_names_one_user_or_one_group(as_user: As, ids: dict[str, Any]) -> None:
    for change in (as_user(ALICE).grant, as_user(ALICE).revoke):
        with pytest.raises(db.ProgrammingError):
            change(**ids)


# ---- by way of the broker --------------------------------------------------------------------


@pytest.fixture
def shared(broker: Callable[..., RunningBroker], tmp_path: Path) -> RunningBroker:
    """A broker whose database enclave every user may attach to."""
    sharing = 'insecure_sim_sharing = true\nshare_between_owners = "unfenced"\n'
    return broker(
        f'[broker]\nstate_directory = "{tmp_path / "state"}"\n'
        f'[[enclave]]\nname = "db"\nimage = "{database_image()}"\nstorage = true\n{sharing}'
        '[[enclave.attach]]\nuid = "*"\n'
    )


def run(running: RunningBroker, uid: int, *arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
    """Run `teemate db` as another user."""
    code = f"import os; os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})\n"
    code = f"from teemate.cli.main import main\nimport teemate.db, teemate.cli.db\n{code}main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "db", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TEEMATE_SOCKET": running.socket},
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_imports_grants_describes_backs_up_exports_and_deletes(shared: RunningBroker) -> None:
    folder = shared.folder / "files"
    folder.mkdir()
    folder.chmod(0o777)
    with contextlib.closing(sqlite3.connect(folder / "plain")) as connection, connection:
        connection.execute("CREATE TABLE t(v)")
        connection.execute("INSERT INTO t VALUES (7)")
    assert run(shared, 4001, "import", "db", folder / "plain", "ledger") == (0, "", "")
    read, write = "SELECT v FROM t;", "INSERT INTO t VALUES (8);"
    code, _, text = run(shared, 4002, "shell", "db", "ledger", stdin=read)
    assert code != 0
    assert "denied" in text
    assert run(shared, 4001, "grant", "db", "ledger", "--uid", "4002")[0] == 0
    assert run(shared, 4002, "shell", "db", "ledger", stdin=read)[:2] == (0, "7\n")
    assert "no right" in run(shared, 4002, "shell", "db", "ledger", stdin=write)[2]
    assert run(shared, 4002, "export", "db", "ledger", folder / "stolen")[0] != 0
    assert not (folder / "stolen").exists()
    described = json.loads(run(shared, 4001, "describe", "db", "ledger", "--json")[1])
    assert described.pop("bytes") > 0
    listed = json.loads(run(shared, 4002, "list", "db", "--json")[1])
    assert listed == {"databases": [{"database": "ledger", "owner": 4001, "access": "read"}]}
    assert json.loads(run(shared, 4003, "list", "db", "--json")[1]) == {"databases": []}
    assert run(shared, 4001, "list", "db")[1] == "ledger\tuid 4001\tit is yours\n"
    assert described == {
        "size_limit": 0,
        "database": "ledger",
        "owner": 4001,
        "access": "owner",
        "rights": [{"uid": 4002, "access": "read"}],
    }
    _, said, _ = run(shared, 4002, "describe", "db", "ledger")
    assert "uid 4001" in said
    assert "read only" in said
    assert run(shared, 4001, "revoke", "db", "ledger", "--uid", "4002")[0] == 0
    assert run(shared, 4002, "shell", "db", "ledger", stdin=read)[0] != 0
    assert run(shared, 4001, "backup", "db", "ledger", "copy")[0] == 0
    assert run(shared, 4001, "export", "db", "copy", folder / "out")[0] == 0
    with contextlib.closing(sqlite3.connect(folder / "out")) as connection:
        assert connection.execute("SELECT v FROM t").fetchall() == [(7,)]
    code, _, text = run(shared, 4001, "export", "db", "copy", folder / "out")
    assert code != 0
    assert "exists" in text
    assert run(shared, 4001, "export", "--force", "db", "copy", folder / "out")[0] == 0
    assert run(shared, 4002, "delete", "--yes", "db", "copy")[0] != 0
    assert run(shared, 4001, "delete", "--yes", "db", "copy")[0] == 0
    assert "unable to open" in run(shared, 4001, "shell", "--readonly", "db", "copy")[2]
