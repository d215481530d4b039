"""Many processes on one database of a shared enclave, killed wherever they are: nothing committed is lost."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from connections import EXECUTE, Connection, database_image, operation
from images import BuiltImage
from policies import enclave_policy
from processes import wait_until
from running_broker import RunningBroker
from teller import ACCOUNTS

import teemate

TELLER = Path(__file__).with_name("teller.py")


class Teller:
    """A process of teller.py; what it says goes to a file."""

    def __init__(self, socket: str, name: str, seed: int, folder: Path) -> None:
        self.name = name
        self._said = folder / name
        with self._said.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(TELLER), socket, name, str(seed)], stdin=subprocess.PIPE, stdout=file
            )

    def committed(self) -> int:
        """How many transactions it has told of."""
        return self._said.read_bytes().count(b"\n")

    def wait_for(self, count: int) -> None:
        """Return when it has told of so many; it is alive all the while."""
        wait_until(
            lambda: self.committed() >= count or self.process.poll() is not None, f"{self.name} stands still"
        )
        assert self.process.poll() is None

    def stop(self) -> None:
        self.process.communicate(b"stop\n", timeout=120)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=60)
        assert self.process.returncode == -signal.SIGKILL


@contextlib.contextmanager
def inside(bank: RunningBroker) -> Iterator[Connection]:
    """A connection of this process."""
    with (
        teemate.connect(bank.socket) as connection,
        connection.attach("db") as enclave,
        enclave.slot() as slot,
    ):
        yield Connection(slot, "bank", busy_ms=20_000)


@pytest.fixture
def bank(broker: Callable[..., RunningBroker], tmp_path: Path) -> RunningBroker:
    """A broker whose database enclave has storage, and in it a bank."""
    image = database_image()
    built = BuiltImage(
        name="db",
        sgxs=image,
        sigstruct=image.with_suffix(".sig"),
        elf=image.with_suffix(".elf"),
        mrenclave=b"",
        slots=16,
    )
    policy = f'[broker]\nstate_directory = "{tmp_path / "state"}"\nwarden_deadline = 30.0\n'
    running = broker(policy + enclave_policy("db", built, "slots_per_client = 8\nstorage = true"))
    with inside(running) as db:
        db.script(
            "CREATE TABLE account(id INTEGER PRIMARY KEY, balance INTEGER CHECK (balance > -1000000));"
            "CREATE TABLE log(teller TEXT, number INTEGER, note TEXT, PRIMARY KEY (teller, number))"
            "WITHOUT ROWID"
        )
        db.run(operation(EXECUTE, "INSERT INTO account VALUES (?, 1000)", [(n,) for n in range(ACCOUNTS)]))
    return running


def check(db: Connection, tellers: list[Teller]) -> int:
    """Sums, logs and structure are right; returns how many transactions there are."""
    assert db.sql("PRAGMA integrity_check") == [("ok",)]
    assert db.sql("SELECT sum(balance), count(*) FROM account") == [(ACCOUNTS * 1000, ACCOUNTS)]
    total = 0
    for teller in tellers:
        ((count, first, last),) = db.sql(
            "SELECT count(*), min(number), max(number) FROM log WHERE teller = ?", teller.name
        )
        assert isinstance(count, int)
        # The last one may be committed without having been told.
        assert teller.committed() <= count <= teller.committed() + 1
        assert not count or (first, last) == (0, count - 1)
        total += count
    assert db.sql("SELECT count(*) FROM log") == [(total,)]
    return total


def test_killed_clients_lose_nothing_and_hold_nobody_up(
    bank: RunningBroker, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    dice = random.Random(7)
    full = request.config.getoption("--full")
    kills, at_once = (300, 6) if full else (12, 4)
    tellers: list[Teller] = []
    alive: list[Teller] = []

    def begin() -> None:
        tellers.append(Teller(bank.socket, f"teller-{len(tellers)}", len(tellers), tmp_path))
        alive.append(tellers[-1])

    for _ in range(at_once):
        begin()
    for _ in range(kills):
        victim = dice.choice(alive)
        some = victim.committed() + dice.randrange(1, 12)
        victim.wait_for(some)
        victim.kill()
        alive.remove(victim)
        begin()
    before = [teller.committed() for teller in alive]
    for teller, some in zip(alive, before, strict=True):  # everybody goes on
        teller.wait_for(some + 1)
        teller.stop()
    with inside(bank) as db:
        total = check(db, tellers)
    assert total >= kills
