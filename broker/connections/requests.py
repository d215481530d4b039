"""What clients ask for: frames and arguments of requests, from untrusted maps to frozen types.

What a client sent is named ``untrusted_…`` until it has its type here.  The formats are those of
``client/protocol.cddl``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

from teemate import errors
from teemate.traffic.description import Filter

__all__ = [
    "Acquire",
    "Answer",
    "Arguments",
    "Attach",
    "Clients",
    "Create",
    "Destroy",
    "Detach",
    "Drain",
    "Hello",
    "Monitor",
    "Nothing",
    "OpenFile",
    "Release",
    "Request",
    "Result",
    "Revoke",
    "Stats",
    "Undrain",
    "Upgrade",
    "parse_request",
]

_MAX_ID = 9007199254740991
_MAX_COUNT = 65535
_MAX_SLOT = 4095
_SIGSTRUCT_SIZE = 1808
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,64}")


class Answer(NamedTuple):
    """A reply's ``ok``, and the descriptors that ride on it (they stay the handler's).

    `after` is called when the reply is on its way: what the client need not wait for.  A `patient`
    reply goes out with the next one, or when the client has sent nothing more.  `undo` is called when
    the descriptors cannot be sent: the client gets an error then.
    """

    ok: Mapping[str, object]
    fds: tuple[int, ...] = ()
    after: Callable[[], None] | None = None
    patient: bool = False
    outcome: dict[str, object] | None = None
    """What is recorded of a request that changes something, where the reply itself is not to be."""
    undo: Callable[[], None] | None = None


Result = Answer | Awaitable[Answer]


@final
@dataclass(frozen=True, slots=True)
class Request:
    """A request whose frame is in order; its arguments are not looked at yet."""

    id: int
    operation: str
    untrusted_args: dict[str, object]


def parse_request(untrusted_message: dict[str, object]) -> Request:
    """Return the frame of a request.

    Raises
    ------
    ProtocolError
        No usable ``id`` or ``op``: there is nothing that a reply could refer to.

    """
    untrusted_id = untrusted_message.get("id")
    if type(untrusted_id) is not int or not 0 <= untrusted_id <= _MAX_ID:
        raise errors.ProtocolError(f"a request has an id from 0 to {_MAX_ID}")
    untrusted_op = untrusted_message.get("op")
    if type(untrusted_op) is not str:
        raise errors.ProtocolError("a request has an op, which is text")
    untrusted_args = untrusted_message.get("args")
    if untrusted_args is None:
        untrusted_args = {}
    if type(untrusted_args) is not dict:
        raise errors.ProtocolError("a request's args are a map")
    return Request(untrusted_id, untrusted_op, untrusted_args)


@final
class Arguments:
    """A request's arguments, taken out one by one with the type that each must have."""

    __slots__ = ("_operation", "_untrusted")

    def __init__(self, operation: str, untrusted_args: dict[str, object]) -> None:
        self._operation = operation
        self._untrusted = untrusted_args

    def _bad(self, key: str, expected: str) -> errors.ProtocolError:
        verb = "has to be" if key in self._untrusted else "is missing: it is"
        return errors.ProtocolError(
            f"{self._operation}: {key} {verb} {expected}", {"operation": self._operation, "argument": key}
        )

    def has(self, key: str) -> bool:
        """Whether the argument is there."""
        return key in self._untrusted

    def uint(self, key: str, maximum: int = _MAX_ID, *, default: int | None = None) -> int:
        """Return a whole number from 0 to `maximum`."""
        value = self._untrusted.get(key, default)
        if type(value) is not int or not 0 <= value <= maximum:
            raise self._bad(key, f"a whole number from 0 to {maximum}")
        return value

    def name(self, key: str) -> str:
        """Return the name of an enclave."""
        value = self._untrusted.get(key)
        if type(value) is not str or not _NAME.fullmatch(value) or len(value.encode()) > 64:
            raise self._bad(key, "text of 1 to 64 bytes")
        return value

    def text(self, key: str, maximum: int, *, default: str = "") -> str:
        """Return text of at most `maximum` bytes, without control characters."""
        value = self._untrusted.get(key, default)
        if type(value) is not str or len(value.encode()) > maximum:
            raise self._bad(key, f"text of at most {maximum} bytes")
        return "".join(char if char.isprintable() else "?" for char in value)

    def flag(self, key: str) -> bool:
        """Return true or false; false unless told."""
        value = self._untrusted.get(key, False)
        if type(value) is not bool:
            raise self._bad(key, "true or false")
        return value

    def seconds(self, key: str) -> float | None:
        """Return a time in seconds that is finite and not negative; None when not told."""
        value = self._untrusted.get(key)
        if value is None and key not in self._untrusted:
            return None
        if type(value) not in (int, float):
            raise self._bad(key, "a number of seconds")
        seconds = float(value)  # type: ignore[arg-type]
        if not math.isfinite(seconds) or seconds < 0:
            raise self._bad(key, "a number of seconds, finite and not negative")
        return seconds

    def blob(self, key: str, size: int) -> bytes:
        """Return exactly `size` bytes."""
        value = self._untrusted.get(key)
        if type(value) is not bytes or len(value) != size:
            raise self._bad(key, f"{size} bytes")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """Return one of `allowed`."""
        value = self._untrusted.get(key, default)
        if type(value) is not str or value not in allowed:
            raise self._bad(key, f"one of {', '.join(allowed)}")
        return value

    def slots(self, key: str) -> tuple[int, ...]:
        """Return the numbers of one or more slots, each once."""
        value = self._untrusted.get(key)
        if (
            type(value) is not list
            or not value
            or not all(type(item) is int and 0 <= item <= _MAX_SLOT for item in value)
            or len(set(value)) != len(value)
        ):
            raise self._bad(key, f"a list of slots, each a whole number from 0 to {_MAX_SLOT} and there once")
        return tuple(value)


