"""What the next broker has to know, in a memfd that outlives this one.

The memfd is put into the descriptor store once and written in place.  Whoever reads it finds of every
record the state before or after a write, at whatever instruction the writer was killed:

    header    magic, version of the format, checksum; written before the memfd is stored, never changed
    record    capacity with its checksum, then two halves; again and again up to the end
    half      sequence number, length, checksum of both and of the payload, payload

A write goes into the older half of its record, with the next number of one sequence for the whole
snapshot.  The half with the higher number counts; a half whose checksum is wrong was being written
when the writer died, and the other one counts.  A payload that has outgrown its record is written into
a larger one, and the small one is emptied afterwards: of two records with the same name the higher
number counts.  Records are reused and never given back.

A file that nobody could have left like that (both halves wrong, no sense in between) is damaged, and
refused as a whole, like a version that is not ours: to govern enclaves by half of what
is known of them would give slots away that somebody holds.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple, final

import cbor2

__all__ = [
    "VERSION",
    "DamagedSnapshotError",
    "ForeignSnapshotError",
    "Name",
    "Snapshot",
    "SnapshotError",
    "SnapshotStatistics",
]

VERSION = 1
_MAGIC = b"TMSTATE\0"
_HEADER = struct.Struct("<8sII")  # magic, version, checksum of both
_HEADER_SIZE = 4096
_RECORD = struct.Struct("<QII")  # capacity of a half, checksum of it, 0
_HALF = struct.Struct("<QII")  # sequence, length, checksum
_SEQUENCE = struct.Struct("<QI")
_SMALLEST = 512
_GROWTH = 64 * 1024


class SnapshotError(Exception):
    """What was kept cannot be used, so nothing is governed by it."""


class ForeignSnapshotError(SnapshotError):
    """Another version of the broker wrote it: that one can go on with it."""


class DamagedSnapshotError(SnapshotError):
    """No broker leaves it so, wherever it is killed."""


class Name(NamedTuple):
    """Of a record: what kind of thing it describes, and which one."""

    kind: str
    number: int


@final
class _Record:
    __slots__ = ("capacity", "name", "newer", "offset", "sequence")

    def __init__(self, offset: int, capacity: int) -> None:
        self.offset = offset
        self.capacity = capacity
        self.newer = 0
        self.sequence = 0
        self.name: Name | None = None

    def half(self, which: int) -> int:
        return self.offset + _RECORD.size + which * (_HALF.size + self.capacity)

    @property
    def end(self) -> int:
        return self.half(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotStatistics:
    """How often something was written, and the size of it all."""

    writes: int
    records: int
    size: int


def _checksum(sequence: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_SEQUENCE.pack(sequence, len(payload))))


@final
class Snapshot:
    """The records by name; `contents` is what was there when it was opened.

    `fd` stays open until :meth:`close`.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.contents: dict[Name, dict[str, object]] = {}
        self._map = mmap.mmap(fd, 0)
        self._used: dict[Name, _Record] = {}
        self._unused: defaultdict[int, list[_Record]] = defaultdict(list)
        self._end = _HEADER_SIZE
        self._sequence = 0
        self._writes = 0

    @classmethod
    def create(cls) -> Snapshot:
        """Make an empty one."""
        fd = os.memfd_create("teemate-state", os.MFD_CLOEXEC)
        os.ftruncate(fd, _GROWTH)
        snapshot = cls(fd)
        head = _HEADER.pack(_MAGIC, VERSION, 0)[:-4]
        snapshot._store(0, head + zlib.crc32(head).to_bytes(4, "little"))
        return snapshot

    @classmethod
    def open(cls, fd: int) -> Snapshot:
        """Read what an earlier broker wrote; takes `fd` over, unless it raises.

        Raises
        ------
        ForeignSnapshotError, DamagedSnapshotError
            It is of no use to this broker.

        """
        size = os.fstat(fd).st_size
        if size < _HEADER_SIZE:
            raise DamagedSnapshotError(f"the state that was kept has {size} bytes, fewer than its header")
        snapshot = cls(fd)
        try:
            snapshot._read()
        except SnapshotError:
            snapshot._map.close()
            raise
        return snapshot

    def write(self, name: Name, content: dict[str, object]) -> None:
        """Write a record, new or known; done when this returns, whatever happens to us then."""
        payload: bytes = cbor2.dumps([name.kind, name.number, content])
        record = self._used.get(name)
        if record is not None and len(payload) <= record.capacity:
            self._write_half(record, payload)
            return
        larger = self._unused_record(len(payload))
        self._write_half(larger, payload)
        larger.name = name
        self._used[name] = larger
        if record is not None:
            self._empty(record)

    def erase(self, name: Name) -> None:
        """Forget a record; one that is not there is forgotten already."""
        record = self._used.pop(name, None)
        if record is not None:
            self._empty(record)

    def close(self) -> None:
        """Close the memfd; the store keeps it."""
        self._map.close()
        os.close(self.fd)

    def statistics(self) -> SnapshotStatistics:
        """The snapshot at this moment."""
        return SnapshotStatistics(writes=self._writes, records=len(self._used), size=len(self._map))

    # -- writing -------------------------------------------------------------------

    def _store(self, offset: int, data: bytes) -> None:
        """Every change of the file goes through here."""
        self._map[offset : offset + len(data)] = data

    def _write_half(self, record: _Record, payload: bytes) -> None:
        self._sequence += 1
        self._writes += 1
        older = 1 - record.newer
        head = _HALF.pack(self._sequence, len(payload), _checksum(self._sequence, payload))
        self._store(record.half(older), head + payload)
        record.newer = older
        record.sequence = self._sequence

    def _empty(self, record: _Record) -> None:
        self._write_half(record, b"")
        record.name = None
        self._unused[record.capacity].append(record)

    def _unused_record(self, length: int) -> _Record:
        capacity = max(_SMALLEST, 1 << (length - 1).bit_length())
        if self._unused[capacity]:
            return self._unused[capacity].pop()
        record = _Record(self._end, capacity)
        if record.end + _RECORD.size > len(self._map):
            self._map.resize(max(2 * len(self._map), -(-record.end // _GROWTH) * _GROWTH + _GROWTH))
        size = capacity.to_bytes(8, "little")
        self._store(record.offset, size + zlib.crc32(size).to_bytes(4, "little"))
        record.newer = 1
        self._write_half(record, b"")  # so that the first content finds one half that is right
        self._end = record.end
        return record

    # -- reading -------------------------------------------------------------------

    def _read(self) -> None:
        magic, version, checksum = _HEADER.unpack_from(self._map)
        if magic != _MAGIC or checksum != zlib.crc32(self._map[: _HEADER.size - 4]):
            raise DamagedSnapshotError("the state that was kept has a damaged header")
        if version != VERSION:
            raise ForeignSnapshotError(
                f"the state that was kept has format {version}, this broker reads format {VERSION}:"
                " the broker that wrote it can go on with it"
            )
        while (record := self._next()) is not None:
            self._end = record.end
            self._take(record, self._payload(record))

    def _next(self) -> _Record | None:
        """Return the record at the end of those that were read, None when there are no more."""
        start = self._end
        if start + _RECORD.size > len(self._map):
            return None
        capacity, checksum, zero = _RECORD.unpack_from(self._map, start)
        if checksum == zlib.crc32(self._map[start : start + 8]) and not zero:
            record = _Record(start, capacity)
            if capacity >= _SMALLEST and not capacity & (capacity - 1) and record.end <= len(self._map):
                return record
        elif not self._map[start + _RECORD.size :].strip(b"\0"):  # at most begun
            return None
        raise DamagedSnapshotError(f"the state that was kept is damaged at byte {start}")

    def _payload(self, record: _Record) -> bytes:
        """Return what the newer of the two halves holds, or the one that is whole."""
        halves: list[tuple[int, int, bytes]] = []
        blank = []
        for which in (0, 1):
            start = record.half(which)
            sequence, length, checksum = _HALF.unpack_from(self._map, start)
            payload = self._map[start + _HALF.size : start + _HALF.size + min(length, record.capacity)]
            if sequence and length <= record.capacity and checksum == _checksum(sequence, payload):
                halves.append((sequence, which, payload))
            elif not self._map[start : start + _HALF.size + record.capacity].strip(b"\0"):
                blank.append(which)
        if halves:
            record.sequence, record.newer, payload = max(halves)
            return payload
        if 1 not in blank:  # the first half is written before the record is used
            raise DamagedSnapshotError(f"both halves of the record at byte {record.offset} are damaged")
        record.newer = 1
        return b""

    def _take(self, record: _Record, payload: bytes) -> None:
        self._sequence = max(self._sequence, record.sequence)
        if not record.sequence:  # made, and not written yet
            self._empty(record)
            return
        if not payload:
            self._unused[record.capacity].append(record)
            return
        try:
            kind, number, content = cbor2.loads(payload)
        except (cbor2.CBORDecodeError, ValueError, TypeError) as error:
            raise DamagedSnapshotError(f"the record at byte {record.offset} makes no sense") from error
        if type(kind) is not str or type(number) is not int or type(content) is not dict:
            raise DamagedSnapshotError(f"the record at byte {record.offset} makes no sense")
        name = Name(kind, number)
        record.name = name
        other = self._used.get(name)
        if other is not None and other.sequence > record.sequence:
            self._empty(record)
            return
        self._used[name] = record
        self.contents[name] = content
        if other is not None:
            self._empty(other)
