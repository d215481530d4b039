"""Plays the clients' side of a recording against a broker, and compares what that answers.

In the recorded order: what came from a client is sent, and what came from the broker is waited for.  What
is another one each time is translated: numbers of grants, clients and slots, and secrets, which a recording
knows by pseudonyms only, are those that this broker has given out where the recorded one gave out theirs.
What moves by itself is not compared (:data:`MOVING`).  Nothing is mapped or entered.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, final

from teemate import wire
from teemate.errors import ConnectionLost, ProtocolError
from teemate.traffic.concealing import is_secret
from teemate.traffic.description import CLIENT, Fd
from teemate.traffic.descriptors import describe_fd
from teemate.traffic.diagnostic import write
from teemate.traffic.plain import PlainConnection
from teemate.traffic.recording import Closed, Entry, Opened, Passed, Tracker

__all__ = ["MOVING", "Difference", "Outcome", "only_entries", "replay"]

MOVING = {
    **dict.fromkeys(("id", "grant", "client", "slot", "tcs", "base"), "numbers that a broker chooses"),
    **dict.fromkeys(("pid", "cgroup", "name"), "who asks"),
    **dict.fromkeys(("connected", "waited", "ago", "deadline"), "times"),
    **dict.fromkeys(
        ("free", "used", "withheld", "waiting", "cleared", "clients", "requests"), "counts that move"
    ),
    "stats": "counts that move",
}
"""What is not compared, by its key, and why.  A list of `clients` is, and a `name` beside `mrenclave`."""
_UNREADABLE = b"\xff"
"""Sent for what could not be read, and so was not kept."""
_DIGITS = re.compile(r"\d+")


class Difference(NamedTuple):
    """What this broker did otherwise."""

    at: float
    """When it was recorded."""
    connection: int
    where: str
    what: str


class Outcome(NamedTuple):
    """How a recording was played."""

    sent: int
    compared: int
    skipped: tuple[str, ...]
    """Requests that could not be sent, and why."""
    differences: tuple[Difference, ...]


class _Said(NamedTuple):
    message: dict[str, Any]
    fds: tuple[Fd, ...]


@final
class _Line:
    """A connection to the broker, and what came that nobody has asked for yet."""

    def __init__(self, path: str | None, patience: float) -> None:
        self.connection = PlainConnection(path, patience=patience)
        self.skipped: set[object] = set()
        self.asked: dict[object, tuple[str, int | None]] = {}
        """By id: the operation, and the recorded number of the grant that it was about."""
        self.unreadable = False
        self.ended = False
        self.answers: list[_Said] = []
        self.events: list[_Said] = []
        self._patience = patience

    def wait_for(self, message: dict[str, Any]) -> _Said | None:
        """Return what corresponds to a recorded message; None when it does not come."""
        event = message.get("event")
        waiting = self.answers if event is None else self.events
        while True:
            for said in waiting:
                if said.message.get("event") == event and said.message.get("id") == message.get("id"):
                    waiting.remove(said)
                    return said
            if not self._receive():
                return None

    def wait_for_end(self) -> bool:
        """Whether the broker ends the connection."""
        while not self.ended:
            if not self._receive():
                break
        return self.ended

    def _receive(self) -> bool:
        if self.ended:
            return False
        packet = self.connection.receive(self._patience)
        if packet is None:
            return False
        try:
            if not packet.data:
                self.ended = True
                return False
            message = wire.decode_trusted(packet.data)
            said = _Said(message, tuple(describe_fd(fd) for fd in packet.fds))
        finally:
            wire.close_all(packet.fds)
        (self.events if "event" in message else self.answers).append(said)
        return True


def replay(
    entries: Iterable[Entry], path: str | None, *, images: Sequence[str] = (), patience: float = 60.0
) -> Outcome:
    """Play `entries` against the broker at `path`; `images` are what rides on requests that take a file.

    Raises
    ------
    ConnectionLost
        Nobody listens there.
    OSError
        An image cannot be opened.

    """
    player = _Player(path, images, patience)
    with ExitStack() as stack:
        stack.callback(player.close)
        for entry in entries:
            player.play(entry)
    return player.outcome()


@final
class _Player:
    def __init__(self, path: str | None, images: Sequence[str], patience: float) -> None:
        self._path = path
        self._images = list(images)
        self._patience = patience
        self._tracker = Tracker()
        self._lines: dict[int, _Line] = {}
        self._numbers: dict[tuple[str, int], int] = {}
        """Recorded number -> this broker's: grants, clients."""
        self._slots: dict[tuple[int, int], int] = {}
        """Recorded grant and slot -> this broker's slot."""
        self._secrets: dict[bytes, bytes] = {}
        """Pseudonym -> what this broker, or this replay, has in its place."""
        self._sent = 0
        self._compared = 0
        self._skipped: list[str] = []
        self._differences: list[Difference] = []

    def outcome(self) -> Outcome:
        return Outcome(self._sent, self._compared, tuple(self._skipped), tuple(self._differences))

    def close(self) -> None:
        for line in self._lines.values():
            line.connection.close()

    def play(self, entry: Entry) -> None:
        described = self._tracker.describe(entry)
        if isinstance(entry, Opened):
            self._lines[entry.connection] = _Line(self._path, self._patience)
            return
        line = self._lines[entry.connection]
        if isinstance(entry, Closed):
            self._close(entry, line)
        elif entry.sender == CLIENT:
            self._send(entry, line)
        elif described is not None and described.message is not None:
            self._compare(entry, line, described.message)

    def _differ(self, entry: Entry, where: str, what: str) -> None:
        self._differences.append(Difference(entry.at, entry.connection, where, what))

    def _close(self, entry: Closed, line: _Line) -> None:
        if entry.by != CLIENT and not line.wait_for_end():
            self._differ(entry, "the end", "the broker ended the connection, and does not now")
        for said in line.events:
            self._differ(entry, f"event {said.message['event']}", "was not recorded, and came now")
        line.connection.close()
        del self._lines[entry.connection]

    # -- to the broker -----------------------------------------------------------------

    def _send(self, entry: Passed, line: _Line) -> None:
        message = entry.message
        if message is None:
            line.unreadable = True
            self._transmit(entry, line, _UNREADABLE, ())
            return
        number, args = _id(message), message.get("args")
        grant = args.get("grant") if isinstance(args, dict) else None
        line.asked[number] = str(message.get("op")), grant if isinstance(grant, int) else None
        fds: list[int] = []
        with ExitStack() as stack:
            for fd in entry.fds:
                if not self._images:
                    line.skipped.add(number)
                    self._skipped.append(
                        f"{message.get('op')}: it came with a {fd.kind}; say which with --image"
                    )
                    return
                fds.append(os.open(self._images.pop(0), os.O_RDONLY | os.O_CLOEXEC))
                stack.callback(os.close, fds[-1])
            self._transmit(entry, line, wire.encode_part(self._translate("", message, grant)), tuple(fds))

    def _transmit(self, entry: Passed, line: _Line, data: bytes, fds: tuple[int, ...]) -> None:
        try:
            line.connection.send(data, fds)
        except ConnectionLost as error:
            self._differ(entry, "sending", error.message)
        else:
            self._sent += 1

    def _translate(self, name: str, value: Any, grant: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._translate(str(key), item, grant) for key, item in value.items()}
        if isinstance(value, list):
            return [self._translate(name, item, grant) for item in value]
        if isinstance(value, bytes) and is_secret(name, value):
            if name == "session" and value not in self._secrets:
                self._secrets[value] = os.urandom(len(value))
            return self._secrets.get(value, value)
        if type(value) is int and name == "slots" and isinstance(grant, int):
            return self._slots.get((grant, value), value)
        if type(value) is int:
            return self._numbers.get((name, value), value)
        return value

    # -- from the broker ---------------------------------------------------------------

    def _compare(self, entry: Passed, line: _Line, recorded: dict[str, Any]) -> None:
        number = _id(recorded)
        if number in line.skipped and "event" not in recorded:
            return
        op, grant = line.asked.get(number, ("", None))
        where = f"event {recorded['event']}" if "event" in recorded else f"answer to {op}" if op else "answer"
        said = line.wait_for(recorded)
        if said is None:
            self._differ(entry, where, "was recorded, and does not come now")
            return
        self._compared += 1
        ok = recorded.get("ok")
        if op == "attach" and isinstance(ok, dict):
            grant = ok.get("grant")
        if line.unreadable and recorded.get("id") is None and "error" in recorded:
            # What is wrong with the message that was sent instead is something else.
            recorded = {"error": _code(recorded)}
            said = said._replace(message={"error": _code(said.message)})
        for place, what in self._differing("", recorded, said.message, "", grant):
            self._differ(entry, f"{where}: {place}" if place else where, what)
        kinds, now = [fd.kind for fd in entry.fds], [fd.kind for fd in said.fds]
        if kinds != now:
            self._differ(entry, where, f"came with descriptors {kinds}, and with {now} now")

    def _differing(
        self, name: str, recorded: Any, now: Any, place: str, grant: Any, beside: dict[str, Any] | None = None
    ) -> Iterator[tuple[str, str]]:
        """Yield where and how the two are not the same; learns what stands for what."""
        if isinstance(recorded, dict) and isinstance(now, dict):
            if name == "stats":
                return
            for key in recorded.keys() | now.keys():
                at = f"{place}.{key}" if place else str(key)
                if key not in now:
                    yield at, f"was {_shown(key, recorded[key])}, and is not there now"
                elif key not in recorded:
                    yield at, f"was not there, and is {_shown(key, now[key])} now"
                else:
                    yield from self._differing(key, recorded[key], now[key], at, grant, recorded)
        elif isinstance(recorded, list) and isinstance(now, list):
            if len(recorded) != len(now):
                yield place, f"had {len(recorded)} items, and has {len(now)} now"
            for number, (item, other) in enumerate(zip(recorded, now, strict=False)):
                yield from self._differing(name, item, other, f"{place}[{number}]", grant)
        elif not self._same(name, recorded, now, grant, beside or {}):
            yield place, f"was {_shown(name, recorded)}, and is {_shown(name, now)} now"

    def _same(self, name: str, recorded: Any, now: Any, grant: Any, beside: dict[str, Any]) -> bool:
        if isinstance(recorded, bytes) and isinstance(now, bytes) and is_secret(name, recorded):
            self._secrets[recorded] = now
            return len(recorded) == len(now)
        numbers = type(recorded) is int and type(now) is int
        if numbers and name in ("grant", "client"):
            self._numbers[name, recorded] = now
        elif numbers and name == "slot" and isinstance(grant, int):
            self._slots[grant, recorded] = now
        if numbers and name == "slots":
            return True  # indices: what they were given out as was compared then
        if name == "name" and "mrenclave" in beside:
            return bool(recorded == now)
        if name in MOVING or (name == "generation" and "tcs" in beside):
            kinds = (int, float) if isinstance(recorded, (int, float)) else (type(recorded),)
            return isinstance(now, kinds)
        if name == "message" and isinstance(recorded, str) and isinstance(now, str):
            return _DIGITS.sub("0", recorded) == _DIGITS.sub("0", now)
        return bool(type(recorded) is type(now) and recorded == now)


def _id(message: dict[str, Any]) -> int | None:
    """Return the id, if it is one: what clients send is recorded also when the broker refuses it."""
    number = message.get("id")
    return number if isinstance(number, int) else None


def _code(message: dict[str, Any]) -> object:
    error = message.get("error")
    return error.get("code") if isinstance(error, dict) else None


def _shown(name: str, value: object) -> str:
    def hide(key: str, item: object) -> str | None:
        return "a secret" if is_secret(key, item) else None

    return write(value, hide, name)


def only_entries(items: Iterable[str | Entry]) -> Iterator[Entry]:
    """Leave out what a recording says of itself.

    Raises
    ------
    ProtocolError
        There is nothing else.

    """
    empty = True
    for item in items:
        if not isinstance(item, str):
            empty = False
            yield item
    if empty:
        raise ProtocolError("the recording is empty")