# ---- requests with their arguments ------------------------------------------------


@dataclass(frozen=True, slots=True)
class Nothing:
    """No arguments."""

    @classmethod
    def parse(cls, untrusted: Arguments) -> Nothing:
        """Whatever was sent is unknown, and unknown keys are ignored."""
        return cls()


@dataclass(frozen=True, slots=True)
class Hello:
    """Arguments of `hello`."""

    version: int
    client: str
    resume: bytes | None
    session: bytes | None
    counters: bool
    """Whether the client counts its calls in a page that it is sent (claims.py)."""

    @classmethod
    def parse(cls, untrusted: Arguments) -> Hello:
        """Check and convert."""
        return cls(
            version=untrusted.uint("version"),
            client=untrusted.text("client", 64),
            resume=untrusted.blob("resume", 32) if untrusted.has("resume") else None,
            session=untrusted.blob("session", 32) if untrusted.has("session") else None,
            counters=untrusted.flag("counters"),
        )


@dataclass(frozen=True, slots=True)
class Attach:
    """Arguments of `attach`; `wait` is None for as long as the policy allows."""

    enclave: str
    slots: int
    wait: float | None

    @classmethod
    def parse(cls, untrusted: Arguments) -> Attach:
        """Check and convert."""
        return cls(
            untrusted.name("enclave"),
            untrusted.uint("slots", _MAX_COUNT, default=1),
            untrusted.seconds("wait"),
        )


@dataclass(frozen=True, slots=True)
class Acquire:
    """Arguments of `slots.acquire`."""

    grant: int
    count: int
    wait: float | None

    @classmethod
    def parse(cls, untrusted: Arguments) -> Acquire:
        """Check and convert."""
        return cls(
            untrusted.uint("grant"), untrusted.uint("count", _MAX_COUNT, default=1), untrusted.seconds("wait")
        )


@dataclass(frozen=True, slots=True)
class Release:
    """Arguments of `slots.release`."""

    grant: int
    slots: tuple[int, ...]
    clean: bool
    stolen: bool

    @classmethod
    def parse(cls, untrusted: Arguments) -> Release:
        """Check and convert."""
        return cls(
            untrusted.uint("grant"),
            untrusted.slots("slots"),
            untrusted.flag("clean"),
            untrusted.flag("stolen"),
        )


@dataclass(frozen=True, slots=True)
class OpenFile:
    """Arguments of `files.open`."""

    grant: int
    slot: int
    name: str
    writable: bool

    @classmethod
    def parse(cls, untrusted: Arguments) -> OpenFile:
        """Check and convert."""
        return cls(
            untrusted.uint("grant"),
            untrusted.uint("slot", _MAX_SLOT),
            untrusted.name("file"),
            untrusted.flag("writable"),
        )


@dataclass(frozen=True, slots=True)
class Detach:
    """Arguments of `detach`."""

    grant: int
    clean: bool

    @classmethod
    def parse(cls, untrusted: Arguments) -> Detach:
        """Check and convert."""
        return cls(untrusted.uint("grant"), untrusted.flag("clean"))


@dataclass(frozen=True, slots=True)
class Create:
    """Arguments of `create`; the image comes as the message's descriptor."""

    name: str
    sigstruct: bytes
    backend: str
    debug: bool
    owner: int | None

    @classmethod
    def parse(cls, untrusted: Arguments) -> Create:
        """Check and convert."""
        return cls(
            name=untrusted.name("name"),
            sigstruct=untrusted.blob("sigstruct", _SIGSTRUCT_SIZE),
            backend=untrusted.choice("backend", ("auto", "sim", "sgx"), "auto"),
            debug=untrusted.flag("debug"),
            owner=untrusted.uint("owner", 0xFFFFFFFE) if untrusted.has("owner") else None,
        )


@dataclass(frozen=True, slots=True)
class Destroy:
    """Arguments of `destroy`."""

    enclave: str
    force: bool

    @classmethod
    def parse(cls, untrusted: Arguments) -> Destroy:
        """Check and convert."""
        return cls(untrusted.name("enclave"), untrusted.flag("force"))


