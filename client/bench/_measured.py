"""Programs that measure themselves when they are told to, and how they take turns.

Each reads lines ``WHAT COUNT PAUSE`` and answers every one with a line of whole numbers, mostly
nanoseconds: ``teemate-floor`` (native/bench/floor.h) and :mod:`teemate.bench.subject`.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self

from teemate.bench._rows import Sample
from teemate.errors import CallTimeout, InternalError

__all__ = ["PAUSE_US", "Listener", "Measured", "Side", "by_turns"]

PAUSE_US = 1000
"""Rest before each thing that is measured, on both sides alike: so nobody pays for what the last one
left to be done."""
_PATIENCE = 120.0


class Listener(Protocol):
    """Hears how far a benchmark is."""

    def phase(self, text: str, total: int = 0) -> None:
        """A phase begins."""

    def progress(self, done: int) -> None:
        """So much of its total is done."""


class Measured:
    """One such program; a context manager that ends it."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        self._buffer = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(  # noqa: S603 - our own programs
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            process_group=0,
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def __enter__(self) -> Self:
        """Wait until it is ready."""
        try:
            self.ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def ready(self) -> None:
        """Wait until it has said so."""
        line = self._line()
        if line != b"ready":
            raise InternalError(f"{self._name} said {line!r} instead of being ready")

    def __exit__(self, *_: object) -> None:
        """End it in any case."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and not read everything
            process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._errors.close()

    def keep_on(self, core: int) -> None:
        """Have it work on that core only.

        Cores differ: that of a virtual machine may share its real one with somebody else, who makes it a
        third slower for seconds.  What is compared must not be on different ones.
        """
        os.sched_setaffinity(self.pid, {core})

    def tell(self, what: str, count: int = 1, pause_us: int = 0) -> None:
        """Let it begin; :meth:`hear` has the answer."""
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), f"{what} {count} {pause_us}\n".encode())
        except BrokenPipeError:
            raise self._ended() from None

    def hear(self) -> list[int]:
        """Return what it measured."""
        return [int(number) for number in self._line().split()]

    def ask(self, what: str, count: int = 1, pause_us: int = 0) -> list[int]:
        """Have it do `what` so often, with a rest before each, and return what it measured."""
        self.tell(what, count, pause_us)
        return self.hear()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        end = time.monotonic() + _PATIENCE
        while b"\n" not in self._buffer:
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                raise CallTimeout(f"{self._name} gave no answer within {_PATIENCE:g} s")
            data = os.read(fd, 65536)
            if not data:
                raise self._ended()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self) -> InternalError:
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()[-2000:]
        return InternalError(f"{self._name} ended with status {status}: {said or 'it did not say why'}")


Side = Callable[[], Sequence[float]]
"""Measures one side of a comparison; returns nanoseconds."""


def by_turns(sides: Mapping[str, Side], rounds: int, listener: Listener, what: str) -> dict[str, Sample]:
    """Let the sides measure in turns, so that what else the machine does hits all alike.

    One round that does not count comes first.  Each round begins with another side, so that none
    always follows the same one.
    """
    listener.phase(what, rounds)
    names = list(sides)
    for side in sides.values():
        side()
    turns: dict[str, list[Sequence[float]]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            turns[name].append(sides[name]())
        listener.progress(turn + 1)
    return {name: Sample.of_turns(numbers) for name, numbers in turns.items()}
