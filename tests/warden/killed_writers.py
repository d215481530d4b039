"""Writers to the vault that are made to be killed: forked from this process, one for each line of input.

Arguments: the broker's socket and a file of one RECORD for each place.  A line is a place: its writer
goes on from the record there, which is written before and after each change, so that whoever killed the
writer knows what it had begun and what it had ended.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
import traceback

import teemate
from teemate.vault import Changed, Vault

BEGUN, ENDED, COUNTED = 0, 8, 16
"""Numbers of puts that were begun and ended, and of additions to the counter that ended."""
RECORD = 64
COUNTER = b"counter"
REPEAT = 1024


def key(place: int) -> bytes:
    """Where a place's writers write."""
    return b"written at %d" % place


def value(place: int, number: int) -> bytes:
    """16 KiB that say of each part whose and which they are."""
    return struct.pack("<QQ", place, number) * REPEAT


class Record:
    """What one place's writers have done."""

    def __init__(self, table: mmap.mmap, place: int) -> None:
        self._table = table
        self._at = place * RECORD

    def __getitem__(self, field: int) -> int:
        """Read one of the numbers."""
        return int(struct.unpack_from("<Q", self._table, self._at + field)[0])

    def __setitem__(self, field: int, number: int) -> None:
        """Write one of them."""
        struct.pack_into("<Q", self._table, self._at + field, number)


def change(vault: Vault, record: Record, place: int) -> None:
    """One put, and one more in the counter that all share."""
    record[BEGUN] = record[ENDED] + 1
    vault.put(key(place), value(place, record[BEGUN]))
    record[ENDED] = record[BEGUN]
    entry = vault.get(COUNTER)
    count, version = (int.from_bytes(entry.value, "little"), entry.version) if entry else (0, 0)
    changed = vault.compare_and_swap(COUNTER, version, (count + 1).to_bytes(8, "little"))
    if not isinstance(changed, Changed):
        record[COUNTED] += 1


def write(socket: str, record: Record, place: int) -> None:
    """Write until killed."""
    with (
        teemate.connect(socket) as broker,
        broker.attach("vault", wait=60) as enclave,
        enclave.slot() as slot,
    ):
        vault = Vault(slot)
        while True:
            try:
                change(vault, record, place)
            except teemate.Busy:  # a dead writer's lock that is not repaired yet
                continue


def main() -> None:
    """Fork writers, and say their process numbers."""
    socket, path = sys.argv[1:]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with open(path, "r+b") as file:
        table = mmap.mmap(file.fileno(), 0)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                write(socket, Record(table, int(line)), int(line))
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
