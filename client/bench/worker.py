"""A program of the storm, and the one that starts them.

``python -m teemate.bench.worker`` reads numbers, one a line, and for each forks a program that works under
that number until it is killed, or told to stop.  A fork instead of a fresh interpreter, since 10,000 of
those would be what the storm measures; it has no connection and has entered nothing yet.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import select
import signal
import struct
import sys
from pathlib import Path

from teemate._broker import Broker, connect
from teemate._grant import GrantedEnclave
from teemate.bench._journal import KEYS, Field, Journal, Record, key_name, serial_in, value_of
from teemate.errors import Busy, ConnectionLost, EnclaveLost, Error, NotAttached, Revoked
from teemate.vault import Changed, Entry, Vault

__all__ = ["COUNTER", "Counter", "Work", "main"]

COUNTER = b"storm counter"
_PR_SET_PDEATHSIG = 1
_ATTACH_WAIT = 60.0
_GONE = (EnclaveLost, Revoked, ConnectionLost, NotAttached)


class Counter:
    """The shared counter's value: the total, then how much of it each program has added.

    One compare-and-swap changes both, so a program that was killed in the middle can be told whether
    its increment was done.
    """

    def __init__(self, entry: Entry | None, programs: int) -> None:
        value = bytes(8 * (1 + programs)) if entry is None else entry.value
        self.total, *self.parts = struct.unpack(f"<{1 + programs}Q", value)
        self.version = 0 if entry is None else entry.version

    def plus(self, program: int) -> bytes:
        """The value with one more."""
        parts = list(self.parts)
        parts[program] += 1
        return struct.pack(f"<{1 + len(parts)}Q", self.total + 1, *parts)


class Work:
    """What one program does in the vault, and how it checks it; `say` hears what is wrong."""

    def __init__(self, vault: Vault, record: Record, program: int, programs: int) -> None:
        self._vault = vault
        self._record = record
        self._program = program
        self._programs = programs

    def settle(self) -> None:
        """See what became of what was under way when the last program of this number ended."""
        record = self._record
        for key in range(KEYS):
            self._read(key)
        record.write(Field.INTENT, 0)
        counter = self._counter()
        part, counted = counter.parts[self._program], record.read(Field.COUNTED)
        if record.read(Field.COUNTING) and part == counted + 1:
            record.write(Field.COUNTED, part)
        elif part != counted:
            self._wrong(f"its increments are {part}, {counted} were done", Field.REPEATED)
        record.write(Field.COUNTING, 0)

    def step(self, chance: random.Random) -> None:
        """Do one thing at random."""
        what = chance.random()
        if what < 0.50:
            self._put(chance.randrange(KEYS))
        elif what < 0.62:
            self._read(chance.randrange(KEYS))
        elif what < 0.70:
            self._delete(chance.randrange(KEYS))
        elif what < 0.78:
            self.increment()
        elif what < 0.88:
            self._read_other(chance.randrange(self._programs), chance.randrange(KEYS))
        elif what < 0.90:
            for _ in self._vault.list(b"storm"):
                pass
        else:  # long inside, with blocks of its own: everything of a key is sealed
            for _ in self._vault.export(b"storm %d" % chance.randrange(self._programs)):
                pass
        self._record.add(Field.CALLS)

    def _put(self, key: int) -> None:
        record = self._record
        serial = record.read(Field.SERIAL) + 1
        record.write(Field.SERIAL, serial)
        record.intend(key, serial)
        self._vault.put(key_name(self._program, key), value_of(self._program, key, serial))
        record.done(key, serial)

    def _delete(self, key: int) -> None:
        record = self._record
        record.intend(key, 0)
        there = self._vault.delete(key_name(self._program, key))
        if there != bool(record.serial(key)):
            self._wrong(f"deleting key {key} found {'something' if there else 'nothing'}")
        record.done(key, 0)

    def _read(self, key: int) -> None:
        record = self._record
        entry = self._vault.get(key_name(self._program, key))
        for serial in record.allowed(key):
            if (entry.value if entry else None) == (value_of(self._program, key, serial) if serial else None):
                record.write(Field.KEYS + key, serial)
                return
        found = "nothing" if entry is None else f"serial {serial_in(entry.value)}, {len(entry.value)} bytes"
        self._wrong(f"key {key} holds {found} instead of serial {sorted(record.allowed(key))}")
        record.write(Field.KEYS + key, serial_in(entry.value) if entry else 0)

    def _read_other(self, program: int, key: int) -> None:
        """Somebody else's may be any of its values, but has to be a whole one."""
        entry = self._vault.get(key_name(program, key))
        if entry is not None and entry.value != value_of(program, key, serial_in(entry.value)):
            self._wrong(f"key {key} of program {program} is torn")

    def increment(self) -> None:
        """Add one to the shared counter."""
        record = self._record
        record.write(Field.COUNTING, 1)
        counter = self._counter()
        while True:
            if counter.parts[self._program] != record.read(Field.COUNTED):
                self._wrong("a compare-and-swap that failed was done", Field.REPEATED)
                record.write(Field.COUNTED, counter.parts[self._program])
            result = self._vault.compare_and_swap(COUNTER, counter.version, counter.plus(self._program))
            if not isinstance(result, Changed):
                break
            counter = Counter(result.entry, self._programs)
        record.write(Field.COUNTED, counter.parts[self._program] + 1)
        record.write(Field.COUNTING, 0)

    def _counter(self) -> Counter:
        return Counter(self._vault.get(COUNTER), self._programs)

    def _wrong(self, what: str, field: Field = Field.WRONG) -> None:
        self._record.add(field)
        say(self._program, what)


