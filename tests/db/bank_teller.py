"""Tellers of the bank (bank.py): each moves money in the shared database until it is stopped or killed.

Usage: bank_teller.py ENCLAVE [--careless]

Reads lines ``start NUMBER SEED`` and ``stop``.  What is said on standard output is one write each, so that a
death leaves a line whole or unsaid:

    up                              the program is ready to start tellers
    started NUMBER PID              as this process counts
    works NUMBER BASE SLOT          the teller is in the enclave, at that address, in that slot
    try NUMBER TRANSACTION SOURCE TARGET AMOUNT
    done NUMBER TRANSACTION         it was committed
    failed NUMBER what
    ended NUMBER STATUS             minus the signal that killed it

Tellers are forked: starting a fresh interpreter for each would be most of the work.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from connections import BUSY, EXECUTE, Connection, SqlError, operation

import teemate
from teemate import db

DATABASE, ACCOUNTS, START = "bank", 50, 1000
BUSY_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1
_PRIMARY = 0xFF  # of SQLite's extended codes

SUBTRACT = "UPDATE account SET balance = balance - ?, changes = changes + 1 WHERE id = ?"
ADD = "UPDATE account SET balance = balance + ?, changes = changes + 1 WHERE id = ?"
NOTE = "INSERT INTO transfer VALUES (?, ?, ?, ?, ?, ?)"
SUM = "SELECT sum(balance), count(*) FROM account"
HISTORY = (
    "SELECT balance, (SELECT total(amount) FROM transfer WHERE target = account.id)"
    " - (SELECT total(amount) FROM transfer WHERE source = account.id) FROM account WHERE id = ?"
)


def say(*words: object) -> None:
    """One line, in one write to a pipe."""
    os.write(1, " ".join(map(str, words)).encode()[:500] + b"\n")


class Teller:
    """Who it is, and what it does; how it speaks to the database is its kind's."""

    def __init__(self, number: int, dice: random.Random, *, careless: bool) -> None:
        self.number = number
        self.dice = dice
        self.careless = careless
        self.transaction = 0
        self.stopped = False

    def stop(self, *_: object) -> None:
        """Be the last transaction's end."""
        self.stopped = True

    def begin(self) -> tuple[int, int, int, str]:
        """Say what is about to be done: source, target, amount, and a note."""
        source, target = self.dice.sample(range(ACCOUNTS), 2)
        amount = self.dice.randrange(1, 100)
        say("try", self.number, self.transaction, source, target, amount)
        return source, target, amount, "x" * self.dice.choice((0, 40, 40, 400, 3000, 9000))

    def done(self) -> None:
        """Say that it is committed."""
        say("done", self.number, self.transaction)
        self.transaction += 1

    def wrong(self, what: object) -> None:
        """Say so and end: everything after it would be too."""
        say("failed", self.number, what)
        raise SystemExit(1)

    def look(self, ask: Callable[[str, int], object]) -> None:
        """Now and then see that what is there is right, whoever is at it and whoever was killed."""
        chance = self.dice.random()
        if chance < 0.1 and (found := ask(SUM, -1)) != (ACCOUNTS * START, ACCOUNTS):
            self.wrong(f"the sum was {found}")
        elif chance > 0.99:
            balance, moved = ask(HISTORY, self.dice.randrange(ACCOUNTS))  # type: ignore[misc]
            if balance != START + moved:
                self.wrong(f"a balance was {balance} and not {START} + {moved}")


