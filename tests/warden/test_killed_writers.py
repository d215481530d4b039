"""Writers to one vault that are killed at random moments leave old values or new ones, and nothing else."""

from __future__ import annotations

import mmap
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killed_writers
import pytest
from crash_operations import FULL
from crash_world import STATS
from killed_writers import BEGUN, COUNTED, COUNTER, ENDED, RECORD, Record
from running_broker import RunningBroker

import teemate
from teemate.vault import Entry, Vault

PLACES = 3
KILLS = 2000 if FULL else 60
SLOTS = PLACES + 1


@pytest.fixture
def running(
    broker: Callable[..., RunningBroker], make_vault: Callable[..., tuple[Path, Path]]
) -> RunningBroker:
    sgxs, sigstruct = make_vault(slots=SLOTS, heap="1M", stack="64K")
    return broker(f"""
[[enclave]]
name = "vault"
image = "{sgxs}"
sigstruct = "{sigstruct}"
slots_per_client = {SLOTS}
[[enclave.attach]]
uid = {os.geteuid()}
""")


class Writers:
    """One writer at each place, and what they have written down."""

    def __init__(self, socket: str, table: mmap.mmap, path: Path) -> None:
        self.records = [Record(table, place) for place in range(PLACES)]
        self._process = subprocess.Popen(
            [sys.executable, killed_writers.__file__, socket, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._pidfds = [self._start(place) for place in range(PLACES)]

    def _start(self, place: int) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{place}\n")
        self._process.stdin.flush()
        return os.pidfd_open(int(self._process.stdout.readline()))

    def kill(self, place: int) -> None:
        """Kill the place's writer, and return when it is gone."""
        signal.pidfd_send_signal(self._pidfds[place], signal.SIGKILL)
        gone = select.poll()
        gone.register(self._pidfds[place], select.POLLIN)
        assert gone.poll(60_000)
        os.close(self._pidfds[place])

    def replace(self, place: int) -> None:
        """Let the next one go on."""
        self._pidfds[place] = self._start(place)

    def close(self) -> None:
        """End all."""
        for place in range(PLACES):
            self.kill(place)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


class Observer:
    """Another client of the vault, who knows what it has seen."""

    def __init__(self, slot: teemate.Slot) -> None:
        self.slot = slot
        self._vault = Vault(slot)
        self._versions: dict[bytes, int] = {}

    def patiently(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call again while a dead writer has a lock: its slot is being repaired."""
        for _ in range(20):
            try:
                return call(*arguments)
            except teemate.Busy:
                continue
        return call(*arguments)

    def get(self, key: bytes) -> bytes | None:
        """Read a value, whose version must not be older than one that was seen before."""
        entry: Entry | None = self.patiently(self._vault.get, key)
        if entry is None:
            assert key not in self._versions
            return None
        assert entry.version >= self._versions.get(key, 0)
        self._versions[key] = entry.version
        return bytes(entry.value)

    def delete_all(self) -> None:
        """Leave the vault empty."""
        for key in self._versions:
            assert self.patiently(self._vault.delete, key)

    def stats(self) -> dict[str, int]:
        """Check the whole heap, and tell what is in it."""
        reply = self.patiently(self.slot.call, "heap_check")
        return dict(zip(STATS, memoryview(reply).cast("Q"), strict=True))


@pytest.fixture
def observed(running: RunningBroker) -> Iterator[tuple[teemate.GrantedEnclave, Observer]]:
    with (
        teemate.connect(running.socket) as connection,
        connection.attach("vault") as enclave,
        enclave.slot() as slot,
    ):
        yield enclave, Observer(slot)


def left_inside(running: RunningBroker) -> list[str]:
    """What the dead had left in their slots."""
    return [str(record["left"]) for record in running.log() if record["event"] == "slot repaired"]


def test_killed_writers_leave_old_values_or_new_ones(
    running: RunningBroker, observed: tuple[teemate.GrantedEnclave, Observer], tmp_path: Path
) -> None:
    enclave, observer = observed
    empty = observer.stats()
    path = tmp_path / "records"
    path.write_bytes(bytes(PLACES * RECORD))
    with path.open("r+b") as file:
        table = mmap.mmap(file.fileno(), 0)
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    kills = 0
    writers = Writers(running.socket, table, path)
    try:
        while kills < KILLS or not left_inside(running):
            assert kills < 50 * KILLS, "nobody is killed inside"
            kills += 1
            place = chance.randrange(PLACES)
            time.sleep(chance.uniform(0, 0.05))  # the random moment
            writers.kill(place)
            record = writers.records[place]
            found = observer.get(killed_writers.key(place))
            states = [killed_writers.value(place, record[field]) for field in (ENDED, BEGUN)]
            assert found in states or (found is None and not record[ENDED])
            # What the dead one had begun and what repair has completed is now done.
            if found == states[1]:
                record[ENDED] = record[BEGUN]
            writers.replace(place)
    finally:
        writers.close()
    enclave.acquire(PLACES, wait=30)  # all slots are there, repaired
    counted = sum(record[COUNTED] for record in writers.records)
    counter = int.from_bytes(observer.get(COUNTER) or b"", "little")
    assert counted <= counter <= counted + kills + PLACES
    for place in range(PLACES):
        observer.get(killed_writers.key(place))
    assert observer.stats()["owned"] == 0
    observer.delete_all()
    left = observer.stats()
    assert (left["used"], left["blocks"], left["owned"]) == (empty["used"], empty["blocks"], 0)
    print(f"{kills} kills, {len(left_inside(running))} of them in the enclave, {counter} counted")
    assert not [record for record in running.log() if record["event"] == "slot quarantined"]
