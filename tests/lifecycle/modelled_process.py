"""A client's process as the broker sees it: a connection, a pidfd, and threads inside an enclave.

Its socket is real and speaks the protocol; its pidfd is the reading end of a pipe, readable once the
process has ended, which is all that the broker asks of a pidfd (and SIGKILL, see `kill_through`).
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from typing import Any

from modelled_enclave import ModelledEnclave, ModelledSlot

from teemate import wire

__all__ = ["Held", "ModelledProcess"]


@dataclass(eq=False)
class Held:
    """A slot that the process was given and has not declared clean since."""

    grant: int
    index: int
    generation: int
    key: bytes


@dataclass(eq=False)
class Reply:
    """What came back to a request."""

    op: str
    args: dict[str, Any]
    ok: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


@dataclass(eq=False, repr=False)
class ModelledProcess:
    """One process; honest ones declare slots clean only when they are."""

    number: int
    uid: int
    enclave: ModelledEnclave
    sock: socket.socket | None = None
    dead: bool = False
    """No thread of it runs any more."""
    ended: bool = False
    """And its pidfd says so."""
    held: dict[int, Held] = field(default_factory=dict)
    keys: list[Held] = field(default_factory=list)
    """Every slot and key that it was ever given."""
    grants: set[int] = field(default_factory=set)
    waiting: dict[int, Reply] = field(default_factory=dict)
    answered: list[Reply] = field(default_factory=list)
    revocations: list[dict[str, Any]] = field(default_factory=list)
    lost: bool = False
    groups: bytes = b""
    """As the kernel tells them (SO_PEERGROUPS)."""
    label: bytes = b""
    """The same (SO_PEERSEC)."""

    def __repr__(self) -> str:
        return f"<process {self.number}>"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """For hypothesis, which would print every field."""
        printer.text(repr(self))

    def __post_init__(self) -> None:
        self.pidfd, self._life = os.pipe2(os.O_CLOEXEC)
        self._request = 0

    # -- the connection ----------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether it can ask for anything."""
        return self.sock is not None and not self.dead

    def connect(self, address: str) -> None:
        """Connect and say hello; the socket is bound to the process's number, by which it is identified."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self.sock.setblocking(False)
        self.sock.bind(f"{address}-{self.number}")
        self.sock.connect(address)
        self.greet()

    def greet(self) -> None:
        """The first request."""
        self.post("hello", version=1, client=f"process {self.number}")

    def post(self, op: str, **args: Any) -> None:
        """Send a request."""
        assert self.sock is not None
        self._request += 1
        self.waiting[self._request] = Reply(op, args)
        self.say(self._request, op, args)

    def say(self, number: int, op: str, args: dict[str, Any]) -> None:
        """Send a message."""
        assert self.sock is not None
        wire.send(self.sock, wire.encode({"id": number, "op": op, "args": args}))

    def hear(self) -> list[Reply]:
        """Take in whatever has come; returns the replies."""
        heard: list[Reply] = []
        while self.sock is not None:
            try:
                packet = wire.receive(self.sock)
            except BlockingIOError:
                break
            except OSError:
                self.disconnect()
                break
            wire.close_all(packet.fds)
            if not packet.data:
                self.disconnect()
                break
            message = wire.decode(packet.data)
            if message.get("event") == "revoked":
                self.revocations.append(message)
            elif message.get("event") == "lost":
                self.lost = True
            elif "id" in message and message["id"] is not None:
                reply = self.waiting.pop(message["id"])
                reply.ok, reply.error = message.get("ok"), message.get("error")
                heard.append(reply)
        self.answered += heard
        return heard

    def disconnect(self) -> None:
        """Close the connection; the process goes on, with what it has mapped."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    # -- its life ------------------------------------------------------------------------

    def die(self) -> None:
        """SIGKILL: all threads stop where they are, descriptors close, mappings go."""
        self.dead = True
        self.disconnect()
        self.held.clear()
        self.waiting.clear()

    def end(self) -> None:
        """The pidfd fires: always the last thing that is seen of a process."""
        if not self.dead:
            self.die()
        self.ended = True
        os.close(self._life)

    def close(self) -> None:
        """Free what the model needs for it."""
        if not self.ended:
            self.end()
        os.close(self.pidfd)

    # -- inside ----------------------------------------------------------------------------

    def slot(self, index: int) -> ModelledSlot:
        """The TCS of that number."""
        return self.enclave.slots[index]

    def uses(self, index: int) -> bool:
        """Whether a thread of it is inside, at the AEP, or in an OCALL of that slot."""
        return self.slot(index).inside is self

    def unused(self, grant: int | None = None) -> list[int]:
        """The slots that it can declare clean."""
        return [
            held.index
            for held in self.held.values()
            if (grant is None or held.grant == grant) and not self.uses(held.index)
        ]
