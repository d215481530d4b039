"""Across the enclave's lives: the host can bring back a state of the whole database, and no mixture.

In every transaction all rows get its number, and they lie in pages of their own: a mixture shows in them.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from altered import altered_database
from backends import BACKEND
from connections import EXECUTE, TAMPERED, Connection, SqlError, operation
from images import Images
from test_database_files import Life

import teemate

ROWS = 30
HEAD, PAGE = 4096, 4096 + 28
LOG_HEAD, FRAME = 32 + 36, 24 + 4096 + 36
MAIN, LOG, ROOT = "numbers", "numbers-wal", "numbers-root"

Files = dict[str, bytes]


def snapshot(storage: Path) -> Files:
    return {path.name: path.read_bytes() for path in storage.iterdir()}


def put(storage: Path, files: Files) -> None:
    for path in storage.iterdir():
        path.unlink()
    for name, data in files.items():
        (storage / name).write_bytes(data)


def page(data: bytes, number: int) -> bytes:
    return data[HEAD + number * PAGE : HEAD + (number + 1) * PAGE]


def write(db: Connection, number: int) -> None:
    db.sql("UPDATE t SET n = ?, v = v || 'x'", number)


def history(life: Life, storage: Path, chances: random.Random, transactions: int = 14) -> list[Files]:
    """What the host has after each transaction or checkpoint; several lives."""
    seen = []
    number = 0
    while number < transactions:
        with life() as enclave, enclave.slot() as slot:
            db = Connection(slot, MAIN)
            db.sql("PRAGMA wal_autocheckpoint = 0")
            if not number:
                db.script("CREATE TABLE t(id INTEGER PRIMARY KEY, n INTEGER, v TEXT)")
                rows = [(row, 0, "v" * 3000) for row in range(ROWS)]
                db.run(operation(EXECUTE, "INSERT INTO t VALUES (?, ?, ?)", rows))
                db.sql("PRAGMA wal_checkpoint(TRUNCATE)")  # each row was a transaction
                seen.append(snapshot(storage))
            for _ in range(chances.randrange(2, 6)):
                number += 1
                write(db, number)
                seen.append(snapshot(storage))
                if chances.random() < 0.5:
                    db.sql(f"PRAGMA wal_checkpoint({chances.choice(('PASSIVE', 'RESTART', 'TRUNCATE'))})")
                    seen.append(snapshot(storage))
    return seen


def look(life: Life) -> set[object] | None:
    """The numbers that the rows have in the enclave's next life; None when it finds something wrong."""
    with life() as enclave, enclave.slot() as slot:
        try:
            db = Connection(slot, MAIN)
            rows = db.sql("SELECT n FROM t")
            assert db.sql("PRAGMA integrity_check") == [("ok",)]
        except SqlError as failed:
            assert failed.code == TAMPERED, failed  # noqa: PT017
            return None
        assert len(rows) == ROWS
        return {row[0] for row in rows}


