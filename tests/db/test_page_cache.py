"""Pages that one connection has read or written are there for the others, and are always the right ones."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from backends import BACKEND
from connections import CREATE, EXECUTE, UNCACHED, Caller, Connection, SqlError, database_image, operation
from images import Images, layout_options
from test_database_files import fill
from test_tampering import Disk

import teemate
import teemate.db
from teemate.image import SigParams, layout_image, sign_with_key

Connect = Callable[..., Connection]
ROWS = "SELECT count(*), sum(id), min(v), max(v) FROM t"


class Cache(NamedTuple):
    """struct db_cache."""

    limit: int
    size: int
    hits: int
    fills: int


def cache(slot: Caller) -> Cache:
    return Cache(*struct.unpack("<4Q", slot.call("db_cache")))


def memory(slot: Caller) -> int:
    """Bytes that the slot's connection has of the heap."""
    (now,) = struct.unpack_from("<Q", slot.call("db_statistics"))
    assert isinstance(now, int)
    return now


def test_what_one_connection_has_read_the_others_find(connect: Connect) -> None:
    one = connect("accounts")
    fill(one, 2000)
    one.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    found = one.sql(ROWS)
    before = cache(one.slot)
    for _ in range(3):
        assert connect("accounts").sql(ROWS) == found
    after = cache(one.slot)
    assert after.fills == before.fills
    assert after.hits > before.hits + 3 * 50
    assert after.size == before.size


def test_a_connection_keeps_few_pages_of_its_own(connect: Connect) -> None:
    one, two = connect("accounts"), connect("accounts")
    fill(one, 10_000)
    assert two.sql("SELECT count(*) FROM t WHERE v LIKE 'PLAIN%'") == [(10_000,)]
    assert cache(two.slot).size > 1 << 20
    assert memory(two.slot) < 512 << 10


def test_who_asks_for_what_the_host_has_is_not_given_what_is_kept(connect: Connect) -> None:
    one = connect("accounts")
    fill(one, 2000)
    found, before = one.sql(ROWS), cache(one.slot)
    assert connect("accounts", flags=CREATE | UNCACHED).sql(ROWS) == found
    assert cache(one.slot) == before


def test_a_reader_goes_on_with_the_pages_of_its_own_state(connect: Connect) -> None:
    one, two, three = connect("accounts"), connect("accounts"), connect("accounts")
    fill(one, 500)
    one.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    one.sql("UPDATE t SET v = 'first'")
    two.sql("BEGIN")
    assert two.sql(ROWS) == [(500, 124_750, "first", "first")]
    for state in ("second", "third"):
        one.sql("UPDATE t SET v = ?", state)
        one.sql("PRAGMA wal_checkpoint(PASSIVE)")
        three.sql("BEGIN")
        assert three.sql(ROWS) == [(500, 124_750, state, state)]
        assert two.sql(ROWS) == [(500, 124_750, "first", "first")]
        three.sql("COMMIT")
    two.sql("COMMIT")
    one.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    assert two.sql(ROWS) == three.sql(ROWS) == [(500, 124_750, "third", "third")]


def test_what_was_rolled_back_is_in_nobodys_pages(connect: Connect) -> None:
    one, two = connect("accounts"), connect("accounts")
    fill(one, 500)
    one.sql("PRAGMA cache_size = 8")  # so most of it goes to the log, and to the cache
    one.sql("BEGIN")
    one.sql("UPDATE t SET v = 'undone'")
    assert two.sql(ROWS)[0][2] != "undone"
    one.sql("ROLLBACK")
    for db in (one, two):
        assert db.sql(ROWS)[0][2:] == (f"PLAIN{0:05}" * 20, f"PLAIN{499:05}" * 20)
    two.sql("UPDATE t SET v = 'done'")
    assert one.sql(ROWS) == [(500, 124_750, "done", "done")]


def test_a_database_that_is_made_anew_has_nothing_of_the_deleted_one(connect: Connect) -> None:
    keeper = connect("other")
    for number in range(3):
        one, two = connect("accounts"), connect("accounts")
        assert one.sql("SELECT count(*) FROM sqlite_schema") == [(0,)]
        fill(one, 300)
        one.sql("UPDATE t SET v = ?", f"{number}")
        assert two.sql(ROWS) == [(300, 44_850, f"{number}", f"{number}")]
        one.close()
        two.close()
        keeper.slot.call("db_delete", b"accounts")


def test_pages_that_are_read_in_order_are_fetched_many_at_a_time() -> None:
    image, files = database_image(), {}
    for life in range(2):
        with teemate.create_enclave(image, image.with_suffix(".sig"), backend=BACKEND) as enclave:
            host = Disk(enclave)
            host.files.update(files)
            with enclave.slot() as slot:
                db = Connection(slot, "accounts")
                if not life:
                    fill(db, 20_000)
                    db.sql("PRAGMA wal_checkpoint(TRUNCATE)")
                before, kept = host.read["accounts"], cache(slot)
                assert db.sql("SELECT count(*), sum(id) FROM t WHERE v LIKE 'PLAIN%'") == [
                    (20_000, 199_990_000)
                ]
                reads, fills = host.read["accounts"] - before, cache(slot).fills - kept.fills
            files = host.files
    assert fills > 500
    assert reads < fills / 5


@pytest.fixture
def narrow(images: Images, tmp_path: Path, storage: Path) -> Iterator[teemate.Enclave]:
    """The database enclave with a small heap."""
    output = tmp_path / "narrow.sgxs"
    options = layout_options("db", heap="8M", slots=3)
    built = layout_image(database_image().with_suffix(".elf"), output, options)
    signature = sign_with_key(SigParams().unsigned(built.mrenclave), images.key)
    output.with_suffix(".sig").write_bytes(signature.to_bytes())
    with teemate.create_enclave(
        output, output.with_suffix(".sig"), backend=BACKEND, storage=storage
    ) as enclave:
        yield enclave


def test_a_database_larger_than_the_cache_is_read_right_within_its_limit(narrow: teemate.Enclave) -> None:
    with narrow.slot() as first, narrow.slot() as second:
        one, two = Connection(first, "accounts"), Connection(second, "accounts")
        one.script("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
        limit = cache(first).limit
        assert limit <= 3 << 20
        insert = "INSERT INTO t(v) VALUES (zeroblob(3000))"
        for _ in range(8):
            one.sql("BEGIN")
            one.run(*[operation(EXECUTE, insert)] * 200, max_reply=1 << 20)
            one.sql("COMMIT")
        for db in (one, two, one):
            assert db.sql("SELECT count(*), sum(length(v)) FROM t") == [(1600, 4_800_000)]
            assert 0 < cache(first).size <= limit
        assert two.sql("PRAGMA integrity_check") == [("ok",)]


def test_it_is_said_when_the_heap_is_what_is_full(narrow: teemate.Enclave) -> None:
    sql = "SELECT length(zeroblob(9000000) || 'x')"
    with narrow.slot() as slot:
        small = Connection(slot, memory=2 << 20)
        with pytest.raises(SqlError, match="out of memory"):
            small.sql(sql)
        small.close()
        db = Connection(slot, memory=64 << 20)
        with pytest.raises(SqlError, match="the enclave's heap is full"):
            db.sql(sql)
        assert db.sql("SELECT 1") == [(1,)]
        db.close()
    with contextlib.closing(teemate.db.connect(narrow, memory=64 << 20)) as python:
        with pytest.raises(teemate.LimitReached) as reached:
            python.execute(sql)
        assert reached.value.detail["limit"] == "heap of the enclave"
