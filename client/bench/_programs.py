"""The storm's programs as the one who leads sees them."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from teemate.bench._journal import Field, Journal
from teemate.errors import CallTimeout

__all__ = ["LOST_STATUS", "Programs"]

LOST_STATUS = 3
"""Of a program whose grant was gone."""


class Programs:
    """`count` programs, each started again after its end until :meth:`finish`; a context manager."""

    def __init__(self, folder: Path, name: str, *, socket: str, enclave: str, count: int, seed: int) -> None:
        path = folder / f"{name}.journal"
        self.journal = Journal.create(path, count)
        self.running: dict[int, int] = {}
        """Pids by number; one that is being started is in neither."""
        self.again = True
        """Whether who ends is started again."""
        self.statuses: list[int] = []
        """How those ended that nobody killed."""
        self.killed: set[int] = set()
        self._errors = folder / f"{name}.errors"
        self._count = count
        self._buffer = b""
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
                [
                    sys.executable, "-m", "teemate.bench.worker", "--socket", socket, "--enclave", enclave,
                    "--journal", str(path), "--programs", str(count), "--seed", str(seed),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                process_group=0,
            )  # fmt: skip

    def __enter__(self) -> Self:
        """Start all of them."""
        for program in range(self._count):
            self._start(program)
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever is left."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _start(self, program: int) -> None:
        assert self._process.stdin is not None
        os.write(self._process.stdin.fileno(), b"%d\n" % program)

    def hear(self, patience: float = 0.0) -> None:
        """Take in who has started and who has ended."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while poll.poll(patience * 1000):
            data = os.read(fd, 65536)
            if not data:
                raise CallTimeout(f"what starts the programs has ended: {self.said()}")
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                what, program, number = line.split()
                if what == b"started":
                    self.running[int(program)] = int(number)
                else:
                    self._ended(int(program), int(number))
            patience = 0.0

    def _ended(self, program: int, status: int) -> None:
        pid = self.running.pop(program)
        if pid in self.killed:
            self.killed.discard(pid)
        else:
            self.statuses.append(status)
            if status < 0:  # killed by a signal that was not ours: a fault
                self.journal.records[program].add(Field.FAILED)
        if self.again:
            self._start(program)

    def ready(self) -> list[int]:
        """The numbers of those that work in the enclave."""
        return [
            program
            for program, pid in self.running.items()
            if self.journal.records[program].read(Field.READY)
            and self.journal.records[program].read(Field.PID) == pid
        ]

    def wait_for(self, condition: Callable[[], bool], limit: float) -> bool:
        """Listen until `condition` holds; False when it did not within `limit` seconds."""
        end = time.monotonic() + limit
        while not condition():
            if time.monotonic() > end:
                return False
            self.hear(0.01)
        return True

    def finish(self, limit: float) -> int:
        """Let all end by themselves; returns how many did not."""
        self.again = False
        self.journal.stop()
        self.wait_for(lambda: not self.running, limit)
        return len(self.running)

    def total(self, field: Field) -> int:
        """A field of all records together."""
        return sum(record.read(field) for record in self.journal.records)

    def said(self) -> list[str]:
        """What went wrong, in the programs' words."""
        return self._errors.read_text(errors="replace").splitlines()