class EcallTeller(Teller):
    """Speaks to the enclave itself: one call for all, or one for each statement."""

    def work(self, enclave: teemate.Enclave) -> None:
        with enclave.slot() as slot:
            bank = Connection(slot, DATABASE, busy_ms=int(BUSY_SECONDS * 1000))
            say("works", self.number, enclave.base, slot.index)

            def ask(text: str, account: int) -> object:
                return bank.sql(text, *([] if account < 0 else [account]))[0]

            while not self.stopped:
                try:
                    self.transfer(bank)
                    self.look(ask)
                    if self.dice.random() < 0.003:
                        bank.sql(f"PRAGMA wal_checkpoint({self.dice.choice(('PASSIVE', 'TRUNCATE'))})")
                except SqlError as failed:
                    if failed.code & _PRIMARY != BUSY:
                        raise
                    (result,) = bank.run(operation(EXECUTE, "SELECT 1"))
                    if result.flags & 2:
                        bank.sql("ROLLBACK")

    def transfer(self, bank: Connection) -> None:
        source, target, amount, note = self.begin()
        row = (self.number, self.transaction, source, target, amount, note)
        begin, commit = (operation(EXECUTE, text) for text in ("BEGIN IMMEDIATE", "COMMIT"))
        subtract = operation(EXECUTE, SUBTRACT, [(amount, source)])
        add = operation(EXECUTE, ADD, [(amount, target)])
        write = operation(EXECUTE, NOTE, [row])
        way = self.dice.random()
        if way < 0.1:  # all of it is taken back, and done again
            bank.run(begin, subtract, add, write)
            bank.sql("ROLLBACK")
        if way < 0.5 and not self.careless:
            bank.run(begin, subtract, add, write, commit)
        else:
            bank.run(begin)
            if way > 0.8:  # part of it is
                bank.sql("SAVEPOINT half")
                bank.run(subtract, write)
                bank.script("ROLLBACK TO half; RELEASE half")
            for step in (subtract, add, write):
                bank.run(step)
            if self.careless:
                self.done()
            bank.run(commit)
        if not self.careless:
            self.done()


class ModuleTeller(Teller):
    """Speaks as most programs will: through teemate.db."""

    def work(self, enclave: teemate.Enclave) -> None:
        bank = db.connect(enclave, DATABASE, timeout=BUSY_SECONDS, isolation_level="IMMEDIATE")
        say("works", self.number, enclave.base, bank._slot.index)

        def ask(text: str, account: int) -> object:
            return bank.execute(text, () if account < 0 else (account,)).fetchone()

        while not self.stopped:
            try:
                self.transfer(bank)
                self.look(ask)
            except db.OperationalError as failed:
                if getattr(failed, "sqlite_errorcode", 0) & _PRIMARY != BUSY:
                    raise
                bank.rollback()
        bank.close()

    def transfer(self, bank: db.Connection) -> None:
        source, target, amount, note = self.begin()
        if self.dice.random() < 0.1:
            bank.execute(SUBTRACT, (amount, source))
            bank.rollback()
        with bank:
            bank.execute(SUBTRACT, (amount, source))
            bank.execute(ADD, (amount, target))
            bank.execute(NOTE, (self.number, self.transaction, source, target, amount, note))
            if self.careless:
                self.done()
        if not self.careless:
            self.done()


def be_teller(name: str, number: int, seed: str, *, careless: bool) -> None:
    """Attach, work, and go."""
    kind = ModuleTeller if number % 2 else EcallTeller
    teller = kind(number, random.Random(f"{seed} {number}"), careless=careless)
    signal.signal(signal.SIGTERM, teller.stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        with teemate.connect(client=f"teller {number}") as broker, broker.attach(name, wait=120.0) as enclave:
            teller.work(enclave)
    except (teemate.Error, SqlError, db.Error) as error:
        teller.wrong(f"{type(error).__name__}: {error}")


def start(name: str, number: int, seed: str, *, careless: bool) -> int:
    """Fork it; the child does not return."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            be_teller(name, number, seed, careless=careless)
            status = 0
    except SystemExit:
        pass
    except BaseException as error:
        say("failed", number, f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def main() -> None:
    """Start tellers as they are asked for; they end with this process."""
    name, careless = sys.argv[1], "--careless" in sys.argv
    gc.freeze()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until a teller can be stopped by it
    poll = select.poll()
    poll.register(0, select.POLLIN)
    running: dict[int, int] = {}
    buffer, stopping = b"", False
    say("up")
    while running or not stopping:
        if poll.poll(20):
            data = os.read(0, 4096)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                match line.decode().split():
                    case ["start", number, seed]:
                        pid = start(name, int(number), seed, careless=careless)
                        running[pid] = int(number)
                        say("started", number, pid)
                    case ["stop"]:
                        stopping = True
                        for pid in running:
                            os.kill(pid, signal.SIGTERM)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            say("ended", running.pop(pid), os.waitstatus_to_exitcode(status))
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
