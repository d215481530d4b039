"""A program that uses enclaves and measures itself: ``python -m teemate.bench.subject``.

It takes its orders as ``teemate-floor`` does: a line ``WHAT COUNT PAUSE`` (microseconds) makes it do WHAT
so often, and print the numbers of all in one line.

    warm       attach in a connected program, to the reply of the first call
    cold       connect and attach, to the reply of the first call
    private    build an enclave of one's own, to the reply of the first call
    hold       attach (or build, with --image) and stay: for the following ones
    empty, echo4k, echo1m, ocall           one call of that kind
    where      pages, descriptor, device and inode of the enclave, and whether that is a device's

    pages      of the enclave, then its descriptor, device and inode, and whether that is a device's

All but `pages` answer nanoseconds.  Two words are about a span of time, ``WHAT START LENGTH`` (nanoseconds of
the monotonic clock, microseconds), and answer how many, in how many nanoseconds, and in how many of a
processor's, for each of --threads threads:

    calls      empty calls, one after the other, each thread in a slot of its own
    getppids   system calls, which have nothing to do with enclaves
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from teemate import Error, connect, create_enclave

if TYPE_CHECKING:
    from teemate import Broker, Enclave, Slot

__all__ = ["main"]

_BLOCK = 10
"""So many between two looks at the clock."""
_NOW = time.monotonic_ns


class Subject:
    """What the program can be told to do; everything is ended by its exit."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.end = 0
        """When the first reply of the last attach was there, by the host's monotonic clock."""
        self._options = options
        self._broker: Broker | None = None
        self._slots: list[Slot] = []
        self._held: Enclave | None = None
        self.words: dict[str, Callable[[], Sequence[int]]] = {
            "warm": self.warm,
            "cold": self.cold,
            "private": self.private,
            "hold": self.hold,
            "pages": self.pages,
            "empty": lambda: self.call("empty", b""),
            "echo4k": lambda: self.call("echo", bytes(4096)),
            "echo1m": lambda: self.call("echo", bytes(1 << 20)),
            "ocall": lambda: self.call("ocall", b"question"),
        }
        self.spans: dict[str, Callable[[int, int], Sequence[int]]] = {
            "calls": lambda start, end: self.span(
                [partial(slot.call, "empty") for slot in self._slots], start, end
            ),
            "getppids": lambda start, end: self.span([os.getppid] * options.threads, start, end),
        }

    def _connected(self) -> Broker:
        if self._broker is None:
            self._broker = connect(self._options.socket, client="bench")
        return self._broker

    def warm(self) -> Sequence[int]:
        """Attach, call, detach."""
        broker = self._connected()
        start = _NOW()
        with broker.attach(self._options.enclave) as enclave:
            with enclave.slot() as slot:
                slot.call("empty")
                self.end = _NOW()
        return (self.end - start,)

    def cold(self) -> Sequence[int]:
        """Connect, attach, call, leave."""
        start = _NOW()
        with connect(self._options.socket, client="bench") as broker:
            with broker.attach(self._options.enclave) as enclave, enclave.slot() as slot:
                slot.call("empty")
                self.end = _NOW()
        return (self.end - start,)

    def _build(self) -> Enclave:
        return create_enclave(self._options.image, self._options.sigstruct, self._options.backend)

    def private(self) -> Sequence[int]:
        """Build, call, end."""
        start = _NOW()
        with self._build() as enclave, enclave.slot() as slot:
            slot.call("empty")
            self.end = _NOW()
        return (self.end - start,)

    def hold(self) -> Sequence[int]:
        """Come in and stay."""
        threads = self._options.threads
        start = _NOW()
        if self._options.image is None:
            self._held = self._connected().attach(self._options.enclave, slots=threads)
        else:
            self._held = self._build()
        self._slots = [self._held.slot().__enter__() for _ in range(threads)]
        self._slots[0].call("empty")
        self.end = _NOW()
        self._held.ocalls["echo"] = lambda data: data
        return (self.end - start,)

    def call(self, name: str, payload: bytes) -> Sequence[int]:
        """Call once."""
        slot, room = self._slots[0], max(65536, len(payload))
        start = _NOW()
        slot.call(name, payload, max_reply=room)
        return (_NOW() - start,)

    def span(self, works: Sequence[Callable[[], object]], start: int, end: int) -> Sequence[int]:
        """Do each in a thread of its own from `start` to `end`, as often as possible."""
        done: list[int] = []
        others = [threading.Thread(target=_as_often, args=(work, start, end, done)) for work in works[1:]]
        for thread in others:
            thread.start()
        _as_often(works[0], start, end, done)
        for thread in others:
            thread.join()
        return done

    def pages(self) -> Sequence[int]:
        """Say which enclave it is in."""
        from teemate._native import lib

        assert self._held is not None
        fd = lib.teemate_enclave_fd(self._held._handle())
        status = os.fstat(fd)
        return (self._held.pages(), fd, status.st_dev, status.st_ino, 1 - lib.teemate_sim_is(fd))


def _as_often(work: Callable[[], object], start: int, end: int, done: list[int]) -> None:
    now = _NOW()
    while now < start:  # a thread that sleeps would begin late, and on a cold core
        work()
        now = _NOW()
    start, cpu, count = now, time.thread_time_ns(), 0
    while not count or now < end:  # who was told too late does a little all the same
        for _ in range(_BLOCK):
            work()
        count += _BLOCK
        now = _NOW()
    done += (count, now - start, time.thread_time_ns() - cpu)


def main() -> int:
    """Do what it is told; returns the exit status."""
    parser = argparse.ArgumentParser(prog="teemate.bench.subject")
    parser.add_argument("--socket")
    parser.add_argument("--enclave")
    parser.add_argument("--image")
    parser.add_argument("--sigstruct")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--first", help="do this once, say at what time the reply was there, and end")
    options = parser.parse_args()
    try:
        if options.first:
            subject = Subject(options)
            subject.words[options.first]()
            _say((subject.end,))
            return 0
        subject = Subject(options)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        for line in sys.stdin:
            what, count, pause = line.split()
            if what in subject.spans:
                start = int(count)
                _say(subject.spans[what](start, start + int(pause) * 1000))
                continue
            word, rest = subject.words[what], int(pause) / 1e6
            numbers: list[int] = []
            for _ in range(int(count)):
                if rest:
                    time.sleep(rest)
                numbers.extend(word())
            _say(numbers)
    except Error as error:
        sys.stderr.write(f"{error.code}: {error.message}\n")
        return 1
    return 0


def _say(numbers: Sequence[int]) -> None:
    sys.stdout.write(" ".join(map(str, numbers)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
