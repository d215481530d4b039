"""Many clients in one program: ``python -m teemate.bench.crowd``.

They speak the protocol and map nothing, so that a thousand fit into one process and what is measured is the
broker's.  Orders come as for ``teemate-floor``, a line ``WHAT COUNT PAUSE``:

    attach     COUNT more clients connect, attach (to each --enclave in turn) and stay
    offer      COUNT attaches are asked for, one every PAUSE microseconds whether or not earlier ones
               have been answered; each is given up again

Both answer the nanoseconds of each attach until its reply was there; `offer` counts from the moment at which
it was to be asked for, so that what waits behind a slow one is not forgotten.
"""

from __future__ import annotations

import argparse
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from teemate import wire
from teemate._resume import Session

__all__ = ["main"]

_CONNECTIONS = 32
"""Over which attaches are offered."""
_NOW = time.monotonic_ns


class _Client:
    """One connection; it asks one thing at a time."""

    def __init__(self, path: str, enclave: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(path)
        self.due = 0
        self.attaching = False
        self._enclave = enclave
        wire.send(self.socket, Session("crowd").hello(resume=False))
        self.answer()

    def ask(self) -> None:
        """Ask for a grant."""
        self.attaching = True
        args = {"enclave": self._enclave, "slots": 1, "wait": 60.0}
        wire.send(self.socket, wire.encode({"id": 1, "op": "attach", "args": args}))

    def give_up(self, grant: int) -> None:
        """Give it back."""
        self.attaching = False
        wire.send(
            self.socket, wire.encode({"id": 2, "op": "detach", "args": {"grant": grant, "clean": True}})
        )

    def answer(self) -> dict[str, Any]:
        """Return what the broker said; descriptors are closed."""
        while True:
            packet = wire.receive(self.socket)
            wire.close_all(packet.fds)
            message: dict[str, Any] = wire.decode_trusted(packet.data)
            if "event" in message:
                continue
            if "ok" not in message:
                raise SystemExit(f"the broker said {message}")
            ok: dict[str, Any] = message["ok"]
            return ok


class Crowd:
    """All of them."""

    def __init__(self, path: str, enclaves: Sequence[str]) -> None:
        self._path = path
        self._enclaves = enclaves
        self._staying: list[_Client] = []
        self._offering: list[_Client] = []

    def attach(self, count: int, _pause: int) -> Sequence[int]:
        """Have `count` more clients."""
        taken = []
        for _ in range(count):
            start = _NOW()
            enclave = self._enclaves[len(self._staying) % len(self._enclaves)]
            client = _Client(self._path, enclave)
            client.ask()
            client.answer()
            taken.append(_NOW() - start)
            self._staying.append(client)
        return taken

    def offer(self, count: int, pause_us: int) -> Sequence[int]:
        """Ask for `count` attaches, one every `pause_us`."""
        while len(self._offering) < _CONNECTIONS:
            self._offering.append(_Client(self._path, self._enclaves[0]))
        poll = select.epoll()
        by_fd = {client.socket.fileno(): client for client in self._offering}
        for fd in by_fd:
            poll.register(fd, select.EPOLLIN)
        idle = deque(self._offering)
        taken: list[int] = []
        start = _NOW()
        asked = 0
        while len(taken) < count or len(idle) < len(by_fd):
            now = _NOW()
            while asked < count and idle and now >= start + asked * pause_us * 1000:
                client = idle.popleft()
                client.due = start + asked * pause_us * 1000
                client.ask()
                asked += 1
            left = -1.0
            if asked < count and idle:
                left = max(0.0, (start + asked * pause_us * 1000 - _NOW()) / 1e9)
            for fd, _ in poll.poll(left):
                client = by_fd[fd]
                ok = client.answer()
                if client.attaching:
                    taken.append(_NOW() - client.due)
                    client.give_up(ok["grant"])
                else:
                    idle.append(client)
        poll.close()
        return taken


def main() -> int:
    """Do what it is told; returns the exit status."""
    parser = argparse.ArgumentParser(prog="teemate.bench.crowd")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--enclave", required=True, action="append")
    options = parser.parse_args()
    crowd = Crowd(options.socket, options.enclave)
    words = {"attach": crowd.attach, "offer": crowd.offer}
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        what, count, pause = line.split()
        numbers = words[what](int(count), int(pause))
        sys.stdout.write(" ".join(map(str, numbers)) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
