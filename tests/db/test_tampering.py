"""What the host does to the files is found before it is believed, also after everybody has gone."""

from __future__ import annotations

import errno
import struct
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from connections import CREATE, TAMPERED, UNCACHED, Caller, Connection, SqlError
from test_database_files import Life, fill

import teemate
from teemate._native import ffi, lib

Connect = Callable[..., Connection]

HEAD, PAGE, LOG_HEAD, FRAME = 4096, 4096 + 28, 32 + 36, 24 + 4096 + 36

# What lies where (records.h): a byte of each kind.
PLACES = {
    "accounts": {
        "sealed head": 3,
        "sealed key": 90,
        "first page's nonce": HEAD + 2,
        "first page": HEAD + 12 + 50,
        "first page's tag": HEAD + 12 + 4096 + 5,
        "a page's nonce": HEAD + 6 * PAGE + 2,
        "a page": HEAD + 6 * PAGE + 2000,
        "a page's tag": HEAD + 7 * PAGE - 1,
    },
    "accounts-wal": {
        "the log's head": 12 + 8,
        "the log's nonce": 1,
        "the log's tag": 12 + 32 + 3,
        "the log's number of the head": 12 + 32 + 16,
        "a frame's nonce": LOG_HEAD + FRAME,
        "a frame's head": LOG_HEAD + FRAME + 12 + 4,
        "a frame's page": LOG_HEAD + FRAME + 12 + 24 + 99,
        "a frame's tag": LOG_HEAD + 2 * FRAME - 8 - 2,
        "a frame's number of the head": LOG_HEAD + 2 * FRAME - 8,
    },
}


def ask(db: Connection) -> tuple[object, ...]:
    """Read everything there is."""
    db.sql("PRAGMA integrity_check")
    return db.sql("SELECT count(*), sum(length(v)), sum(id), min(v), max(v) FROM t")[0]


def reading(slot: Caller) -> Connection:
    """A connection that reads what the host has, also where the enclave still knows what was there."""
    return Connection(slot, "accounts", flags=CREATE | UNCACHED)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


