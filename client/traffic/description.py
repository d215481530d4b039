"""What a message is: the one description that `teemate monitor`, `proxy` and `decode` show.

A :class:`Conversation` follows a connection and finds out of each message what alone it does not say:
which operation an answer is of, how long it took, which enclave a grant's number stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple, TypeGuard, final

from teemate.errors import ProtocolError
from teemate.traffic.concealing import is_secret
from teemate.traffic.diagnostic import printable, text, write
from teemate.wire import decode_trusted

__all__ = [
    "BROKER",
    "CLIENT",
    "Conversation",
    "Described",
    "Facts",
    "Fd",
    "Filter",
    "Peer",
    "clock",
    "parse_event",
]

CLIENT, BROKER = "client", "broker"
ANY = "any"
"""Stands for every error in a :class:`Filter`."""
_REMEMBERED = 4096
"""Requests without an answer, and grants, of one connection: it may make up more than anybody looks at."""
_LONGEST_NAME = 64
"""Characters of an operation, enclave or code that somebody made up."""
_LONGEST_BYTES = 64
"""Longer byte strings are shown by their beginning."""


class Peer(NamedTuple):
    """The process at the client's end, as the kernel tells it; `name` is what it calls itself."""

    pid: int
    uid: int
    cgroup: str
    command: str
    name: str = ""

    def __str__(self) -> str:
        called = self.name or self.command or "no name"
        command = f" ({self.command})" if self.name and self.command != self.name else ""
        where = f", {printable(self.cgroup)}" if self.cgroup else ""
        return f"{text(called)[1:-1]}{text(command)[1:-1]}, pid {self.pid}, uid {self.uid}{where}"

    @classmethod
    def parse(cls, untrusted: Mapping[str, Any]) -> Peer:
        """Take it out of a recording, or of a broker's answer."""
        pid, uid = _of(int, untrusted, "pid"), _of(int, untrusted, "uid")
        return cls(pid, uid, *(_of(str, untrusted, key) for key in ("cgroup", "command", "name")))


class Fd(NamedTuple):
    """A descriptor on a message: memfd, file, socket, pipe, device, or what the kernel calls it."""

    kind: str
    name: str
    inode: int | None

    def __str__(self) -> str:
        return " ".join(
            part for part in (self.kind, f"{self.inode}" if self.inode is not None else "", self.name) if part
        )

    @classmethod
    def parse(cls, untrusted: object) -> Fd:
        """Take it out of a recording, or of a broker's answer."""
        if not isinstance(untrusted, dict):
            raise ProtocolError("a description of a descriptor is no map")
        inode = untrusted.get("inode")
        kind, name = _of(str, untrusted, "kind"), str(untrusted.get("name", ""))
        return cls(kind, name, inode if isinstance(inode, int) else None)

    def as_map(self) -> dict[str, object]:
        """As recordings and the broker have it."""
        told: dict[str, object] = {"kind": self.kind}
        if self.name:
            told["name"] = self.name
        if self.inode is not None:
            told["inode"] = self.inode
        return told


def _of(kind: type | tuple[type, ...], untrusted: Mapping[str, Any], key: str) -> Any:
    value = untrusted.get(key)
    if not isinstance(value, kind):
        raise ProtocolError(f"a description of a message has no usable {key!r}")
    return value


class Facts(NamedTuple):
    """What the conversation tells of one message."""

    kind: str
    """``request``, ``answer``, ``error``, ``event``, or ``malformed``."""
    op: str = ""
    """Of the request; also of its answer.  An event's name."""
    latency: float | None = None
    """Seconds from the request to this answer."""
    enclave: str = ""
    error: str = ""
    """The code."""
    grant: int | None = None


@final
class Conversation:
    """What was said on one connection so far, as far as later messages refer to it."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[str, float, str]] = {}
        self.grants: dict[int, str] = {}
        """Which enclave each is on."""

    def follow(self, at: float, sender: str, message: Mapping[str, Any]) -> Facts:
        """Return what `message` is, which came at `at` seconds."""
        if sender == CLIENT:
            return self._request(at, message)
        if "event" in message:
            return self._event(message)
        number = message.get("id")
        op, asked_at, enclave = self._asked.pop(number, ("", at, "")) if _is_number(number) else ("", at, "")
        latency = at - asked_at if op else None
        if "error" in message:
            error = message["error"]
            code = error.get("code", "") if isinstance(error, dict) else ""
            return Facts("error", op, latency, enclave, _name(code))
        ok = message.get("ok")
        grant = ok.get("grant") if isinstance(ok, dict) else None
        if op == "attach" and _is_number(grant):
            self._remember(grant, enclave)
        return Facts("answer", op, latency, enclave, "", grant if _is_number(grant) else None)

    def _request(self, at: float, message: Mapping[str, Any]) -> Facts:
        op, number, args = message.get("op"), message.get("id"), message.get("args")
        op = _name(op)
        enclave, grant = "", None
        if isinstance(args, dict):
            named, grant = args.get("enclave", args.get("name")), args.get("grant")
            grant = grant if _is_number(grant) else None
            if isinstance(named, str):
                enclave = _name(named)
            elif grant is not None:
                enclave = self.grants.get(grant, "")
        if _is_number(number):
            if len(self._asked) >= _REMEMBERED:
                del self._asked[next(iter(self._asked))]
            self._asked[number] = (op, at, enclave)
        return Facts("request", op, None, enclave, "", grant)

    def _event(self, message: Mapping[str, Any]) -> Facts:
        grant, enclave = message.get("grant"), message.get("enclave")
        known = self.grants.get(grant, "") if _is_number(grant) else ""
        return Facts(
            "event",
            _name(message["event"]),
            None,
            _name(enclave) if isinstance(enclave, str) else known,
            "",
            grant if _is_number(grant) else None,
        )

    def _remember(self, grant: int, enclave: str) -> None:
        if len(self.grants) >= _REMEMBERED:
            del self.grants[next(iter(self.grants))]
        self.grants[grant] = enclave


def clock(at: float) -> str:
    """Return the time of day here; a recording may have times that no calendar has."""
    try:
        return datetime.fromtimestamp(at).strftime("%H:%M:%S.%f")
    except (ValueError, OverflowError, OSError):
        return f"{at:.6f}"


def _name(untrusted: object) -> str:
    return untrusted[:_LONGEST_NAME] if isinstance(untrusted, str) else ""


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int


def parse_event(untrusted: Mapping[str, Any]) -> list[Described]:
    """Return the messages of a broker's ``traffic`` event."""
    peers = {_of(int, peer, "client"): Peer.parse(peer) for peer in _of(list, untrusted, "peers")}
    messages = _of(list, untrusted, "messages")
    try:
        return [Described.parse(message, peers[message["client"]]) for message in messages]
    except KeyError:
        raise ProtocolError("the broker showed a message of nobody") from None


