"""What makes a new connection the same client again, and how often one is tried.

A broker with a descriptor store keeps its clients' grants while it is restarted.  It knows a
client again by a token, which is good in the process that got it and nowhere else.  The client's
first hello brings a random one of its own, since the broker may end before its answer with the
first token of its making has arrived, but after it has granted what came along with that hello.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from teemate import wire
from teemate.errors import ConnectionLost, EnclaveLost, Error

__all__ = ["Absence", "Session", "is_end", "unknown_outcome"]

PROTOCOL_VERSION = 1
FIRST_PAUSE = 0.01
LONGEST_PAUSE = 0.5
"""Seconds between two tries to reach the broker; each pause is twice the one before."""
SETTLED = 0.2
"""Seconds that a connection has to last until the pauses begin anew."""
GREETING_GRACE = 30.0
"""Seconds that a broker may need for its first greeting, over however many of its lives."""

_TOKEN_SIZE = 32
# Encoded once, which also brings the encoder into memory before the first request.
_HELLO = wire.encode(
    {
        "id": 0,
        "op": "hello",
        "args": {"version": PROTOCOL_VERSION, "counters": True, "session": bytes(_TOKEN_SIZE)},
    }
)[:-_TOKEN_SIZE]
_ENDS = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})


def is_end(error: OSError) -> bool:
    """Whether `error` of a socket says that the other side has gone."""
    return error.errno in _ENDS


def unknown_outcome(path: str, op: str) -> ConnectionLost:
    """Return the error for a request that a broker took with it, which may have been carried out."""
    return ConnectionLost(
        f"the broker at {path} came back without its state while {op!r} was under way: whether it was done "
        "is not known; `teemate status` tells what is there",
        {"socket": path, "op": op},
    )


class Session:
    """Who this client is to the broker.  Guarded by the connection's lock."""

    def __init__(self, client: str) -> None:
        self.number = 1
        """Counts the times that a broker did not know this client any more."""
        self.welcomed = False
        """Whether a broker has greeted us."""
        self.kept = False
        """Whether that broker keeps grants across its restarts."""
        self.grace = GREETING_GRACE
        """Seconds after the end of a connection in which the next one is the same client's."""
        self._client = client
        self._token = os.urandom(_TOKEN_SIZE)

    @property
    def can_resume(self) -> bool:
        """Whether it is worth coming back after the connection has ended without a word."""
        return self.kept or not self.welcomed

    def hello(self, *, resume: bool) -> bytes:
        """Return the encoded greeting."""
        if not resume and not self._client:
            return _HELLO + self._token
        args: dict[str, object] = {"version": PROTOCOL_VERSION, "counters": True}
        if self._client:
            args["client"] = self._client
        args["resume" if resume else "session"] = self._token
        return wire.encode({"id": 0, "op": "hello", "args": args})

    def welcome(self, ok: Mapping[str, Any]) -> None:
        """Take what the broker's greeting says of the next one."""
        token = ok.get("token")
        self.welcomed = True
        self.kept = isinstance(token, bytes)
        if isinstance(token, bytes):
            self._token = token
            self.grace = float(ok.get("resume_grace", GREETING_GRACE))

    def over(self) -> EnclaveLost:
        """Return the error for what belongs to a session that the broker does not know any more."""
        return EnclaveLost(
            "the broker came back without this grant (it had lost its state, or this process was away for "
            f"longer than resume_grace = {self.grace:g} s): attach again",
            {"resume_grace": self.grace},
        )


class Absence:
    """The time from the end of one connection until the next one has been greeted.

    Only the thread that reads changes it.
    """

    def __init__(self, grace: float, before: Absence | None) -> None:
        now = time.monotonic()
        self.grace = grace
        self.deadline = now + grace
        self.next_try = now
        self.over: float | None = None
        """When (monotonic) we were greeted again."""
        self.dialled = False
        """Whether a connection is there that waits for its greeting."""
        self.refusal: Error | None = None
        """What the broker said when it had no room for us."""
        self.reason = "the connection ended"
        self._pause = FIRST_PAUSE
        if before is not None and before.over is not None and now - before.over < SETTLED:
            # A broker that greets and ends at once is not asked faster than one that does not answer.
            self._pause = before._pause
            self.failed(self.reason)

    def failed(self, reason: str) -> None:
        """Note that a try has failed."""
        self.dialled = False
        self.reason = reason
        self.next_try = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def dial(self, path: str, hello: bytes) -> socket.socket:
        """Connect and send the greeting.

        Never waits: a socket whose queue is full while no broker accepts is tried again later.

        Raises
        ------
        OSError
            Of the connect or the send.

        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.setblocking(False)
            sock.connect(path)
            wire.send(sock, hello)
            sock.setblocking(True)
        except BaseException:
            sock.close()
            raise
        return sock

    def in_vain(self, path: str, *, greeted: bool) -> ConnectionLost:
        """Return the error for an absence that is given up."""
        if greeted:
            why = f"the broker at {path} did not come back within resume_grace = {self.grace:g} s"
        else:
            why = f"the broker at {path} ended before it had greeted us, and none took its place"
        last = self.reason if self.refusal is None else self.refusal.message
        return ConnectionLost(
            f"{why} (last try: {last}): see its log, start it, then connect and attach again",
            {"socket": path, "resume_grace": self.grace},
        )
