"""What the keeper keeps: descriptors by name, put in and taken out by messages of the worker.

The service manager's end of sd_notify(3): FDSTORE, FDSTOREREMOVE and BARRIER.  The socket lies in a folder
of our own, and only messages of the process that is the worker are heeded (SCM_CREDENTIALS).  Standard
library only, as the keeper itself.
"""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import socket
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple, Protocol

__all__ = ["CAPACITY", "FIRST_FD", "LISTENER", "MAX_FDS", "Kept", "Log", "Stored", "inherited"]

LISTENER = "listener"
"""Name of the socket that the worker bound: its path goes when the keeper ends."""
CAPACITY = 4096
"""Descriptors that are kept at most."""
MAX_FDS = 253
"""Descriptors on one message (SCM_MAX_FD)."""
FIRST_FD = 3
_MAX_MESSAGE = 4096
_CREDENTIALS = struct.Struct("3i")


class Log(Protocol):
    """Writes one line."""

    def __call__(self, level: str, event: str, **about: object) -> None:
        """`about` are its details."""


class Stored(NamedTuple):
    """One descriptor."""

    name: str
    fd: int


class Kept:
    """The descriptors and the socket that they come by."""

    def __init__(self, stored: list[Stored], log: Log) -> None:
        self.stored = stored
        self._log = log
        self._folder = Path(tempfile.mkdtemp(prefix="teemate-keeper-"))
        self.address = str(self._folder / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.setblocking(False)
        self.socket.bind(self.address)

    def read(self, worker: int | None) -> list[dict[str, str]]:
        """Do what has been asked for; returns the messages of the worker, for what else is in them."""
        space = socket.CMSG_SPACE(MAX_FDS * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)
        heeded: list[dict[str, str]] = []
        while True:
            try:
                data, ancillary, flags, _ = self.socket.recvmsg(_MAX_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return heeded
            received = array.array("i")
            sender = None
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                    sender = _CREDENTIALS.unpack(payload[: _CREDENTIALS.size])[0]
            fds = list(received)
            try:
                if sender is None or sender != worker:
                    self._log("warning", "message not heeded", pid=sender, reason="it is not from the worker")
                elif flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                    self._log("warning", "message not heeded", pid=sender, reason="it is too long")
                else:
                    text = data.decode("utf-8", "replace")
                    message = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
                    self._store(message, fds)
                    heeded.append(message)
            finally:
                for fd in fds:  # that of BARRIER=1 too: closing it is the answer
                    os.close(fd)

    def _store(self, message: dict[str, str], fds: list[int]) -> None:
        """Keep or close what the message says; what is kept is taken out of `fds`."""
        name = message.get("FDNAME", "stored")
        if message.get("FDSTOREREMOVE") == "1":
            for stored in [stored for stored in self.stored if stored.name == name]:
                self.stored.remove(stored)
                os.close(stored.fd)
        elif message.get("FDSTORE") == "1":
            while fds and len(self.stored) < CAPACITY:
                self.stored.append(Stored(name, fds.pop(0)))
            if fds:
                self._log("warning", "descriptor not kept", name=name, reason=f"{CAPACITY} are kept already")

    def close(self) -> None:
        """Close everything, and remove the worker's socket and our own."""
        for stored in self.stored:
            if stored.name == LISTENER:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(stored.fd)) as listener:
                    os.unlink(listener.getsockname())
            os.close(stored.fd)
        self.socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def inherited() -> list[Stored]:
    """Return the sockets that a service manager started us with: every worker gets them."""
    count = int(os.environ.get("LISTEN_FDS") or 0)
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    if os.environ.get("LISTEN_PID") not in (None, str(os.getpid())):
        return []
    for fd in range(FIRST_FD, FIRST_FD + count):
        os.set_inheritable(fd, False)
    return [Stored(names[i] if len(names) == count else "", FIRST_FD + i) for i in range(count)]