class Filter(NamedTuple):
    """What somebody wants to see; what is not set does not matter."""

    enclave: str | None = None
    client: int | None = None
    op: str | None = None
    error: str | None = None
    """A code, or :data:`ANY`."""

    def wants(self, client: int, facts: Facts) -> bool:
        """Whether a message of the connection `client` is to be shown."""
        return (
            (self.client is None or client == self.client)
            and (self.enclave is None or facts.enclave == self.enclave)
            and (self.op is None or facts.op == self.op)
            and (self.error is None or facts.error == self.error or (self.error == ANY and facts.error != ""))
        )


class Described(NamedTuple):
    """One message, its secrets taken out."""

    at: float
    """Seconds since 1970."""
    client: int
    """Number of the connection: the broker's own, or a proxy's."""
    peer: Peer
    sender: str
    size: int
    """Bytes, as it was on the wire."""
    facts: Facts
    fds: tuple[Fd, ...]
    message: dict[str, Any] | None
    problem: str = ""
    """Why there is no message: it could not be read."""

    @classmethod
    def parse(cls, untrusted: Mapping[str, Any], peer: Peer) -> Described:
        """Take it out of a broker's ``traffic`` event."""
        data, fds = untrusted.get("message"), untrusted.get("fds", [])
        latency, grant = untrusted.get("latency"), untrusted.get("grant")
        return cls(
            float(_of((int, float), untrusted, "at")),
            _of(int, untrusted, "client"),
            peer,
            _of(str, untrusted, "from"),
            _of(int, untrusted, "size"),
            Facts(
                _of(str, untrusted, "kind"),
                _of(str, untrusted, "op"),
                latency if isinstance(latency, float) else None,
                str(untrusted.get("enclave", "")),
                str(untrusted.get("error", "")),
                grant if _is_number(grant) else None,
            ),
            tuple(Fd.parse(fd) for fd in fds) if isinstance(fds, list) else (),
            decode_trusted(data) if isinstance(data, bytes) else None,
            str(untrusted.get("problem", "")),
        )

    def head(self) -> str:
        """What is said about the message, in one line."""
        facts = self.facts
        arrow = "->" if self.sender == CLIENT else "<-"
        what = f"{text(facts.op)[1:-1]} {facts.kind}".strip()
        told = [f"{clock(self.at)} client {self.client} ({self.peer}) {arrow} {what}"]
        if facts.error:
            told[0] += f" {text(facts.error)[1:-1]}"
        if facts.enclave:
            told.append(f"enclave {text(facts.enclave)[1:-1]}")
        told.append(f"{self.size} bytes")
        if facts.latency is not None:
            told.append(f"after {facts.latency * 1000:.3f} ms")
        if self.fds:
            told.append(f"descriptors: {'; '.join(text(str(fd))[1:-1] for fd in self.fds)}")
        return ", ".join(told)

    def body(self) -> str:
        """The message in diagnostic notation."""
        if self.message is None:
            return f"/ {printable(self.problem)} /"
        return write(self.message, self._show)

    def _show(self, name: str, value: object) -> str | None:
        if is_secret(name, value):
            if isinstance(value, bytes):
                return f"h'{value[:4].hex()}' /secret of {len(value)} bytes/"
            return f"{text(str(value))} /secret/"
        if isinstance(value, bytes) and len(value) > _LONGEST_BYTES:
            return f"h'{value[:8].hex()}' /the first 8 of {len(value)} bytes/"
        note = ""
        if name == "id" and self.sender == BROKER:
            note = self.facts.op
        elif name == "grant" and value == self.facts.grant:
            note = self.facts.enclave
        if not note or not isinstance(value, int):
            return None
        return f"{value} /{text(note)[1:-1].replace('/', '|')}/"

    def as_json(self) -> dict[str, object]:
        """The same for programs; byte strings are hexadecimal."""
        facts = self.facts
        told: dict[str, object] = {
            "time": self.at,
            "client": self.client,
            "peer": self.peer._asdict(),
            "from": self.sender,
            "size": self.size,
            "kind": facts.kind,
            "op": facts.op,
        }
        if facts.latency is not None:
            told["latency"] = facts.latency
        if facts.enclave:
            told["enclave"] = facts.enclave
        if facts.error:
            told["error"] = facts.error
        told["fds"] = [fd.as_map() for fd in self.fds]
        if self.message is None:
            told["problem"] = self.problem
        else:
            told["message"] = plain(self.message)
        return told


def plain(value: object) -> object:
    """Return `value` as JSON can have it."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not math.isfinite(value):
        return write(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return write(value)
