"""The snapshot: what a reader finds wherever the writer was killed, and what is refused."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from teemate.broker.restart.snapshot import (
    DamagedSnapshotError,
    ForeignSnapshotError,
    Name,
    Snapshot,
)

Contents = dict[Name, dict[str, Any]]


def file_of(data: bytes) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, data)
    return fd


def read_back(data: bytes) -> Contents:
    fd = file_of(data)
    try:
        snapshot = Snapshot.open(fd)
    except BaseException:
        os.close(fd)
        raise
    contents: Contents = dict(snapshot.contents)
    snapshot.close()
    return contents


def bytes_of(snapshot: Snapshot) -> bytes:
    return os.pread(snapshot.fd, os.fstat(snapshot.fd).st_size, 0)


@pytest.fixture
def snapshot() -> Iterator[Snapshot]:
    snapshot = Snapshot.create()
    yield snapshot
    snapshot.close()


def spoilt(snapshot: Snapshot, change: Callable[[bytearray], None]) -> bytes:
    data = bytearray(bytes_of(snapshot))
    change(data)
    return bytes(data)


def test_what_was_written_is_read_until_it_is_erased(snapshot: Snapshot) -> None:
    client, other = Name("client", 1), Name("client", 2)
    snapshot.write(client, {"a": 1})
    snapshot.write(other, {"key": b"\0" * 16})
    snapshot.write(client, {"a": 2})
    assert read_back(bytes_of(snapshot)) == {client: {"a": 2}, other: {"key": b"\0" * 16}}
    snapshot.erase(client)
    snapshot.erase(client)
    assert read_back(bytes_of(snapshot)) == {other: {"key": b"\0" * 16}}


def test_a_record_that_grows_and_a_snapshot_that_grows_keep_everything(snapshot: Snapshot) -> None:
    expected: Contents = {}
    for size in (10, 600, 5000, 100, 70_000):
        for number in range(20):
            expected[Name("client", number)] = content = {"data": bytes(size), "n": number}
            snapshot.write(Name("client", number), content)
    assert read_back(bytes_of(snapshot)) == expected


def test_records_are_used_again(snapshot: Snapshot) -> None:
    for number in range(10_000):
        snapshot.write(Name("client", number), {"data": bytes(100)})
        snapshot.erase(Name("client", number))
    assert snapshot.statistics().size == 65536
    assert snapshot.statistics().writes > 20_000


def test_a_later_writer_goes_on_where_the_first_one_stopped(snapshot: Snapshot) -> None:
    snapshot.write(Name("client", 1), {"a": 1})
    later = Snapshot.open(file_of(bytes_of(snapshot)))
    later.write(Name("client", 1), {"a": 2})
    later.write(Name("client", 2), {"a": 3})
    assert read_back(bytes_of(later)) == {Name("client", 1): {"a": 2}, Name("client", 2): {"a": 3}}
    later.close()


class Stores:
    """Every change that a writer makes, and what the file holds when it is killed in the middle of one."""

    def __init__(self) -> None:
        self.snapshot = Snapshot.create()
        self.image = bytearray(bytes_of(self.snapshot))
        self.pending: list[tuple[int, bytes]] = []
        original = self.snapshot._store

        def store(offset: int, data: bytes) -> None:
            self.pending.append((offset, data))
            original(offset, data)

        self.snapshot._store = store  # type: ignore[method-assign]

    def images(self, rng: random.Random) -> Iterator[bytes]:
        """The file at moments during what has just been done; afterwards it is the file as it is now."""
        self.image.extend(bytes(os.fstat(self.snapshot.fd).st_size - len(self.image)))
        for offset, data in self.pending:
            before = bytes(self.image[offset : offset + len(data)])
            cuts = {0, 1, 8, 12, 16, 17, len(data) - 1, *(rng.randrange(len(data) + 1) for _ in range(6))}
            for cut in sorted(cut for cut in cuts if 0 <= cut <= len(data)):
                halves = [data[:cut] + before[cut:], before[:cut] + data[cut:]]  # also from its end
                # In words of 8 bytes, any of which are there and others not.
                halves.append(
                    b"".join(
                        (data if rng.random() < 0.5 else before)[at : at + 8] for at in range(0, len(data), 8)
                    )
                )
                for half in halves:
                    yield bytes(self.image[:offset]) + half + bytes(self.image[offset + len(data) :])
            self.image[offset : offset + len(data)] = data
        self.pending.clear()


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_store_in_any_order_a_reader_finds_the_state_before_or_after(seed: int) -> None:
    rng = random.Random(seed)
    stores = Stores()
    before: Contents = {}
    images = 0
    for _ in range(50):
        name = Name("client", rng.randrange(4))
        after = dict(before)
        if rng.random() < 0.3:
            stores.snapshot.erase(name)
            after.pop(name, None)
        else:
            content = {
                "data": rng.randbytes(rng.choice([0, 40, 300, 700, 3000])),
                "keys": [rng.randbytes(16)],
            }
            stores.snapshot.write(name, content)
            after[name] = content
        for image in stores.images(rng):
            assert read_back(image) in (before, after)
            images += 1
        assert bytes(stores.image) == bytes_of(stores.snapshot)
        assert read_back(bytes(stores.image)) == after
        before = after
    assert images > 1000
    stores.snapshot.close()


def test_without_the_older_half_the_same_kills_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The negative control: a writer that always uses the same half loses records."""
    from teemate.broker.restart import snapshot as module

    real = module.Snapshot._write_half

    def same_half(self: Snapshot, record: Any, payload: bytes) -> None:
        if record.name is not None:
            record.newer = 1 - record.newer
        real(self, record, payload)

    rng = random.Random(1)
    stores = Stores()
    name = Name("client", 1)
    stores.snapshot.write(name, {"a": 1})
    list(stores.images(rng))
    monkeypatch.setattr(module.Snapshot, "_write_half", same_half)
    stores.snapshot.write(name, {"a": 2})
    found = [read_back(image) for image in stores.images(rng)]
    assert any(contents not in ({name: {"a": 1}}, {name: {"a": 2}}) for contents in found)
    stores.snapshot.close()