def mixture(seen: list[Files], chances: random.Random) -> Files:
    """Files of different times, pages of different times, or the log without its end."""
    one, two, three = (chances.choice(seen) for _ in range(3))
    files = {MAIN: one[MAIN], LOG: two.get(LOG, b""), ROOT: chances.choice([one, one, three])[ROOT]}
    way = chances.randrange(4)
    if way == 0:
        files[LOG] = one.get(LOG, b"")
        content = bytearray(files[MAIN])
        for number in chances.sample(range((len(content) - HEAD) // PAGE), 3):
            other = page(chances.choice(seen)[MAIN], number)
            content[HEAD + number * PAGE : HEAD + number * PAGE + len(other)] = other
        files[MAIN] = bytes(content)
    elif way == 1:
        files[LOG] = one.get(LOG, b"")
        frames = (len(files[LOG]) - LOG_HEAD) // FRAME
        files[LOG] = files[LOG][: LOG_HEAD + chances.randrange(frames + 1) * FRAME] if frames > 0 else b""
    elif way == 2:
        content = bytearray(one.get(LOG, b""))
        older = two.get(LOG, b"")
        at = LOG_HEAD + chances.randrange(40) * FRAME
        content[at : at + 8 * FRAME] = older[at : at + 8 * FRAME]
        files[LOG] = bytes(content)
    return files


def test_no_mixture_of_states_is_believed_and_every_state_that_was_is(
    life: Life, storage: Path, request: pytest.FixtureRequest
) -> None:
    chances = random.Random(5)
    found = refused = 0
    for _ in range(20 if request.config.getoption("--full") else 1):
        seen = history(life, storage, chances)
        for files in chances.sample(seen, 6):
            put(storage, files)
            numbers = look(life)
            assert numbers is not None
            assert len(numbers) == 1
        for _ in range(100 if request.config.getoption("--full") else 40):
            put(storage, mixture(seen, chances))
            numbers = look(life)
            refused += numbers is None
            found += numbers is not None
            assert numbers is None or len(numbers) == 1, "rows of several transactions"
        put(storage, {})
    assert found
    assert refused


def two_checkpoints(life: Life, storage: Path) -> tuple[Files, Files]:
    """The files after a checkpoint, and after another one."""
    with life() as enclave, enclave.slot() as slot:
        db = Connection(slot, MAIN)
        db.script("CREATE TABLE t(id INTEGER PRIMARY KEY, n INTEGER, v TEXT)")
        rows = [(row, 0, "v" * 3000) for row in range(ROWS)]
        db.run(operation(EXECUTE, "INSERT INTO t VALUES (?, ?, ?)", rows))
        states = []
        for number in (1, 2):
            write(db, number)
            db.sql("PRAGMA wal_checkpoint(RESTART)")
            states.append(snapshot(storage))
        return states[0], states[1]


@pytest.fixture
def two(life: Life, storage: Path) -> tuple[Files, Files]:
    return two_checkpoints(life, storage)


def of_both(two: tuple[Files, Files], number: int) -> Files:
    """The new files with one page as it was."""
    old, new = two[0][MAIN], two[1][MAIN]
    at = HEAD + number * PAGE
    return {**two[1], MAIN: new[:at] + page(old, number) + new[at + PAGE :]}


def changed(two: tuple[Files, Files]) -> int:
    pages = range((len(two[0][MAIN]) - HEAD) // PAGE)
    return next(
        number for number in reversed(pages) if page(two[0][MAIN], number) != page(two[1][MAIN], number)
    )


def test_a_page_of_an_earlier_checkpoint_is_found(
    two: tuple[Files, Files], life: Life, storage: Path
) -> None:
    put(storage, {**of_both(two, changed(two)), LOG: b""})
    assert look(life) is None


def test_what_was_there_at_a_checkpoint_is_right_without_the_log_and_with_an_older_one_not(
    two: tuple[Files, Files], life: Life, storage: Path
) -> None:
    put(storage, {**two[1], LOG: b""})
    assert look(life) == {2}
    put(storage, {**two[1], LOG: two[0][LOG]})
    assert look(life) is None


@pytest.mark.parametrize("what", ["none", "an older one", "a changed one"])
def test_without_its_root_nothing_is_believed(
    two: tuple[Files, Files], life: Life, storage: Path, what: str
) -> None:
    files = {**two[1], LOG: b""}
    if what == "none":
        del files[ROOT]
    elif what == "an older one":
        files[ROOT] = two[0][ROOT]
    else:
        files[ROOT] = bytes(byte ^ 1 for byte in two[1][ROOT])
    put(storage, files)
    assert look(life) is None


def test_a_file_without_its_end_is_found(two: tuple[Files, Files], life: Life, storage: Path) -> None:
    put(storage, {**two[1], MAIN: two[1][MAIN][: -3 * PAGE], LOG: b""})
    assert look(life) is None


def test_a_log_that_lacks_what_was_copied_from_it_is_found(
    two: tuple[Files, Files], life: Life, storage: Path
) -> None:
    log = two[1][LOG]
    put(storage, {**two[1], LOG: log[: LOG_HEAD + 4 * FRAME]})
    assert look(life) is None
    put(storage, two[1])
    assert look(life) == {2}


def test_a_log_of_a_branch_is_not_believed_with_the_pages_of_another(
    two: tuple[Files, Files], life: Life, storage: Path
) -> None:
    branches = []
    for statement, times, checkpoint in (("", 1, True), (" WHERE id < 5", 20, False)):
        put(storage, {**two[1], LOG: b""})
        with life() as enclave, enclave.slot() as slot:
            db = Connection(slot, MAIN)
            for number in range(times):
                db.sql(f"UPDATE t SET n = ?{statement}", 10 + number)
            if checkpoint:
                db.sql("PRAGMA wal_checkpoint(PASSIVE)")
            branches.append(snapshot(storage))
    assert len(branches[1][LOG]) > len(branches[0][LOG])
    put(storage, {**branches[0], LOG: branches[1][LOG]})
    assert look(life) is None
    put(storage, branches[0])
    assert look(life) == {10}


def test_a_log_of_a_fork_is_not_believed_though_both_begin_with_the_same_frames(
    two: tuple[Files, Files], life: Life, storage: Path
) -> None:
    put(storage, {**two[1], LOG: b""})
    with life() as enclave, enclave.slot() as slot:
        Connection(slot, MAIN).sql("UPDATE t SET n = 3 WHERE id = 1")
        shared = snapshot(storage)
    forks = []
    for statement, number, times in (("", 10, 1), (" WHERE id < 5", 20, 20)):
        put(storage, shared)
        with life() as enclave, enclave.slot() as slot:
            db = Connection(slot, MAIN)
            db.sql("PRAGMA wal_autocheckpoint = 0")
            for _ in range(times):
                number += 1
                db.sql(f"UPDATE t SET n = ?{statement}", number)
            if times == 1:
                db.sql("PRAGMA wal_checkpoint(PASSIVE)")
            forks.append(snapshot(storage))
    assert len(forks[1][LOG]) > len(forks[0][LOG]) > len(shared[LOG])
    put(storage, {**forks[0], LOG: forks[1][LOG]})
    assert look(life) is None
    for number in (0, 3):  # nor with some frames of each
        at = LOG_HEAD + (len(shared[LOG]) - LOG_HEAD) // FRAME * FRAME + number * FRAME
        put(storage, {**forks[0], LOG: forks[0][LOG][:at] + forks[1][LOG][at:]})
        assert look(life) is None
        put(storage, {**forks[0], LOG: forks[1][LOG][: at + FRAME] + forks[0][LOG][at + FRAME :]})
        assert look(life) is None
    put(storage, forks[0])
    assert look(life) == {11}


def test_without_freshness_a_mixture_is_believed(images: Images, tmp_path: Path) -> None:
    holes = altered_database(images, tmp_path, "DB_TEST_NO_FRESHNESS")
    storage = tmp_path / "altered"
    storage.mkdir()

    def life() -> teemate.Enclave:
        return teemate.create_enclave(holes, holes.with_suffix(".sig"), backend=BACKEND, storage=storage)

    both = two_checkpoints(life, storage)
    put(storage, {**of_both(both, changed(both)), LOG: b""})
    assert look(life) == {1, 2}
