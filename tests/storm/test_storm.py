"""`teemate bench storm`: a short one passes, and what it is there to find it finds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from backends import BACKEND, PATIENCE

from teemate.bench._journal import Field, Journal, Record
from teemate.bench._storm import Plan, _Silence, _Storm, run_storm
from teemate.bench._where import MET
from teemate.bench.worker import COUNTER, Counter, Work
from teemate.vault import Changed, Entry, Vault

FIELDS = [
    "seed",
    "seconds",
    "client_kills",
    "client_kills_inside",
    "kills_by_state",
    "slots_repaired",
    "slots_lost",
    "slots_quarantined",
    "quarantined_with_reason",
    "wrong_values",
    "counter_expected",
    "counter",
    "broker_kills",
    "failed_calls",
    "repeated_calls",
    "lost_grants",
    "resume_ms_p50",
]
STATES = {"outside", "gate", "exit", "heap", "lock held", "ocall", "interrupted", "inside"}
KEEPER_KILLS = 1
EACH_STATE = 3
LIMIT = 60.0 * PATIENCE


def storm(*options: str) -> dict[str, Any]:
    done = subprocess.run(
        [
            sys.executable, "-c", "from teemate.cli.main import main; main()", "bench", "storm", "--json",
            "--backend", BACKEND, *options,
        ],
        capture_output=True,
        timeout=280 * PATIENCE,
    )  # fmt: skip
    print(done.stdout.decode(), done.stderr.decode())  # shown when the test fails
    assert done.returncode == 0
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def test_nothing_is_lost_in_a_storm_over_programs_broker_warden_and_keeper() -> None:
    figures = storm(
        "--seed", "11", "--clients", "3", "--seconds", str(240 * PATIENCE), "--client-kills", "40",
        "--each-state", str(EACH_STATE), "--broker-kills", "2", "--warden-kills", "2",
        "--keeper-kills", str(KEEPER_KILLS),
    )  # fmt: skip
    assert [*figures] == [*FIELDS, "warden_kills", "keeper_kills"]
    assert figures["client_kills"] >= 40
    assert figures["broker_kills"] == 2
    assert figures["warden_kills"] >= 2
    assert figures["keeper_kills"] == KEEPER_KILLS
    assert set(figures["kills_by_state"]) == STATES
    assert sum(figures["kills_by_state"].values()) == figures["client_kills"]
    for state in MET[BACKEND]:
        assert figures["kills_by_state"][state] >= EACH_STATE, state
    assert figures["slots_repaired"]
    assert figures["counter"] == figures["counter_expected"] > 0
    for nothing in ("slots_lost", "slots_quarantined", "wrong_values", "failed_calls", "lost_grants"):
        assert figures[nothing] == 0, json.dumps(figures)
    assert figures["resume_ms_p50"] > 0


@pytest.mark.skipif(BACKEND != "sim", reason="what it shows is the storm's own reckoning")
def test_a_broker_that_forgets_slots_of_the_dead_does_not_pass() -> None:
    broker = (sys.executable, str(Path(__file__).parent / "careless_broker.py"))
    figures = run_storm(
        Plan(seed=3, clients=3, seconds=60, client_kills=3, backend="sim", command=broker, patience=1.0)
    )
    # The first to be killed had attached; whoever is killed as soon as it starts may hold nothing yet.
    assert figures.slots_lost >= 1
    assert not figures.good


class _Unfailing(random.Random):
    """Says that what may be done is done."""

    def random(self) -> float:
        return 0.0


def test_who_was_still_connecting_when_the_broker_died_has_lost_no_grant(tmp_path: Path) -> None:
    """It has nothing to resume, though who was killed before it under its number was at work."""
    with ExitStack() as stack:
        storm = _Storm(Plan(clients=1, client_kills=0, backend=BACKEND), _Silence(), tmp_path)
        storm._chance = _Unfailing()
        storm._start(stack)
        programs, [record] = storm._programs, storm._programs.journal.records
        first = programs.running[0]
        for worker in storm._broker.workers():
            os.kill(worker, signal.SIGSTOP)  # nobody is accepted from here on
        programs.killed.add(first)
        os.kill(first, signal.SIGKILL)
        assert programs.wait_for(
            lambda: record.read(Field.PID) == programs.running.get(0, first) != first, LIMIT
        )
        storm._kill_broker()
        assert (storm._lost, storm._errors) == (0, [])
        assert programs.wait_for(lambda: programs.ready() == [0], LIMIT)
        # Why it must not be waited for: its connection waited in the socket's queue and is the next broker's.
        assert (record.read(Field.RESUMES), programs.statuses) == (0, [])


# ---- the programs' reckoning, against a vault that does what it should not -----------------------


class Books:
    """What is in a vault, as the ECALLs of :class:`teemate.vault.Vault` change it."""

    def __init__(self) -> None:
        self.values: dict[bytes, Entry] = {}
        self._version = 0

    def put(self, key: bytes, value: bytes) -> int:
        self._version += 1
        self.values[key] = Entry(value, self._version, 0)
        return self._version

    def get(self, key: bytes) -> Entry | None:
        return self.values.get(key)

    def delete(self, key: bytes) -> bool:
        return self.values.pop(key, None) is not None

    def compare_and_swap(self, key: bytes, expected: int, value: bytes) -> int | Changed:
        entry = self.values.get(key)
        if (entry.version if entry else 0) != expected:
            return Changed(entry)
        return self.put(key, value)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Journal.create(tmp_path / "journal", 2).records[0]


def program(books: Books, record: Record) -> Work:
    vault: Vault = books  # type: ignore[assignment]
    return Work(vault, record, 0, 2)


def wrongs(record: Record) -> tuple[int, int]:
    return record.read(Field.WRONG), record.read(Field.REPEATED)


def test_a_change_that_was_under_way_at_the_kill_may_be_done_or_not(record: Record) -> None:
    for done in (False, True):
        books = Books()
        todo = program(books, record)
        todo.settle()
        todo._put(1)
        before = books.get(b"storm 0 1")
        serial = record.read(Field.SERIAL) + 1
        todo._put(1)
        record.done(1, serial - 1)
        record.intend(1, serial)  # as if killed before the answer was there
        if not done:
            assert before is not None
            books.values[b"storm 0 1"] = before
        program(books, record).settle()
        assert wrongs(record) == (0, 0)
        assert record.serial(1) == (serial if done else serial - 1)
        record.done(1, 0)


def test_a_change_that_was_acknowledged_and_is_not_there_is_wrong(record: Record) -> None:
    books = Books()
    todo = program(books, record)
    todo._put(1)
    before = books.values[b"storm 0 1"]
    todo._put(1)
    books.values[b"storm 0 1"] = before
    todo.settle()
    assert wrongs(record) == (1, 0)


def test_a_torn_value_is_wrong_also_to_others(record: Record) -> None:
    books = Books()
    todo = program(books, record)
    while True:
        todo._put(1)
        entry = books.values[b"storm 0 1"]
        if len(entry.value) > 100:
            break
    books.put(b"storm 0 1", entry.value[:50] + bytes(50) + entry.value[100:])
    todo._read_other(0, 1)
    assert wrongs(record) == (1, 0)


def test_an_increment_that_is_done_twice_is_noticed(record: Record) -> None:
    books = Books()
    todo = program(books, record)
    todo.increment()
    todo.increment()
    assert wrongs(record) == (0, 0)
    counter = Counter(books.get(COUNTER), 2)
    books.put(COUNTER, counter.plus(0))
    todo.increment()
    assert wrongs(record) == (0, 1)


def test_an_increment_under_way_at_the_kill_counts_when_it_was_done(record: Record) -> None:
    books = Books()
    todo = program(books, record)
    todo.increment()
    record.write(Field.COUNTED, 0)
    record.write(Field.COUNTING, 1)
    program(books, record).settle()
    assert wrongs(record) == (0, 0)
    assert record.read(Field.COUNTED) == 1