def detects(db: Callable[[], Connection]) -> None:
    with pytest.raises(SqlError) as failed:
        ask(db())
    assert failed.value.code == TAMPERED, failed.value


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name, places in PLACES.items() for place in places]
)
def test_a_changed_byte_is_found(life: Life, storage: Path, name: str, place: str) -> None:
    with life() as enclave, enclave.slot() as slot:
        db = Connection(slot, "accounts")
        fill(db, 200)
        db.sql("PRAGMA wal_checkpoint(TRUNCATE)")
        for rows in ("0, 199", "50", "60"):
            db.sql(f"UPDATE t SET v = v || 'more' WHERE id IN ({rows})")
        db.close()
        path = storage / name
        kept = path.read_bytes()
        assert len(kept) > PLACES[name][place]
        if "sealed" not in place:  # which is read once in a life
            flip(path, PLACES[name][place])
            if place.startswith("the log's"):  # it is read when the log is read anew
                path.write_bytes(kept)
            else:
                detects(lambda: reading(slot))
                slot.call("db_close")
                path.write_bytes(kept)
        right = ask(reading(slot))
        assert right[0] == 200
    flip(path, PLACES[name][place])
    if "sealed" in place:  # of which a new database has two
        flip(path, PLACES[name][place] + HEAD // 2)
    for connect in (reading, lambda slot: Connection(slot, "accounts")):  # which reads many pages at a time
        with life() as enclave, enclave.slot() as slot:
            detects(partial(connect, slot))


def test_only_of_the_last_transaction_it_cannot_be_told_from_a_power_cut(life: Life, storage: Path) -> None:
    with life() as enclave, enclave.slot() as slot:
        db = Connection(slot, "accounts")
        fill(db, 200)
        for number in range(3):
            db.sql("UPDATE t SET v = ?", f"{number}")
        db.close()
    path = storage / "accounts-wal"
    flip(path, len(path.read_bytes()) - 2)
    with life() as enclave, enclave.slot() as slot:
        db = Connection(slot, "accounts")
        assert db.sql("SELECT count(*), min(v), max(v) FROM t") == [(200, "1", "1")]
        assert db.sql("PRAGMA integrity_check") == [("ok",)]


def test_pages_that_were_swapped_are_found(connect: Connect, storage: Path) -> None:
    db = connect("accounts")
    fill(db, 200)
    db.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    path = storage / "accounts"
    data = path.read_bytes()
    one, two = (slice(HEAD + n * PAGE, HEAD + (n + 1) * PAGE) for n in (2, 3))
    swapped = bytearray(data)
    swapped[one], swapped[two] = data[two], data[one]
    path.write_bytes(swapped)
    detects(lambda: reading(db.slot))
    db.slot.call("db_close")
    assert ask(Connection(db.slot, "accounts"))[0] == 200  # of the cache: it is right whatever the host has
    db.slot.call("db_close")
    path.write_bytes(data)
    assert ask(reading(db.slot))[0] == 200


# What lies where in the newer one of a root's two places (root.h); its chunk of tags comes after both.
ROOT = {
    "nonce": 1,
    "sealed head": 12 + 8,
    "tag": 12 + 80 + 5,
}


@pytest.mark.parametrize("place", [*ROOT, "a page's tag in it", "the chunk's nonce"])
def test_a_changed_byte_of_the_root_is_found_in_the_next_life(life: Life, storage: Path, place: str) -> None:
    path = storage / "accounts-root"
    with life() as enclave, enclave.slot() as slot:
        db = Connection(slot, "accounts")
        fill(db, 200)
        db.sql("PRAGMA wal_checkpoint(TRUNCATE)")
        before = path.read_bytes()
        db.sql("UPDATE t SET v = v || 'more'")
        db.sql("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()
    after = path.read_bytes()
    newer = 0 if before[:HEAD] != after[:HEAD] else HEAD
    assert before[newer : newer + HEAD] != after[newer : newer + HEAD]
    if place in ROOT:
        flip(path, newer + ROOT[place])
    else:  # where the two chunks of the two roots differ
        chunk = next(n for n in range(2 * HEAD, len(after)) if before[n : n + 1] != after[n : n + 1])
        flip(path, chunk + (40 if "page" in place else 0))
    assert path.read_bytes() != after
    with life() as enclave, enclave.slot() as slot:
        detects(partial(Connection, slot, "accounts"))
    path.write_bytes(after)
    with life() as enclave, enclave.slot() as slot:
        assert ask(Connection(slot, "accounts"))[0] == 200


def test_frames_of_the_log_that_were_swapped_are_found(life: Life, storage: Path) -> None:
    path = storage / "accounts-wal"
    with life() as enclave, enclave.slot() as slot:
        db = Connection(slot, "accounts")
        fill(db, 200)
        db.sql("PRAGMA wal_checkpoint(TRUNCATE)")
        for state in "abc":  # each in frames of the same pages
            db.sql("UPDATE t SET v = ? WHERE id < 100", state)
        db.close()
        right = path.read_bytes()
        frames = (len(right) - LOG_HEAD) // FRAME
        swapped = bytearray(right)
        for number in range(frames // 2):
            one, two = (
                slice(LOG_HEAD + n * FRAME, LOG_HEAD + (n + 1) * FRAME) for n in (number, frames - 1 - number)
            )
            swapped[one], swapped[two] = right[two], right[one]
        path.write_bytes(swapped)
        detects(lambda: reading(slot))
        slot.call("db_close")
        path.write_bytes(right)
        assert ask(reading(slot))[0] == 200
    one, two = (slice(LOG_HEAD + n * FRAME, LOG_HEAD + (n + 1) * FRAME) for n in (0, 1))
    swapped = bytearray(right)
    swapped[one], swapped[two] = right[two], right[one]
    path.write_bytes(swapped)
    with life() as enclave, enclave.slot() as slot:
        detects(partial(Connection, slot, "accounts"))


@pytest.mark.parametrize("what", ["a page", "a frame", "all files"])
def test_what_is_of_another_database_is_found(life: Life, storage: Path, what: str) -> None:
    with life() as enclave, enclave.slot() as slot:
        for name in ("accounts", "salaries"):
            db = Connection(slot, name)
            fill(db, 200)
            db.sql("PRAGMA wal_checkpoint(TRUNCATE)")
            for _ in range(3):
                db.sql("UPDATE t SET v = v || 'more' WHERE id < 100")
            db.close()
        name = "accounts-wal" if what == "a frame" else "accounts"
        ours = (storage / name).read_bytes()
        theirs = (storage / name.replace("accounts", "salaries")).read_bytes()
        # In this life what is read of it, a frame of the last transaction; in the next one any but that.
        frames = (len(ours) - LOG_HEAD) // FRAME
        last = HEAD + ((len(ours) - HEAD) // PAGE - 1) * PAGE
        places = [LOG_HEAD + (frames - 1) * FRAME, LOG_HEAD + FRAME] if what == "a frame" else [last, last]
        length = FRAME if what == "a frame" else PAGE
        for at in places if what != "all files" else ():
            (storage / name).write_bytes(ours[:at] + theirs[at : at + length] + ours[at + length :])
            if at == places[0]:
                detects(lambda: reading(slot))
                slot.call("db_close")
    if what == "all files":
        for suffix in ("", "-wal", "-root"):
            (storage / f"accounts{suffix}").write_bytes((storage / f"salaries{suffix}").read_bytes())
    with life() as enclave, enclave.slot() as slot:
        detects(partial(Connection, slot, "accounts"))


def test_a_database_under_anothers_name_is_found(life: Life, storage: Path) -> None:
    with life() as enclave, enclave.slot() as slot:
        for name in ("accounts", "salaries"):
            db = Connection(slot, name)
            fill(db, 10)
            db.sql("PRAGMA wal_checkpoint(TRUNCATE)")
            db.close()
    (storage / "salaries").write_bytes((storage / "accounts").read_bytes())
    with life() as enclave, enclave.slot() as slot:
        detects(lambda: Connection(slot, "salaries"))


@pytest.mark.parametrize(
    "what", ["all", "a page", "the log", "the log's end", "the file's end", "nothing left"]
)
def test_what_is_older_is_found_while_the_enclave_lives(connect: Connect, storage: Path, what: str) -> None:
    db = connect("accounts")
    fill(db, 200)
    db.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    db.sql("UPDATE t SET v = 'old'")
    before = {path.name: path.read_bytes() for path in storage.iterdir()}
    db.sql("UPDATE t SET v = 'new'")
    if what in ("all", "a page", "the file's end", "nothing left"):
        db.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    main, log = storage / "accounts", storage / "accounts-wal"
    after = main.read_bytes()
    changed = [n for n in range((len(after) - HEAD) // PAGE) if page(after, n) != page(before["accounts"], n)]
    match what:
        case "all":
            for name, data in before.items():
                (storage / name).write_bytes(data)
        case "a page":
            number = changed[-1]
            main.write_bytes(
                after[: HEAD + number * PAGE]
                + page(before["accounts"], number)
                + after[HEAD + (number + 1) * PAGE :]
            )
        case "the log":
            log.write_bytes(before["accounts-wal"])
        case "the log's end":
            log.write_bytes(log.read_bytes()[:-1])
        case "the file's end":
            main.write_bytes(after[:-1])
        case "nothing left":
            main.write_bytes(b"")
    detects(lambda: reading(db.slot))


def page(data: bytes, number: int) -> bytes:
    return data[HEAD + number * PAGE : HEAD + (number + 1) * PAGE]


def test_a_deleted_file_is_found_or_does_no_harm(connect: Connect, storage: Path) -> None:
    db = connect("accounts")
    fill(db, 20)
    db.close()
    (storage / "accounts").unlink()
    try:  # whoever serves files may still have it open
        assert ask(reading(db.slot))[0] == 20
    except SqlError as failed:
        assert failed.code == TAMPERED  # noqa: PT017
    assert not (storage / "accounts").exists()


class Disk:
    """A host in this program: files in memory; `failures` are what it answers once to what it did.

    `read` counts how often it read from which.
    """

    OPEN, READ, WRITE, SYNC, SIZE, TRUNCATE, DELETE = range(1, 8)
    _REQUEST = struct.Struct("<IIQQ64s")

    def __init__(self, enclave: teemate.Enclave) -> None:
        self.files: dict[str, bytearray] = {}
        self.failures: dict[tuple[int, str], int] = {}
        self.read: Counter[str] = Counter()

        @ffi.callback("teemate_disk")  # type: ignore[misc]
        def do(_context: Any, request: Any, data: Any) -> int:
            op, flags, offset, length, raw = self._REQUEST.unpack(
                bytes(ffi.buffer(request, self._REQUEST.size))
            )
            name = raw.rstrip(b"\0").decode()
            if op == self.OPEN and flags & 1:
                self.files.setdefault(name, bytearray())
            if name not in self.files:
                return -errno.ENOENT
            result = self._do(op, name, offset, ffi.buffer(data, length) if length else b"")
            return self.failures.pop((op, name), result)

        self._callback = do
        assert lib.teemate_private_disk(enclave._native, do, ffi.NULL) == 0

    def _do(self, op: int, name: str, offset: int, data: Any) -> int:
        content = self.files[name]
        if op == self.READ:
            self.read[name] += 1
            found = content[offset : offset + len(data)]
            data[: len(found)] = bytes(found)
            return len(found)
        if op == self.WRITE:
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = bytes(data)
            return len(data)
        if op == self.SIZE:
            return len(content)
        if op == self.TRUNCATE:
            content.extend(bytes(max(0, offset - len(content))))
            del content[offset:]
        if op == self.DELETE:
            del self.files[name]
        return 0


@pytest.fixture
def disk(diskless: teemate.Enclave) -> tuple[teemate.Enclave, Disk]:
    return diskless, Disk(diskless)


def test_what_a_failed_writer_left_is_not_believed_after_anothers_commit(
    disk: tuple[teemate.Enclave, Disk],
) -> None:
    enclave, host = disk
    with enclave.slot() as first, enclave.slot() as second:
        one, two = Connection(first, "accounts"), Connection(second, "accounts")
        fill(one, 200)
        host.failures[host.WRITE, "accounts-wal"] = -errno.ENOSPC
        with pytest.raises(SqlError):
            one.sql("UPDATE t SET v = 'left'")
        left = bytes(host.files["accounts-wal"])
        two.sql("UPDATE t SET v = 'right'")
        right = bytes(host.files["accounts-wal"])
        two.close()
        host.files["accounts-wal"][: len(left)] = left
        detects(lambda: reading(second))
        second.call("db_close")
        host.files["accounts-wal"][:] = right
        assert ask(reading(second))[3:] == ("right", "right")


def test_a_cut_that_was_done_and_not_acknowledged_is_no_tampering(disk: tuple[teemate.Enclave, Disk]) -> None:
    enclave, host = disk
    with enclave.slot() as first, enclave.slot() as second:
        one, two = Connection(first, "accounts"), Connection(second, "accounts")
        for name in ("accounts", "accounts-wal"):
            one.script("DROP TABLE IF EXISTS t")
            fill(one, 400)
            one.sql("DELETE FROM t WHERE id >= 20")
            one.sql("VACUUM")
            host.failures[host.TRUNCATE, name] = -errno.EIO
            with pytest.raises(SqlError):
                one.sql("PRAGMA wal_checkpoint(TRUNCATE)")
            assert not host.failures
            assert ask(two)[0] == 20
            two.sql("INSERT INTO t SELECT id + 1000, v FROM t")
            assert two.sql("PRAGMA wal_checkpoint(TRUNCATE)")[0][0] == 0
            one.close()
            one = Connection(first, "accounts")
            assert ask(one)[0] == 40
