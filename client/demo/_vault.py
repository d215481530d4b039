"""What one program of the demonstration does inside the enclave, and how it checks it."""

from __future__ import annotations

from collections.abc import Iterator

from teemate._slot import Slot
from teemate.errors import Error
from teemate.vault import Changed, Vault

__all__ = ["Work"]

KEYS = 8
"""That each program owns."""
REPORTS = 20
COUNTER = b"demo counter"


class Work:
    """Puts its own keys, reads those of the others, increments one counter by compare-and-swap.

    A value tells who wrote it under which key, and a number that grows: so a reader sees a value
    that is torn, misplaced, or older than one that it has seen before.
    """

    def __init__(self, slot: Slot, *, index: int, clients: int, alone: bool) -> None:
        self.calls = 0
        self.increments = 0
        self.failures: list[str] = []
        self._vault = Vault(slot)
        self._index = index
        self._others = [] if alone else [other for other in range(clients) if other != index]
        self._written = 0
        self._seen: dict[tuple[int, int], int] = {}
        self._version = 0
        self._count = 0

    def first(self) -> None:
        """Make the first call: put the first key."""
        self._put(0)

    def prepare(self) -> None:
        """Put the other keys, so that every reader finds something."""
        for key in range(1, KEYS):
            self._put(key)

    def measurement(self) -> bytes:
        """Return MRENCLAVE from EREPORT."""
        return self._vault.mrenclave()

    def counter(self) -> int:
        """Return what the counter says now."""
        entry = self._vault.get(COUNTER)
        return 0 if entry is None else int.from_bytes(entry.value, "little")

    def run(self, calls: int) -> Iterator[int]:
        """Do `calls` calls and yield now and then how many are done.

        The steps are put, read, increment; alone there is nobody to read from, and those are left out.
        """
        step = max(1, calls // REPORTS)
        for number in range(calls):
            kind = number % 3
            try:
                if kind == 0:
                    self._put(number // 3 % KEYS)
                elif kind == 2:
                    self._increment()
                elif self._others:
                    self._read(self._others[number // 3 % len(self._others)], number // 3 % KEYS)
                else:
                    continue
                self.calls += 1
            except Error as error:
                self.failures.append(f"{error.code}: {error.message}")
            if (number + 1) % step == 0:
                yield number + 1

    def _put(self, key: int) -> None:
        self._written += 1
        value = b"%d %d %d " % (self._index, key, self._written)
        self._vault.put(_key(self._index, key), value * 4)

    def _read(self, other: int, key: int) -> None:
        entry = self._vault.get(_key(other, key))
        if entry is None:
            self.failures.append(f"program {other} has put key {key}, but it is not there")
            return
        words = entry.value.split()
        written = int(words[2])
        if words != [b"%d" % other, b"%d" % key, b"%d" % written] * 4:
            self.failures.append(f"key {key} of program {other} holds {entry.value[:64]!r}")
        if written < self._seen.get((other, key), 0):
            self.failures.append(f"key {key} of program {other} went back to value {written}")
        self._seen[other, key] = written

    def _increment(self) -> None:
        """One attempt; when somebody was faster, the next one starts from what is there."""
        value = (self._count + 1).to_bytes(8, "little")
        result = self._vault.compare_and_swap(COUNTER, self._version, value)
        if isinstance(result, Changed):
            if result.entry is not None:
                self._version = result.entry.version
                self._count = int.from_bytes(result.entry.value, "little")
            return
        self._version = result
        self._count += 1
        self.increments += 1


def _key(program: int, key: int) -> bytes:
    return b"program %d key %d" % (program, key)
