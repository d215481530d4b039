"""What is in a database is nowhere but in the enclave and in the memory of who was given it.

Looked for are rows, names of columns and texts of statements: in the enclave's files, with a log and without,
in the arena, in every message, in all memory of the processes on the broker's side, in their log, and in
the memory of a client that reads other rows of the same pages.  Left out are the enclave's own pages, and
nothing else: those of the sim can be read by whoever maps them, as it says; Linux's driver lets nobody.
"""

from __future__ import annotations

import os
import random
import signal
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from altered import altered_database
from backends import BACKEND
from connections import EXECUTE, Connection, database_image, operation
from images import BuiltImage, Images
from plaintext import build_listener, memory
from policies import enclave_policy
from processes import wait_for_cpu, wait_for_stop
from running_broker import RunningBroker

import teemate
from teemate.demo._memory import children

StartBroker = Callable[..., RunningBroker]
NAME = "ledger-4f1c"
"""The database's: the host sees it."""
VISITOR = "visitor-of-the-ledger"
"""The reader's name, which it tells the broker."""
PART = 24
"""Bytes in a row that are enough: more than a register has, which on the sim the kernel saves at a tick."""
READER = """
import sys, teemate
from teemate import db
socket, visitor, name = sys.argv[1:]
with teemate.connect(socket, client=visitor) as broker, broker.attach("db") as enclave:
    ledger = db.connect(enclave, name)
    rows = ledger.execute("SELECT v FROM t WHERE open").fetchall()
    # They have to do with all rows, and tell nothing of the others.
    ledger.execute("SELECT count(*), sum(length(v)) FROM t WHERE v > ? ORDER BY v", ("A",)).fetchall()
    ledger.execute("SELECT id FROM t ORDER BY v DESC").fetchall()
    with __import__("contextlib").suppress(db.IntegrityError):
        ledger.execute("INSERT INTO t(id, v) SELECT id + 1000, v FROM t WHERE NOT open")
    ledger.rollback()
    print(enclave.base, enclave.size, len(rows), flush=True)
    sys.stdin.readline()
    print("works", flush=True)
    while True:
        ledger.execute("SELECT count(*) FROM t WHERE v LIKE '%z%z%' OR v > 'Z'").fetchall()
"""


class Secrets(NamedTuple):
    """Texts of which no part may be seen, and those that the reader is given."""

    hidden: list[str]
    given: list[str]

    @classmethod
    def draw(cls, seed: int) -> Secrets:
        """Draw texts that are nowhere else."""
        dice = random.Random(seed)
        texts = ["".join(dice.choices(string.ascii_letters, k=3 * PART)) for _ in range(24)]
        return cls(texts[0::2], texts[1::2])


def finds(data: bytes, texts: list[str]) -> bool:
    """Whether a part of one of the texts is there."""
    return any(text[at : at + PART].encode() in data for text in texts for at in (0, PART, 2 * PART))


class Place(NamedTuple):
    """Where is looked."""

    data: bytes
    known: str
    """What has to be found there, so that looking is worth something; "" for what holds no text at all."""


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What hears the broker's messages."""
    return build_listener(tmp_path_factory.mktemp("listener"))


@pytest.fixture
def ledger(broker: StartBroker, listener: Path, tmp_path: Path) -> Callable[[Path], RunningBroker]:
    """Start a broker that is listened to, with a database enclave of that image."""

    def start(sgxs: Path) -> RunningBroker:
        built = BuiltImage(
            name="db",
            sgxs=sgxs,
            sigstruct=sgxs.with_suffix(".sig"),
            elf=sgxs.with_suffix(".elf"),
            mrenclave=b"",
            slots=3,
        )
        policy = f'[broker]\nstate_directory = "{tmp_path / "state"}"\nwarden_deadline = 30.0\n'
        environment = {"LD_PRELOAD": str(listener), "HEARD": str(tmp_path / "heard")}
        return broker(policy + enclave_policy("db", built, "storage = true"), environment=environment)

    return start


