"""A request of a connection until its answer has come, which may be over several sockets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from teemate import wire
from teemate.errors import Error

__all__ = ["GIVE_BACK", "REPEATABLE", "REPLY_TIMEOUT", "Reply", "Request", "Undo", "no_undo"]

REPLY_TIMEOUT = 60.0
"""Seconds that a broker that is there has for an answer, on top of what the request lets it wait."""
GIVE_BACK = frozenset({"slots.release", "detach"})
"""Requests that are made for the broker's sake: they are kept although nobody waits for the answer."""
REPEATABLE = frozenset({"attach", "enclaves", "ping", "clients", "stats"})
"""What may be asked of a broker that knows nothing of this client, though another may have done it."""


class Reply(NamedTuple):
    """An answer; `fds` belong to whoever made the request."""

    ok: dict[str, Any]
    fds: tuple[int, ...]
    session: int
    """The session in which its numbers mean something: see :meth:`Connection.request`."""
    resumes: int
    """How often the connection had been made again when it came."""


Undo = Callable[[Reply], None]
"""Gives back what an answer granted after its caller had gone."""


def no_undo(_reply: Reply) -> None:
    pass


class Request:
    """A request without an answer; all but the constructor under the connection's lock."""

    __slots__ = ("answer", "data", "deadline", "fds", "number", "op", "sent", "session", "undo", "wait")

    def __init__(
        self,
        number: int,
        op: str,
        args: Mapping[str, object] | None,
        *,
        fds: tuple[int, ...] = (),
        wait: float = 0.0,
        session: int | None = None,
        undo: Undo | None = None,
    ) -> None:
        message: dict[str, object] = {"id": number, "op": op}
        if args:
            message["args"] = args
        self.number = number
        self.op = op
        self.data = wire.encode(message)
        self.fds = fds
        """The caller's while it waits, ours once `undo` is set."""
        self.wait = wait
        self.session = session
        self.undo = undo
        """Set when nobody waits for the answer (any more)."""
        self.sent = False
        self.answer: Reply | Error | None = None
        self.start()

    def start(self) -> None:
        """Give the broker its time from now on."""
        self.deadline = time.monotonic() + self.wait + REPLY_TIMEOUT
