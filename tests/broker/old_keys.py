"""A client that gives nothing up: it reads no event, and enters with its old keys for as long as it lives.

Run as a program it attaches by hand and attacks from three places at once, which all map the enclave by
themselves: the thread that got the keys, a child of fork() with the inherited descriptor, and a program
that gets the descriptor over a socket.  What each has done stands in a file that the test maps too.
"""

from __future__ import annotations

import array
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from backends import NUMBER, PATIENCE
from raw_client import RawClient

from teemate._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PLACES = ("thread", "fork", "stranger")
_COUNTS = struct.Struct("<6Q")
_CONTROL = _COUNTS.size * len(PLACES)
"""Where the word stands that attackers obey."""
ATTACK, REST, END = range(3)
_EEXIT = 4


class Counts(NamedTuple):
    """Of one attacker; an entry was let in by the enclave, a fault is the processor's, rests are looks."""

    attempts: int
    entries: int
    last_entry_ns: int
    refusals: int
    faults: int
    rests: int


class Board:
    """The counts of all attackers, and what they are to do."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, mmap.PAGESIZE)

    def counts(self, place: str) -> Counts:
        return Counts(*_COUNTS.unpack_from(self._map, PLACES.index(place) * _COUNTS.size))

    def write(self, place: str, counts: list[int]) -> None:
        _COUNTS.pack_into(self._map, PLACES.index(place) * _COUNTS.size, *counts)

    def order(self, what: int) -> None:
        struct.pack_into("<Q", self._map, _CONTROL, what)

    @property
    def ordered(self) -> int:
        return int(struct.unpack_from("<Q", self._map, _CONTROL)[0])

    def rest(self) -> None:
        """Return when no attacker is inside, nor will be before the next order."""
        self.order(REST)
        seen = {place: self.counts(place).rests for place in PLACES}
        self._wait(lambda: all(self.counts(place).rests > seen[place] for place in PLACES))

    def attempts(self) -> dict[str, int]:
        return {place: self.counts(place).attempts for place in PLACES}

    def wait_for(self, more: int) -> None:
        """Return when every attacker has tried so often again; whoever hangs fails the test."""
        goal = {place: count + more for place, count in self.attempts().items()}
        self._wait(lambda: all(count >= goal[place] for place, count in self.attempts().items()))

    def wait_for_entries(self) -> None:
        """Return when every attacker has been let in; at first others may be in their way."""
        self._wait(lambda: all(self.counts(place).entries for place in PLACES))

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300 * PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"an attacker hangs: {self.attempts()}"
            time.sleep(0.001)


def attack(place: str, board: Board, attached: dict[str, Any], fd: int) -> None:
    """Map the enclave and all slots from `fd`, and enter with the keys in turn until told to end."""
    info = attached["enclave"]
    segments = ffi.new("struct teemate_segment[]", [tuple(s) for s in attached["segments"]])
    handle = ffi.new("struct teemate_enclave **")
    error = lib.teemate_open(
        NUMBER, os.dup(fd), info["base"], info["size"], segments, len(segments), handle, ffi.NULL
    )
    assert error == 0, error
    enclave = handle[0]
    assert lib.teemate_map(enclave, ffi.NULL) == 0
    slots = [(slot["tcs"], struct.unpack("<2Q", slot["key"])) for slot in attached["slots"]]
    for tcs, _ in slots:
        assert lib.teemate_map_tcs(enclave, tcs, ffi.NULL) == 0
    regs, run = ffi.new("struct teemate_regs *"), ffi.new("struct sgx_enclave_run *")
    counts = [0] * len(Counts._fields)
    mine = PLACES.index(place)
    while (order := board.ordered) != END:
        if order == REST:
            counts[5] += 1
            board.write(place, counts)
            time.sleep(0.001)
            continue
        # Mostly the slot that no other attacker is at, so that they are not in one another's way.
        n = counts[0]
        tcs, key = slots[mine if n % 8 else n // 8 % len(slots)]
        regs.rdi = 3  # no selector of the gate's: who is let in leaves with an error
        regs.r12, regs.r13 = key
        outcome = lib.teemate_enter(enclave, tcs, regs, 2, 0, run)
        while outcome == lib.TEEMATE_PAUSED:
            regs.r12, regs.r13 = key
            outcome = lib.teemate_enter(enclave, tcs, regs, run.function, 0, run)
        counts[0] += 1
        if outcome == lib.TEEMATE_LANDED:
            counts[3] += 1
        elif outcome == lib.TEEMATE_LEFT and run.function == _EEXIT:
            counts[1] += 1
            counts[2] = time.monotonic_ns()
        else:
            counts[4] += 1
            run = ffi.new("struct sgx_enclave_run *")
        board.write(place, counts)


# ---- the program ------------------------------------------------------------------------


def _holder(path: str, board_fd: int) -> None:
    import json

    client = RawClient(path, name="hostile")
    attached = client.ok("attach", enclave="faults", slots=len(PLACES))
    fd = client.fds[0]
    board = Board(board_fd)
    child = os.fork()
    if child == 0:
        attack("fork", board, attached, fd)
        os._exit(0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stranger = subprocess.Popen(
            [sys.executable, __file__, "stranger", str(theirs.fileno()), str(board_fd)],
            pass_fds=(theirs.fileno(), board_fd),
        )
        told = dict(attached, slots=[dict(s, key=s["key"].hex(), bind="") for s in attached["slots"]])
        hashes = {key: value.hex() for key, value in told["enclave"].items() if isinstance(value, bytes)}
        told["enclave"] = told["enclave"] | hashes
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        ours.sendmsg([json.dumps(told).encode()], rights)
        print(json.dumps({"grant": attached["grant"], "slots": told["slots"]}), flush=True)
        import threading

        def obey() -> None:
            for line in sys.stdin:
                if line == "acknowledge\n":  # which is a lie
                    numbers = [slot["slot"] for slot in attached["slots"]]
                    client.ok("slots.release", grant=attached["grant"], slots=numbers, clean=True)
                    print("acknowledged", flush=True)

        threading.Thread(target=obey, daemon=True).start()
        attack("thread", board, attached, fd)
        assert os.waitpid(child, 0)[1] == 0
        assert stranger.wait() == 0


def _stranger(number: int, board_fd: int) -> None:
    import json

    with socket.socket(fileno=number) as sock:
        data, ancillary, _, _ = sock.recvmsg(65536, 64)
    (fd,) = array.array("i", ancillary[0][2])
    attached = json.loads(data)
    for slot in attached["slots"]:
        slot["key"] = bytes.fromhex(slot["key"])
    attack("stranger", Board(board_fd), attached, fd)


class Hostile:
    """The running program, for a test."""

    def __init__(self, path: str) -> None:
        import json

        fd = os.memfd_create("board")
        os.ftruncate(fd, mmap.PAGESIZE)
        self.board = Board(fd)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "holder", path, str(fd)],
            pass_fds=(fd,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )
        os.close(fd)
        assert self.process.stdout is not None
        told = json.loads(self.process.stdout.readline())
        self.grant: int = told["grant"]
        self.slots: list[int] = [slot["slot"] for slot in told["slots"]]

    def acknowledge(self) -> None:
        """Have it say that it has unmapped its slots, which it has not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"acknowledge\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"acknowledged\n"

    def close(self) -> None:
        self.board.order(END)
        try:
            status = self.process.wait(60 * PATIENCE)
        finally:
            with suppress(ProcessLookupError):  # a session of its own: nobody else is in that group
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                assert stream is not None
                stream.close()
        assert status == 0


@contextmanager
def hostile(path: str) -> Iterator[Hostile]:
    found = Hostile(path)
    try:
        yield found
    finally:
        found.close()


if __name__ == "__main__":
    if sys.argv[1] == "holder":
        _holder(sys.argv[2], int(sys.argv[3]))
    else:
        _stranger(int(sys.argv[2]), int(sys.argv[3]))
