"""Who dies in a write together with the warden leaves records that are neither old nor new.

Nobody takes them for tampering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from altered import altered_database
from backends import BACKEND, sim_only
from connections import (
    CREATE,
    EXECUTE,
    TAMPERED,
    UNCACHED,
    Caller,
    Connection,
    SqlError,
    database_image,
    operation,
)
from dying import PARTS, DyingDisk, Index, Moment
from images import Images, layout_options

import teemate
from teemate.image import SigParams, layout_image, sign_with_key

ROWS = 20
NAME = "numbers"
SLOTS = 100
Work = Callable[[Caller], None]


@pytest.fixture(scope="module")
def many_slots(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database image with a slot for each who dies."""
    output = tmp_path_factory.mktemp("dying") / "db.sgxs"
    elf = database_image().with_suffix(".elf")
    built = layout_image(elf, output, layout_options("db", heap="16M", slots=SLOTS))
    signature = sign_with_key(SigParams().unsigned(built.mrenclave), images.key)
    output.with_suffix(".sig").write_bytes(signature.to_bytes())
    return output


@pytest.fixture
def mortal(many_slots: Path) -> Iterator[tuple[teemate.Enclave, DyingDisk]]:
    with teemate.create_enclave(many_slots, many_slots.with_suffix(".sig"), backend=BACKEND) as enclave:
        yield enclave, DyingDisk(enclave)


def commit(number: int) -> Work:
    """All rows get this number; some of it is written before the commit."""

    def work(slot: Caller) -> None:
        db = Connection(slot, NAME)
        db.sql("PRAGMA wal_autocheckpoint = 0")
        db.sql("PRAGMA cache_size = 10")
        db.sql("UPDATE t SET n = ?", number)

    return work


def checkpoint(kind: str) -> Callable[[int], Work]:
    return lambda _number: lambda slot: Connection(slot, NAME).script(f"PRAGMA wal_checkpoint({kind})")


WORKS: dict[str, Callable[[int], Work]] = {
    "a commit": commit,
    "a checkpoint": checkpoint("RESTART"),
    "a checkpoint that cuts the log": checkpoint("TRUNCATE"),
}
AFTERWARDS = ("the others go on", "the log is read anew", "a short commit comes before the log is read anew")


class Book:
    """What all see, and what it has to be."""

    def __init__(self, enclave: teemate.Enclave, first: Caller, second: Caller) -> None:
        self.second = second
        self.db = Connection(first, NAME)
        self.db.sql("PRAGMA wal_autocheckpoint = 0")
        self.db.script("CREATE TABLE t(id INTEGER PRIMARY KEY, n INTEGER, v TEXT); CREATE TABLE u(n INTEGER)")
        rows = [(row, 0, "v" * 3000) for row in range(ROWS)]
        self.db.run(operation(EXECUTE, "INSERT INTO u VALUES (0)"))
        self.db.run(
            operation(EXECUTE, "BEGIN"),
            operation(EXECUTE, "INSERT INTO t VALUES (?, ?, ?)", rows),
            operation(EXECUTE, "COMMIT"),
        )
        self.index = Index(enclave)
        self.number = 0
        self.short = 0

    def begin_log(self, *, long: bool) -> None:
        """Have a log that was just begun in the place of a longer one: its later places are known."""
        self.write()
        self.db.sql("PRAGMA wal_checkpoint(RESTART)")
        if long:
            self.write()
        else:
            self.write_little()

    def write(self) -> None:
        self.number += 1
        self.db.sql("UPDATE t SET n = ?", self.number)

    def write_little(self) -> None:
        self.short += 1
        self.db.sql("UPDATE u SET n = ?", self.short)

    def look(self, *numbers: int) -> None:
        """See what is there; from now on that is what it has to be."""
        found = self._ask(self.db)
        assert found[0] in numbers
        fresh = Connection(self.second, NAME, flags=CREATE | UNCACHED)
        assert self._ask(fresh) == found
        fresh.close()
        self.number = found[0]

    def _ask(self, db: Connection) -> tuple[int, int]:
        assert db.sql("PRAGMA integrity_check") == [("ok",)]
        ((number,),) = db.sql("SELECT DISTINCT n FROM t")
        ((short,),) = db.sql("SELECT n FROM u")
        assert isinstance(number, int)
        assert short == self.short
        return number, self.short


QUICK = {(0, 1), (0, 2), (1, 1)}
"""Of works and what comes afterwards, where one record that is torn does harm, and one more."""


@sim_only("the wal-index is changed from outside")
@pytest.mark.parametrize("afterwards", range(len(AFTERWARDS)), ids=AFTERWARDS)
@pytest.mark.parametrize("work", range(len(WORKS)), ids=WORKS)
def test_a_write_that_dies_with_the_warden_is_done_or_not(
    work: int, afterwards: int, mortal: tuple[teemate.Enclave, DyingDisk], request: pytest.FixtureRequest
) -> None:
    if (work, afterwards) not in QUICK and not request.config.getoption("--full"):
        pytest.skip("the others of these: --full")
    enclave, host = mortal
    with enclave.slot() as first, enclave.slot() as second:
        book = Book(enclave, first, second)
        deaths, number, dying = 0, 0, True
        while dying:
            for part in PARTS:
                book.begin_log(long=work != 0)
                dying = host.die(enclave, Moment(number, part), list(WORKS.values())[work](book.number + 1))
                deaths += dying
                if afterwards == 2:
                    book.write_little()
                if afterwards:
                    book.index.tear()
                book.look(book.number, book.number + 1)
                book.write()
                book.look(book.number)
            # Pages are all alike: of a checkpoint's some are enough.
            number += 1 if work == 0 else 3
        assert host.torn > 3
        assert deaths >= 12


@sim_only("the wal-index is changed from outside")
def test_who_reads_the_log_anew_after_it_may_die_too(mortal: tuple[teemate.Enclave, DyingDisk]) -> None:
    enclave, host = mortal
    with enclave.slot() as first, enclave.slot() as second:
        book = Book(enclave, first, second)
        book.begin_log(long=False)
        assert host.die(enclave, Moment(0, 1), commit(book.number + 1))
        assert host.torn
        book.index.tear()
        deaths = 0
        while host.die(enclave, Moment(deaths, 0, reads=True), lambda slot: Connection(slot, NAME).close()):
            deaths += 1
        assert deaths > 3
        book.look(book.number)
        book.write()
        book.look(book.number)


@sim_only("the wal-index is changed from outside")
def test_what_is_not_settled_is_taken_for_tampering(images: Images, tmp_path: Path) -> None:
    image = altered_database(images, tmp_path, "DB_TEST_NO_SETTLE")
    with teemate.create_enclave(image, image.with_suffix(".sig"), backend=BACKEND) as enclave:
        host = DyingDisk(enclave)
        with enclave.slot() as first, enclave.slot() as second:
            book = Book(enclave, first, second)
            book.begin_log(long=False)
            assert host.die(enclave, Moment(0, 1), commit(book.number + 1))
            book.index.tear()
            with pytest.raises(SqlError) as failed:
                book.look(book.number)
    assert failed.value.code == TAMPERED