def test_another_version_is_refused_and_named(snapshot: Snapshot) -> None:
    def change(data: bytearray) -> None:
        data[8:12] = (7).to_bytes(4, "little")
        data[12:16] = zlib.crc32(data[:12]).to_bytes(4, "little")

    with pytest.raises(ForeignSnapshotError, match="format 7, this broker reads format 1"):
        read_back(spoilt(snapshot, change))


def test_a_damaged_header_is_refused(snapshot: Snapshot) -> None:
    def change(data: bytearray) -> None:
        data[9] ^= 1

    with pytest.raises(DamagedSnapshotError, match="header"):
        read_back(spoilt(snapshot, change))
    with pytest.raises(DamagedSnapshotError, match="16 bytes"):
        read_back(bytes_of(snapshot)[:16])


def test_damage_of_one_half_costs_the_newer_state_of_both_everything(snapshot: Snapshot) -> None:
    name = Name("client", 1)
    for value in (1, 2, 3):
        snapshot.write(name, {"a": value})
    first, second = 4096 + 16, 4096 + 16 + 16 + 512

    def newer(data: bytearray) -> None:
        data[second + 20] ^= 1

    def both(data: bytearray) -> None:
        newer(data)
        data[first + 20] ^= 1

    assert read_back(bytes_of(snapshot)) == {name: {"a": 3}}
    assert read_back(spoilt(snapshot, newer)) == {name: {"a": 2}}
    with pytest.raises(DamagedSnapshotError, match="both halves of the record at byte 4096"):
        read_back(spoilt(snapshot, both))


def test_a_record_s_head_that_makes_no_sense_is_damage_unless_it_was_being_made(snapshot: Snapshot) -> None:
    snapshot.write(Name("client", 1), {"a": 1})

    def change(data: bytearray) -> None:
        data[4096] ^= 1

    with pytest.raises(DamagedSnapshotError, match="byte 4096"):
        read_back(spoilt(snapshot, change))
    end = 4096 + 16 + 2 * (16 + 512)

    def begun(data: bytearray) -> None:
        data[end : end + 3] = b"\0\x02\0"

    assert read_back(spoilt(snapshot, begun)) == {Name("client", 1): {"a": 1}}
