"""A host in this program in which whoever is at a database dies in the middle of what it asks for.

The slot dies as a client does that is killed while the warden is at its request; what of that is in the
file is what the host has done before the warden was killed too.  Both are dead: nobody does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from connections import Caller
from test_tampering import Disk

import teemate
from teemate._native import ffi, lib

CLEAR, RESET, REWRITE = 3, 5, 7
"""enum tm_control_op."""
PAGE, RECORD = 4096, 4096 + 64
"""A write that is cut short ends between two pages of the file: the kernel looks for a signal there."""
_INDEX = (3007000).to_bytes(4, "little") + bytes(4)
_INDEX_HEADER = 48


@dataclass(frozen=True)
class Moment:
    """Which request is the last, and how much of it is done."""

    request: int
    """Of those that change something."""
    part: int
    """0: nothing; within the first record, the second, the last; 4: all."""
    reads: bool = False
    """Those that change nothing count too."""


PARTS = range(5)


class DyingDisk(Disk):
    """Files in memory, and the end of a slot."""

    def __init__(self, enclave: teemate.Enclave) -> None:
        super().__init__(enclave)
        self._native = enclave._native
        self._moment: Moment | None = None
        self._slot = 0
        self._seen = 0
        self.torn = 0
        """Writes that were done in part."""

    def control(self, op: int, slot: int) -> None:
        """Do for a slot of the first generation what the warden does."""
        control, result = ffi.new("uint64_t[]", 64), ffi.new("uint64_t[]", 64)
        control[0], control[1], control[2] = op, slot, 1
        status = ffi.new("int32_t *")
        assert lib.teemate_private_control(self._native, control, result, status) == 0
        assert status[0] == 0, (op, status[0])

    def die(self, enclave: teemate.Enclave, moment: Moment, work: Callable[[Caller], None]) -> bool:
        """Work in a slot until it dies there, and repair the slot: False when it has come to its end."""
        with enclave.slot() as slot:
            self._moment, self._slot, self._seen = moment, slot.index, 0
            try:
                work(slot)
            except teemate.Revoked:
                self.control(REWRITE, slot.index)
                self.control(RESET, slot.index)
                return True
            finally:
                self._moment = None
            slot.call("db_close")
            return False

    def _do(self, op: int, name: str, offset: int, data: Any) -> int:
        changes = op in (self.WRITE, self.SYNC, self.TRUNCATE)
        if self._moment is None or not (changes or self._moment.reads):
            return super()._do(op, name, offset, data)
        self._seen += 1
        if self._seen - 1 != self._moment.request:
            return super()._do(op, name, offset, data)
        part, self._moment = self._moment.part, None
        if op == self.WRITE:
            done = self._cut(offset, len(data), part)
            self.torn += 0 < done < len(data)
            if done:
                super()._do(op, name, offset, bytes(data[:done]))
        elif part == PARTS[-1]:
            super()._do(op, name, offset, data)
        self.control(CLEAR, self._slot)
        return 0  # nobody hears it

    @staticmethod
    def _cut(offset: int, length: int, part: int) -> int:
        ends = range(PAGE - offset % PAGE, length, PAGE) or (0,)
        return (0, ends[0], next((end for end in ends if end > RECORD), 0), ends[-1], length)[part]


class Index:
    """The wal-index of the one database of a sim's enclave, in its memory."""

    def __init__(self, enclave: teemate.Enclave) -> None:
        self._fd = lib.teemate_enclave_fd(enclave._native)
        memory = os.pread(self._fd, enclave.size, 0)
        places = []
        at = memory.find(_INDEX)
        while at >= 0:
            if memory[at : at + _INDEX_HEADER] == memory[at + _INDEX_HEADER : at + 2 * _INDEX_HEADER]:
                places.append(at)
            at = memory.find(_INDEX, at + 4)
        (self._place,) = places

    def tear(self) -> None:
        """Leave it as who dies between the two copies of its header does: the next one reads the log anew."""
        place = self._place + _INDEX_HEADER + 8
        (byte,) = os.pread(self._fd, 1, place)
        os.pwrite(self._fd, bytes([byte ^ 1]), place)
