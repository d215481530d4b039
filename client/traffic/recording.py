"""What went through a proxy, in a file: for Wireshark, `teemate decode` and `teemate replay`.

A packet is a message, byte for byte, with pseudonyms in place of its secrets (concealing.py): the file holds
none, and opens nothing.  What is not in a message is in the packet's comments: the first is for people, the
second, JSON, for programs.  A packet without bytes is the beginning or the end of a connection, or a
message that could not be read and is not kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, final

from teemate.errors import Error, ProtocolError
from teemate.traffic.description import BROKER, CLIENT, Conversation, Described, Facts, Fd, Peer
from teemate.traffic.pcapng import Packet, Section, Writer, read
from teemate.wire import decode

__all__ = ["Closed", "Entry", "Opened", "Passed", "Recorder", "Tracker", "create", "read_recording"]

_PROGRAM = "teemate proxy"
_ABOUT = """\
Messages of the protocol between TeeMate's broker and its clients, in CBOR (RFC 8949), one a packet. Their \
schema (RFC 8610) is client/protocol.cddl. Slot keys, tokens and MACs are replaced by pseudonyms of their \
size. To have tshark or Wireshark take the messages apart: \
-o 'uat:user_dlts:"User 0 (DLT=147)","cbor","0","","0",""'"""
_LONGEST_COMMENT = 16000
_NAMED_FDS = 16
"""Of more descriptors on a message only the kinds are kept: their names would not fit into a comment."""


class Opened(NamedTuple):
    """A client has connected."""

    at: float
    connection: int
    peer: Peer

    def __str__(self) -> str:
        return f"client {self.connection} ({self.peer}) has connected"

    def told(self) -> dict[str, object]:
        """For programs."""
        return {"opened": self.peer._asdict()}


class Closed(NamedTuple):
    """A connection has ended; `by` whom."""

    at: float
    connection: int
    by: str

    def __str__(self) -> str:
        return f"client {self.connection}: the {self.by} has ended the connection"

    def told(self) -> dict[str, object]:
        """For programs."""
        return {"closed": self.by}


class Passed(NamedTuple):
    """A message; without `data` it could not be read (`problem`)."""

    at: float
    connection: int
    sender: str
    size: int
    fds: tuple[Fd, ...]
    data: bytes
    problem: str

    @property
    def message(self) -> dict[str, Any] | None:
        """What it says."""
        return decode(self.data) if self.data else None


Entry = Opened | Closed | Passed


@final
class Tracker:
    """Describes what passes, in its order: what was opened, and which answer is to which request."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Peer, Conversation]] = {}

    def describe(self, entry: Entry) -> Described | None:
        """Return the description of a message; None for what is none.

        Raises
        ------
        ProtocolError
            It is on a connection that is not open.

        """
        if isinstance(entry, Opened):
            self._open[entry.connection] = entry.peer, Conversation()
            return None
        if entry.connection not in self._open:
            raise ProtocolError(
                f"the recording has a message of connection {entry.connection}, which is not open"
            )
        peer, conversation = self._open[entry.connection]
        if isinstance(entry, Closed):
            del self._open[entry.connection]
            return None
        message = entry.message
        if message is None:
            facts = Facts("malformed", error="protocol-error")
        else:
            facts = conversation.follow(entry.at, entry.sender, message)
            name = _own_name(message) if facts.op == "hello" else ""
            if name:
                peer = peer._replace(name=name)
                self._open[entry.connection] = peer, conversation
        return Described(
            entry.at,
            entry.connection,
            peer,
            entry.sender,
            entry.size,
            facts,
            entry.fds,
            message,
            entry.problem,
        )


def _own_name(message: dict[str, Any]) -> str:
    args = message.get("args")
    name = args.get("client") if isinstance(args, dict) else None
    return name if isinstance(name, str) else ""


def create(path: str) -> BinaryIO:
    """Return a new file that only its owner may read.

    Raises
    ------
    OSError
        There is one already: a recording is never written over.

    """
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


@final
class Recorder:
    """Writes what passes to `file`, which stays the caller's."""

    def __init__(self, file: BinaryIO, about: str) -> None:
        """`about` says how this was recorded, and whose identity the broker saw."""
        names = ("messages", "connections")
        self._writer = Writer(file, program=_PROGRAM, comments=(_ABOUT, about), names=names)

    def write(self, entry: Entry, described: Described | None) -> None:
        """Write an entry, and what it was described as."""
        told: dict[str, object] = {"connection": entry.connection}
        data, size, inbound = b"", 0, True
        if not isinstance(entry, Passed):
            told |= entry.told()
            line = str(entry)
        else:
            told["from"] = entry.sender
            if entry.fds:
                named, more = entry.fds[:_NAMED_FDS], entry.fds[_NAMED_FDS:]
                told["fds"] = [*(fd.as_map() for fd in named), *({"kind": fd.kind} for fd in more)]
            if entry.problem:
                told["problem"] = entry.problem
            data, size, inbound = entry.data, entry.size, entry.sender == CLIENT
            line = f"{described.head()}\n{described.body()}" if described else ""
        self._writer.packet(
            Packet(entry.at, data, size, inbound, (line[:_LONGEST_COMMENT], json.dumps(told)))
        )


def read_recording(file: BinaryIO) -> Iterator[str | Entry]:
    """Yield what was recorded, in its order; text is what the recording says of itself.

    Raises
    ------
    ProtocolError
        It is damaged, or no recording of ours.

    """
    for item in read(file):
        if isinstance(item, Section):
            if item.program != _PROGRAM:
                raise ProtocolError(f"the recording was made by {item.program!r}, not by {_PROGRAM!r}")
            yield "\n".join(item.comments[1:])
        else:
            yield _entry(item)


def _entry(packet: Packet) -> Entry:
    try:
        told = json.loads(packet.comments[1])
        connection = int(told["connection"])
        if "opened" in told:
            return Opened(packet.at, connection, Peer.parse(told["opened"]))
        if "closed" in told:
            return Closed(packet.at, connection, _side(told["closed"]))
        fds = tuple(Fd.parse(fd) for fd in told.get("fds", []))
        problem = str(told.get("problem", ""))
        entry = Passed(packet.at, connection, _side(told["from"]), packet.size, fds, packet.data, problem)
        if not problem:
            decode(packet.data)
    except Error:
        raise
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"the recording has a packet without what belongs to it: {error!r}") from None
    return entry


def _side(untrusted: object) -> str:
    if untrusted not in (CLIENT, BROKER):
        raise ValueError(untrusted)
    return str(untrusted)