def write(db: Connection, secrets: Secrets) -> None:
    """Rows that are hidden and rows that are given, in the same pages; hidden names and statements."""
    column, literal, deleted, *_ = secrets.hidden
    db.script(f"CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT UNIQUE, open INTEGER, {column} TEXT)")
    rows: list[tuple[int | str, ...]] = [
        (2 * number + kind, text, kind)
        for kind, texts in enumerate(secrets)
        for number, text in enumerate(texts)
    ]
    db.run(operation(EXECUTE, "INSERT INTO t(id, v, open) VALUES (?, ?, ?)", sorted(rows)))
    db.sql(f"UPDATE t SET {column} = '{literal}' WHERE NOT open")
    db.sql("INSERT INTO t(id, v, open) VALUES (1000, ?, 0)", deleted + "z")
    db.sql("DELETE FROM t WHERE id = 1000")


def files(state: Path) -> bytes:
    """All of the broker's files, and their names."""
    paths = [path for path in state.rglob("*") if path.is_file()]
    assert paths
    return b"".join(path.name.encode() + path.read_bytes() for path in paths)


def places(bank: RunningBroker, folder: Path, secrets: Secrets) -> Iterator[tuple[str, Place]]:
    """Everything that is outside of the enclave while the database is written and read."""
    with (
        teemate.connect(bank.socket) as connection,
        connection.attach("db") as enclave,
        enclave.slot() as slot,
    ):
        elrange = range(enclave.base, enclave.base + enclave.size)
        db = Connection(slot, NAME)
        write(db, secrets)
        yield "files", Place(files(folder / "state"), NAME)
        db.sql("PRAGMA wal_checkpoint(TRUNCATE)")
        yield "files after a checkpoint", Place(files(folder / "state"), NAME)
        arguments = [sys.executable, "-c", READER, bank.socket, VISITOR, NAME]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            try:
                assert reader.stdout is not None
                assert reader.stdin is not None
                told = reader.stdout.readline().split()
                assert told == [str(enclave.base), str(enclave.size), str(len(secrets.given))]
                yield "client", Place(memory(reader.pid, elrange), secrets.given[0])
                reader.stdin.write("\n")
                reader.stdin.flush()
                assert reader.stdout.readline() == "works\n"
                wait_for_cpu(reader.pid)
                os.kill(reader.pid, signal.SIGSTOP)
                wait_for_stop(reader.pid)
                yield "client at work", Place(memory(reader.pid, elrange), VISITOR)
                arena = range(elrange.stop + 4096, elrange.stop + 8192)
                with open(f"/proc/{reader.pid}/mem", "rb", buffering=0) as file:
                    file.seek(arena.start)
                    yield "arena", Place(file.read(4096), "")
            finally:
                reader.kill()
        db.sql("UPDATE t SET open = 2 WHERE id = 4")  # is the last that goes through the warden
        for pid in [bank.pid, *children(bank.pid)]:
            program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].rpartition(b"/")[2].decode()
            known = {"teemate-warden": NAME}.get(program, "" if program.startswith("teemate") else VISITOR)
            yield program if known != VISITOR else "broker", Place(memory(pid, elrange), known)
    yield "messages", Place((folder / "heard").read_bytes(), VISITOR)
    yield "log", Place(bank.log_file.read_bytes(), "grant ended")


def leaking(bank: RunningBroker, folder: Path, secrets: Secrets) -> set[str]:
    """Where something hidden was found; what has to be there was found everywhere."""
    seen, found = set(), set()
    for name, place in places(bank, folder, secrets):
        assert place.data, name
        assert place.known.encode() in place.data, f"{name}: not even {place.known!r} is found"
        seen.add(name)
        if finds(place.data, secrets.hidden):
            found.add(name)
    assert seen >= {
        "files",
        "client",
        "client at work",
        "arena",
        "broker",
        "teemate-warden",
        "messages",
        "log",
    }
    return found


@pytest.mark.skipif(BACKEND == "sgx", reason="reads all memory of processes: of the machine's it takes long")
def test_what_is_in_a_database_is_in_no_file_message_log_or_others_memory(
    ledger: Callable[[Path], RunningBroker], tmp_path: Path
) -> None:
    assert leaking(ledger(database_image()), tmp_path, Secrets.draw(5)) == set()


@pytest.mark.skipif(BACKEND == "sgx", reason="reads all memory of processes: of the machine's it takes long")
def test_without_sealing_it_is_in_the_files_and_with_who_writes_them(
    ledger: Callable[[Path], RunningBroker], images: Images, tmp_path: Path
) -> None:
    image = altered_database(images, tmp_path, "DB_TEST_NO_SEALING")
    found = leaking(ledger(image), tmp_path, Secrets.draw(5))
    assert found == {"files", "files after a checkpoint", "teemate-warden"}