def say(program: int, what: str) -> None:
    """Tell people, through the file that stderr is."""
    os.write(2, f"program {program}: {what}\n".encode())


def work(options: argparse.Namespace, program: int) -> None:
    """Be a program: attach, settle what the last one left, work until the end."""
    journal = Journal(options.journal, options.programs)
    record = journal.records[program]
    seed = f"{options.seed} {program} {record.read(Field.SERIAL)}"
    chance = random.Random(seed)  # noqa: S311 - chance, not secrets
    try:
        broker = connect(options.socket, client=f"storm {program}")
        with broker, broker.attach(options.enclave, wait=_ATTACH_WAIT) as enclave:
            with enclave.slot() as slot:
                record.write(Field.BASE, enclave.base)
                record.write(Field.SLOT, slot.index)
                todo = Work(Vault(slot), record, program, options.programs)
                todo.settle()
                record.write(Field.READY, 1)
                while not journal.stopping:
                    todo.step(chance)
                    _talk(broker, enclave, chance)
                    resumes = broker._connection.resumes
                    if resumes != record.read(Field.RESUMES):
                        record.write(Field.RESUMES, resumes)
    except _GONE as error:
        record.add(Field.LOST)
        say(program, f"{error.code}: {error.message}")
        sys.exit(3)
    except Error as error:
        record.add(Field.FAILED)
        say(program, f"{error.code}: {error.message}")
        sys.exit(1)
    finally:
        record.write(Field.READY, 0)


def _talk(broker: Broker, enclave: GrantedEnclave, chance: random.Random) -> None:
    """Now and then ask the broker for something, so that its end also meets requests under way."""
    what = chance.random()
    if what < 0.002:
        broker.ping()
    elif what < 0.004:
        try:
            enclave.acquire(1, wait=0.0)
        except Busy:  # others have them now; that it was asked for is what counts
            return
        enclave.release(1)


def main() -> None:
    """Start programs as they are asked for, until there is nobody to ask."""
    parser = argparse.ArgumentParser(prog="teemate.bench.worker")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--enclave", required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--programs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    gc.freeze()
    poll = select.poll()
    poll.register(0, select.POLLIN)
    running: dict[int, int] = {}
    buffer = b""
    while True:
        events = poll.poll(20)
        if events:
            data = os.read(0, 4096)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                program = int(line)
                pid = _start(options, program)
                running[pid] = program
                _report("started", program, pid)
        for pid, status in _ended():
            _report("ended", running.pop(pid), os.waitstatus_to_exitcode(status))
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _start(options: argparse.Namespace, program: int) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            record = Journal(options.journal, options.programs).records[program]
            record.write(Field.READY, 0)  # who was killed has left it: before the PID makes it this one's
            record.write(Field.PID, os.getpid())
            record.write(Field.SLOT, 0)  # none of a client's
            record.write(Field.RESUMES, 0)
            work(options, program)
            status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException as error:
        Journal(options.journal, options.programs).records[program].add(Field.FAILED)
        say(program, f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def _ended() -> list[tuple[int, int]]:
    found = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if not pid:
            break
        found.append((pid, status))
    return found


def _report(what: str, program: int, number: int) -> None:
    os.write(1, f"{what} {program} {number}\n".encode())


if __name__ == "__main__":
    main()
