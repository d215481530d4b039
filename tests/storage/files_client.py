"""A client of the tests about files: a process that does one kind of work until it is told to stop.

Usage: files_client.py SOCKET WORK NAME

append   record after record, synced; tells the number of each when it is acknowledged
model    makes, writes, cuts and deletes a file of its own, and compares it with what it should be

It stops at the first line on its standard input; a failure is a traceback and exit status 1.
"""

from __future__ import annotations

import random
import select
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from files_image import ENOENT, READ_ONLY, Files

import teemate


def told_to_stop() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def append(files: Files, name: str) -> None:
    handle = files.open(name)
    number = 0
    while not told_to_stop():
        result = files.append(handle, number, 1)
        assert result == 0, result
        say(number)
        number += 1


def model(files: Files, name: str) -> None:
    """Each step's result has to be that of having been done once, whoever died meanwhile."""
    dice = random.Random(name)
    steps = 0
    while not told_to_stop():
        content = bytearray()
        assert files.open(name, READ_ONLY) == -ENOENT
        handle = files.open(name)
        assert handle >= 0, handle
        for _ in range(dice.randrange(1, 12)):
            kind = dice.randrange(4)
            if kind == 0:
                size = dice.randrange(9000)
                assert files.truncate(handle, size) == 0
                content = content[:size].ljust(size, b"\0")
            elif kind == 1:
                assert files.sync(handle) == 0
            else:
                offset, data = dice.randrange(9000), dice.randbytes(dice.randrange(1, 5000))
                assert files.write(handle, offset, data) == len(data)
                content = content.ljust(offset, b"\0")
                content[offset : offset + len(data)] = data
            assert files.size(handle) == len(content)
            assert files.read(handle, 0, 65536) == content
            steps += 1
        assert files.close(handle) == 0
        assert files.delete(name) == 0
    say(steps)


def main() -> None:
    path, work, name = sys.argv[1:]
    with (
        teemate.connect(path) as connection,
        connection.attach("files") as enclave,
        enclave.slot() as slot,
    ):
        say(f"inside {enclave.base} {enclave.size}")
        {"append": append, "model": model}[work](Files(slot), name)


if __name__ == "__main__":
    main()
