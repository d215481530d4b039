"""Without freshness, forgetting locks, syncs, rights: what the other tests guard does not hold."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from altered import altered_database
from backends import BACKEND
from connections import BUSY, CREATE, UNCACHED, Caller, Connection, SqlError, database_image
from dying import DyingDisk, Moment
from images import Images
from own_descriptors import descriptors
from running_broker import RunningBroker
from strangers import stopped_stranger
from test_database_files import fill
from test_power_cut import MARK, SYNC, File, look, recorded, state
from test_tampering import HEAD, PAGE, ask
from users import needs_root, slots_of

import teemate
from teemate import db

HOLES = (
    "DB_TEST_NO_FRESHNESS",
    "DB_TEST_KEEP_LOCKS",
    "DB_TEST_NO_SYNC",
    "DB_TEST_NO_RIGHTS",
    "DB_TEST_ADMIT_LATE",
)


@pytest.fixture(scope="module")
def altered_image(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database image without any of these."""
    return altered_database(images, tmp_path_factory.mktemp("altered"), *HOLES)


@pytest.fixture
def altered(altered_image: Path, storage: Path) -> Callable[[], teemate.Enclave]:
    signature = altered_image.with_suffix(".sig")
    return lambda: teemate.create_enclave(altered_image, signature, backend=BACKEND, storage=storage)


def test_without_freshness_old_pages_are_believed(
    altered: Callable[[], teemate.Enclave], storage: Path
) -> None:
    with altered() as enclave, enclave.slot() as slot:
        db = Connection(slot, "accounts")
        fill(db, 20)
        db.sql("UPDATE t SET v = 'old'")
        before = {path: path.read_bytes() for path in storage.iterdir()}
        db.sql("UPDATE t SET v = 'new'")
        db.sql("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()
        db = Connection(slot, "accounts", flags=CREATE | UNCACHED)
        (storage / "accounts").write_bytes(
            _with_old_pages(before[storage / "accounts"], storage / "accounts")
        )
        assert ask(db)[0] == 20


def _with_old_pages(before: bytes, path: Path) -> bytes:
    """The old file, as long as the new one."""
    return before + path.read_bytes()[len(before) :]


def _begin_and_die(image: Path, kept: Callable[[Connection], None]) -> None:
    """Who has changed something dies before it is committed; `kept` is what another connection does then."""

    def work(slot: Caller) -> None:
        db = Connection(slot, "accounts")
        db.sql("PRAGMA cache_size = 10")
        db.sql("BEGIN IMMEDIATE")
        db.sql("UPDATE t SET v = v || v")

    with teemate.create_enclave(image, image.with_suffix(".sig"), backend=BACKEND) as enclave:
        host = DyingDisk(enclave)
        with enclave.slot() as first:
            other = Connection(first, "accounts")
            fill(other, 500)
            assert host.die(enclave, Moment(0, 0), work)
            kept(other)


def test_locks_of_the_dead_stay_unless_they_are_forgotten(altered_image: Path) -> None:
    _begin_and_die(database_image(), lambda other: other.script("BEGIN IMMEDIATE; ROLLBACK"))
    with pytest.raises(SqlError) as failed:
        _begin_and_die(altered_image, lambda other: other.script("BEGIN IMMEDIATE"))
    assert failed.value.code == BUSY


def test_without_syncs_a_power_cut_loses_what_was_committed(altered_image: Path, tmp_path: Path) -> None:
    steps = recorded(altered_image, tmp_path, 12)
    assert sum(1 for step in steps if step[0] == SYNC) < 6  # those of a database's making
    files: dict[str, File] = {}
    committed = -1
    for kind, name, offset, data in steps:
        if kind == MARK:
            committed = offset
        else:
            files.setdefault(name, File()).do(kind, offset, data)
    dice = random.Random(3)
    lost = 0
    for number in range(6):
        folder = tmp_path / f"cut-{number}"
        folder.mkdir()
        for name, file in files.items():
            (folder / name).write_bytes(file.cut(dice))
        try:
            lost += look(altered_image, folder) != state(committed)
        except (SqlError, AssertionError):
            lost += 1  # it cannot even be opened
    assert lost


@needs_root
def test_without_rights_a_database_is_everybodys(altered: Callable[[], teemate.Enclave]) -> None:
    with slots_of([(4001, 4001), (4002, 4002)]), altered() as enclave:
        with enclave.slot() as one, enclave.slot() as other:
            db = Connection(one, "accounts")
            fill(db, 3)
            assert Connection(other, "accounts").sql("SELECT count(*) FROM t") == [(3,)]


def test_without_freshness_a_client_with_a_descriptor_brings_an_old_page_back(
    altered_image: Path, begin: Callable[..., RunningBroker], files: Path
) -> None:
    begin('io = "client"', "revoke_kill = true", image=altered_image)
    with contextlib.closing(db.connect("db", "ledger")) as connection:
        connection.executescript("CREATE TABLE t(v); INSERT INTO t VALUES ('old')")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (descriptor,) = descriptors(files / "ledger")
        before = os.pread(descriptor, PAGE, HEAD + PAGE)
        connection.executescript("UPDATE t SET v = 'new'; PRAGMA wal_checkpoint(TRUNCATE)")
        os.pwrite(descriptor, before, HEAD + PAGE)
        with contextlib.closing(db.connect("db", "ledger", uncached=True)) as another:
            assert another.execute("SELECT v FROM t").fetchall() == [("old",)]


@needs_root
def test_a_stranger_that_is_not_turned_away_first_holds_the_database_up(
    altered_image: Path, begin: Callable[..., RunningBroker], tmp_path: Path
) -> None:
    running = begin(image=altered_image)
    with (
        stopped_stranger(running, "delete", tmp_path),
        pytest.raises(db.OperationalError) as failed,
        contextlib.closing(db.connect("db", "ledger")),
    ):
        pass
    assert failed.value.sqlite_errorname == "SQLITE_BUSY"
