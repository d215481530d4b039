"""A client of the test about kills: moves money in the shared database until it is told to stop, or killed.

Usage: teller.py SOCKET NAME SEED

Every transaction also adds a row to `log`; its number is told on standard output once it is committed.
"""

from __future__ import annotations

import random
import select
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from connections import BUSY, EXECUTE, Connection, SqlError, operation

import teemate

ACCOUNTS = 50


def told_to_stop() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def work(db: Connection, name: str, dice: random.Random) -> None:
    number = 0
    while not told_to_stop():
        one, two = dice.sample(range(ACCOUNTS), 2)
        amount, note = dice.randrange(1, 100), "x" * dice.randrange(3000)
        steps = [
            operation(EXECUTE, "BEGIN IMMEDIATE"),
            operation(EXECUTE, "UPDATE account SET balance = balance - ? WHERE id = ?", [(amount, one)]),
            operation(EXECUTE, "UPDATE account SET balance = balance + ? WHERE id = ?", [(amount, two)]),
            operation(EXECUTE, "INSERT INTO log VALUES (?, ?, ?)", [(name, number, note)]),
            operation(EXECUTE, "COMMIT"),
        ]
        try:
            if dice.random() < 0.5:
                db.run(*steps)
            else:
                for step in steps:
                    db.run(step)
        except SqlError as failed:
            if failed.code & 0xFF != BUSY:
                raise
            if in_transaction(db):
                db.run(operation(EXECUTE, "ROLLBACK"))
            continue
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        number += 1
        if dice.random() < 0.2:
            assert db.sql("SELECT sum(balance) FROM account") == [(ACCOUNTS * 1000,)]


def in_transaction(db: Connection) -> bool:
    (result,) = db.run(operation(EXECUTE, "SELECT 1"))
    return bool(result.flags & 2)


def main() -> None:
    path, name, seed = sys.argv[1:]
    with (
        teemate.connect(path) as connection,
        connection.attach("db") as enclave,
        enclave.slot() as slot,
    ):
        work(Connection(slot, "bank", busy_ms=20_000), name, random.Random(int(seed)))


if __name__ == "__main__":
    main()