def _one_or_all(untrusted: Arguments) -> str | None:
    """Return the enclave that is meant, None for `all`; exactly one of the two is given."""
    if untrusted.flag("all") == untrusted.has("enclave"):
        raise errors.ProtocolError("drain and undrain: give either enclave, or all = true")
    return untrusted.name("enclave") if untrusted.has("enclave") else None


@dataclass(frozen=True, slots=True)
class Drain:
    """Arguments of `drain`; `enclave` is None for all of the host's."""

    enclave: str | None
    deadline: float | None
    force: bool
    reason: str

    @classmethod
    def parse(cls, untrusted: Arguments) -> Drain:
        """Check and convert."""
        return cls(
            enclave=_one_or_all(untrusted),
            deadline=untrusted.seconds("deadline"),
            force=untrusted.flag("force"),
            reason=untrusted.text("reason", 256),
        )


@dataclass(frozen=True, slots=True)
class Undrain:
    """Arguments of `undrain`; `enclave` is None for all of the host's."""

    enclave: str | None

    @classmethod
    def parse(cls, untrusted: Arguments) -> Undrain:
        """Check and convert."""
        return cls(_one_or_all(untrusted))


@dataclass(frozen=True, slots=True)
class Upgrade:
    """Arguments of `upgrade`; the image comes as the message's descriptor."""

    enclave: str
    sigstruct: bytes
    deadline: float | None
    force: bool
    lose_state: bool

    @classmethod
    def parse(cls, untrusted: Arguments) -> Upgrade:
        """Check and convert."""
        return cls(
            enclave=untrusted.name("enclave"),
            sigstruct=untrusted.blob("sigstruct", _SIGSTRUCT_SIZE),
            deadline=untrusted.seconds("deadline"),
            force=untrusted.flag("force"),
            lose_state=untrusted.flag("lose_state"),
        )


@dataclass(frozen=True, slots=True)
class Revoke:
    """Arguments of `revoke`: exactly one of `grant`, `client` and `enclave` is given."""

    grant: int | None
    client: int | None
    enclave: str | None
    grace: float | None
    reason: str

    @classmethod
    def parse(cls, untrusted: Arguments) -> Revoke:
        """Check and convert."""
        if sum(untrusted.has(key) for key in ("grant", "client", "enclave")) != 1:
            raise errors.ProtocolError("revoke: name exactly one of grant, client and enclave")
        return cls(
            grant=untrusted.uint("grant") if untrusted.has("grant") else None,
            client=untrusted.uint("client") if untrusted.has("client") else None,
            enclave=untrusted.name("enclave") if untrusted.has("enclave") else None,
            grace=untrusted.seconds("grace"),
            reason=untrusted.text("reason", 256),
        )


@dataclass(frozen=True, slots=True)
class Holders:
    """Arguments of `holders`: slots from the index `first` on, with `calls` the gate's count of each."""

    enclave: str
    first: int
    calls: bool

    @classmethod
    def parse(cls, untrusted: Arguments) -> Holders:
        """Check and convert."""
        return cls(
            untrusted.name("enclave"), untrusted.uint("first", 65535, default=0), untrusted.flag("calls")
        )


@dataclass(frozen=True, slots=True)
class Denials:
    """Arguments of `denials`: those of one user, or all."""

    uid: int | None

    @classmethod
    def parse(cls, untrusted: Arguments) -> Denials:
        """Check and convert."""
        return cls(untrusted.uint("uid", 0xFFFFFFFF) if untrusted.has("uid") else None)


@dataclass(frozen=True, slots=True)
class Stats:
    """Arguments of `stats`: of the users those above a uid, of the enclaves those behind a name."""

    users_after: int | None
    enclaves_after: str | None

    @classmethod
    def parse(cls, untrusted: Arguments) -> Stats:
        """Check and convert."""
        return cls(
            untrusted.uint("users_after") if untrusted.has("users_after") else None,
            untrusted.name("enclaves_after") if untrusted.has("enclaves_after") else None,
        )


@dataclass(frozen=True, slots=True)
class Monitor:
    """Arguments of `monitor`: which messages."""

    filter: Filter

    @classmethod
    def parse(cls, untrusted: Arguments) -> Monitor:
        """Check and convert."""
        return cls(
            Filter(
                enclave=untrusted.name("enclave") if untrusted.has("enclave") else None,
                client=untrusted.uint("client") if untrusted.has("client") else None,
                op=untrusted.text("op", 64) if untrusted.has("op") else None,
                error=untrusted.text("error", 64) if untrusted.has("error") else None,
            )
        )


@dataclass(frozen=True, slots=True)
class Clients:
    """Arguments of `clients`: those with a number above `after`; what they do too with `activity`."""

    after: int
    activity: bool

    @classmethod
    def parse(cls, untrusted: Arguments) -> Clients:
        """Check and convert."""
        return cls(untrusted.uint("after", default=0), untrusted.flag("activity"))
