"""A connection to the broker without anything behind it: what is sent is sent as it is told.

For looking and trying; programs take :func:`teemate.connect`, which attaches, resumes and listens.
"""

from __future__ import annotations

import os
import select
import socket
from types import TracebackType
from typing import Any, Self, final

from teemate import wire
from teemate._connection import DEFAULT_PATH
from teemate.errors import ConnectionLost, from_code

__all__ = ["PlainConnection", "require_no_error"]


def require_no_error(answer: dict[str, Any]) -> None:
    """Raise the error that `answer` is, if it is one."""
    error = answer.get("error")
    if isinstance(error, dict):
        raise from_code(str(error.get("code")), str(error.get("message")), error.get("detail"))


@final
class PlainConnection:
    """One connection; a context manager that ends it."""

    def __init__(self, path: str | None = None, *, patience: float | None = None) -> None:
        """Connect; `path` None takes ``TEEMATE_SOCKET``, or the default.

        `patience`: seconds that sending may take.

        Raises
        ------
        ConnectionLost
            Nobody listens there.

        """
        self.path = path or os.environ.get("TEEMATE_SOCKET") or DEFAULT_PATH
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._socket.settimeout(patience)
        try:
            self._socket.connect(self.path)
        except OSError as error:
            self._socket.close()
            raise ConnectionLost(
                f"no broker answers at {self.path} ({error.strerror or error}): is teemate-broker running, "
                "and is TEEMATE_SOCKET right?",
                {"socket": self.path, "errno": error.errno},
            ) from None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the connection."""
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, for those who wait for several."""
        return self._socket.fileno()

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send one packet; `fds` stay the caller's.

        Raises
        ------
        ConnectionLost

        """
        try:
            wire.send(self._socket, data, fds)
        except OSError as error:
            raise self._broke(error) from None

    def receive(self, patience: float | None = None) -> wire.Packet | None:
        """Return the next packet, empty at the broker's end; None when none came in `patience` seconds.

        Its descriptors are the caller's.
        """
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if patience is not None and not poll.poll(max(0.0, patience) * 1000):
            return None
        try:
            return wire.receive(self._socket)
        except ConnectionResetError:
            # It closed without having read everything; what it said before can still be read.
            return self.receive(patience)
        except OSError as error:
            raise self._broke(error) from None

    def ask(self, op: str, args: dict[str, object], number: int = 0) -> dict[str, Any]:
        """Send a request and return its ``ok``; for when nothing else can come.

        Raises
        ------
        Error
            What the broker answered.

        """
        message: dict[str, object] = {"id": number, "op": op, "args": args}
        self.send(wire.encode(message))
        answer = self.message()
        if answer is None:
            raise self.ended()
        require_no_error(answer)
        ok = answer.get("ok")
        return ok if isinstance(ok, dict) else {}

    def message(self) -> dict[str, Any] | None:
        """Return the next message, None at the broker's end; descriptors that came with it are closed."""
        packet = self.receive()
        assert packet is not None  # without patience there is none left
        wire.close_all(packet.fds)
        return wire.decode_trusted(packet.data) if packet.data else None

    def ended(self) -> ConnectionLost:
        """Return the error for the broker having ended the connection."""
        return ConnectionLost(
            f"the broker at {self.path} ended the connection: see its log", {"socket": self.path}
        )

    def _broke(self, error: OSError) -> ConnectionLost:
        return ConnectionLost(
            f"the connection to {self.path} broke: {error.strerror or error}",
            {"socket": self.path, "errno": error.errno},
        )
