"""What each program was about to do and what it knows is done, in memory that outlives it.

A program writes its *intent* before a call that changes something, and the outcome after it.  Killed in
between, nobody knows whether the enclave did it: then exactly two values are right, the one before and
the one after, and whoever looks next settles it.  Every field is eight bytes, aligned, and written by
one program at a time: SIGKILL leaves it old or new.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
from pathlib import Path
from typing import Self

__all__ = ["KEYS", "Field", "Journal", "Record", "key_name", "value_of"]

KEYS = 12
"""That each program owns."""
_RECORD_WORDS = 64
_HEADER = struct.Struct("<HHIQ")
_SIZES = (0, 40, 300, 2000, 9000, 30000)


class Field(enum.IntEnum):
    """Words of a record, before those of its keys."""

    PID = 0
    READY = 1
    """1 while the program works in the enclave."""
    BASE = 2
    SLOT = 3
    CALLS = 4
    WRONG = 5
    FAILED = 6
    REPEATED = 7
    LOST = 8
    RESUMES = 9
    """Restarts of the broker that this program came through."""
    SERIAL = 10
    """The last number that was given to a value."""
    COUNTED = 11
    """Increments of the shared counter that are done."""
    COUNTING = 12
    """1 when one more may be done."""
    INTENT = 13
    """1 while a change is under way: of INTENT_KEY, to INTENT_SERIAL (0: deleted)."""
    INTENT_KEY = 14
    INTENT_SERIAL = 15
    KEYS = 16
    """The serials of the values that the keys hold; 0: none."""


class Record:
    """One program's part of the journal."""

    def __init__(self, words: memoryview) -> None:
        self._words = words  # 8 bytes each: assigning to one is one store

    def read(self, field: int) -> int:
        """Read a word."""
        value: int = self._words[field]
        return value

    def write(self, field: int, value: int) -> None:
        """Write a word."""
        self._words[field] = value

    def add(self, field: int, amount: int = 1) -> None:
        """Count."""
        self.write(field, self.read(field) + amount)

    def serial(self, key: int) -> int:
        """The serial of what the key is known to hold; 0 for nothing."""
        return self.read(Field.KEYS + key)

    def intend(self, key: int, serial: int) -> None:
        """Before a change of a key."""
        self.write(Field.INTENT_KEY, key)
        self.write(Field.INTENT_SERIAL, serial)
        self.write(Field.INTENT, 1)

    def done(self, key: int, serial: int) -> None:
        """After it, or once somebody has looked."""
        self.write(Field.KEYS + key, serial)
        self.write(Field.INTENT, 0)

    def allowed(self, key: int) -> set[int]:
        """The serials that the key may hold now."""
        serials = {self.serial(key)}
        if self.read(Field.INTENT) and self.read(Field.INTENT_KEY) == key:
            serials.add(self.read(Field.INTENT_SERIAL))
        return serials


class Journal:
    """A file in memory: one word for all, then a record for each program."""

    def __init__(self, path: Path, records: int) -> None:
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        self._words = memoryview(memory).cast("Q")
        self.records = [
            Record(self._words[_RECORD_WORDS * (1 + index) : _RECORD_WORDS * (2 + index)])
            for index in range(records)
        ]

    @classmethod
    def create(cls, path: Path, records: int) -> Self:
        """Make the file, all zeros."""
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, 8 * _RECORD_WORDS * (1 + records))
        return cls(path, records)

    @property
    def stopping(self) -> bool:
        """Whether programs are to end, by themselves and well."""
        return bool(self._words[0])

    def stop(self) -> None:
        """Let programs end."""
        self._words[0] = 1


def key_name(program: int, key: int) -> bytes:
    """The vault's key of that name."""
    return b"storm %d %d" % (program, key)


def value_of(program: int, key: int, serial: int) -> bytes:
    """The value of that serial: a torn, misplaced or older one is another."""
    header = _HEADER.pack(program, key, 0, serial)
    size = _SIZES[serial % len(_SIZES)]
    return header + header * (size // len(header))


def serial_in(value: bytes) -> int:
    """The serial that a value claims to have, 0 when it is too short for one."""
    return int(_HEADER.unpack_from(value)[3]) if len(value) >= _HEADER.size else 0
