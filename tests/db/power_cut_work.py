"""What is done to a database before power is cut: run with recorder.c preloaded.

Usage: power_cut_work.py IMAGE FOLDER TRANSACTIONS

After each acknowledged transaction it marks the record; :func:`state` tells what is in the table then.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backends import BACKEND
from connections import EXECUTE, Connection, operation

import teemate


def rows(number: int) -> list[tuple[int, str]]:
    """What transaction `number` puts in."""
    texts = [f"{number}/{n} " * (1 + (number * 7 + n * 31) % 200) for n in range(number % 5 + 1)]
    return [(number * 10 + n, text) for n, text in enumerate(texts)]


def state(number: int) -> dict[int, str]:
    """The table after `number` transactions."""
    table: dict[int, str] = {}
    for done in range(number):
        table.update(rows(done))
        if done % 3 == 2:
            for key in [key for key in table if key // 10 == done - 2]:
                del table[key]
    return table


def transaction(db: Connection, number: int) -> None:
    """Do transaction `number`; one in eight is rolled back first, and done again."""
    for attempt in range(2 if number % 8 == 3 else 1):
        db.sql("BEGIN IMMEDIATE")
        db.run(operation(EXECUTE, "INSERT INTO t VALUES (?, ?)", rows(number)))
        if number % 3 == 2:
            db.sql("DELETE FROM t WHERE id / 10 = ?", number - 2)
        db.sql("COMMIT" if attempt or number % 8 != 3 else "ROLLBACK")


def main() -> None:
    image, folder, transactions = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    mark = ctypes.CDLL(os.environ["LD_PRELOAD"]).record_mark
    with (
        teemate.create_enclave(image, image.with_suffix(".sig"), backend=BACKEND, storage=folder) as enclave,
        enclave.slot() as slot,
    ):
        db = Connection(slot, "cut")
        db.sql("PRAGMA wal_autocheckpoint = 12")
        db.sql("PRAGMA cache_size = 10")
        db.script("CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT)")
        mark(ctypes.c_uint64(0))
        for number in range(transactions):
            transaction(db, number)
            mark(ctypes.c_uint64(number + 1))
            if number % 20 == 19:
                db.sql("PRAGMA wal_checkpoint(TRUNCATE)")


if __name__ == "__main__":
    main()
