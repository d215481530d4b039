"""What the API gives back: frozen values, parsed once from what the broker said.

Named tuples, since they cost nothing to import and a cold attach builds some.  Numbers are
bytes, pages of 4096 bytes or seconds, as each field's line says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from teemate.errors import ProtocolError

__all__ = [
    "Activity",
    "ClientInfo",
    "Drained",
    "EnclaveInfo",
    "EnclaveStatistics",
    "Exit",
    "GrantInfo",
    "Revocation",
    "Segment",
    "SlotCounts",
    "SlotGrant",
    "Undrained",
    "Upgraded",
]


class SlotCounts(NamedTuple):
    """How the slots of one enclave are used."""

    total: int
    free: int
    used: int
    """Assigned, or on their way to or from somebody."""
    withheld: int
    """Kept back until a process that may still have them mapped has ended or said that it has not."""
    quarantined: int
    """Never handed out again."""
    waiting: int
    """Requests that wait for some."""

    @classmethod
    def parse(cls, untrusted: Mapping[str, Any]) -> SlotCounts:
        """Parse the broker's ``slot-counts``."""
        return cls(*[untrusted[field] for field in cls._fields])


class EnclaveInfo(NamedTuple):
    """One enclave that the broker owns, as ``Broker.enclaves()`` lists it."""

    name: str
    generation: int
    """Counts rebuilds from the same image."""
    backend: str
    """``sgx``, or ``sim``: a model that protects nothing."""
    isolation: str
    """What keeps its clients apart: ``none``, ``gate`` or ``fence``."""
    state: str
    """``building``, ``ready``, ``draining``, ``quarantined`` or ``lost``."""
    reason: str | None
    """Why it is not ready."""
    mrenclave: bytes
    mrsigner: bytes
    isvprodid: int
    isvsvn: int
    debug: bool
    sdk: bool
    base: int
    """Address in every process that attaches."""
    size: int
    """Bytes of ELRANGE."""
    pages: int
    """Pages of 4096 bytes that were added to it."""
    owner: int
    """The uid that it belongs to."""
    slots: SlotCounts
    clients: int

    @classmethod
    def parse(cls, untrusted: Mapping[str, Any]) -> EnclaveInfo:
        """Parse the broker's ``enclave-info``."""
        try:
            return cls(
                untrusted["name"],
                untrusted["generation"],
                untrusted["backend"],
                untrusted["isolation"],
                untrusted["state"],
                untrusted.get("reason"),
                untrusted["mrenclave"],
                untrusted["mrsigner"],
                untrusted["isvprodid"],
                untrusted["isvsvn"],
                untrusted["debug"],
                untrusted["sdk"],
                untrusted["base"],
                untrusted["size"],
                untrusted["pages"],
                untrusted["owner"],
                SlotCounts.parse(untrusted["slots"]),
                untrusted["clients"],
            )
        except KeyError as error:
            raise ProtocolError(f"the broker's enclave-info has no {error.args[0]!r}") from None


class Segment(NamedTuple):
    """A run of pages of one type with equal permissions."""

    offset: int
    size: int
    prot: int
    type: int


class SlotGrant(NamedTuple):
    """One slot as the broker hands it out; `key` opens the enclave's gate."""

    slot: int
    tcs: int
    """Offset of the TCS page from the base."""
    generation: int
    key: bytes
    bind: bytes

    def __repr__(self) -> str:
        """Say which slot it is, without the key."""
        return f"SlotGrant(slot={self.slot}, generation={self.generation})"

    @classmethod
    def parse(cls, untrusted: Mapping[str, Any]) -> SlotGrant:
        """Parse the broker's ``slot``."""
        try:
            return cls(
                untrusted["slot"],
                untrusted["tcs"],
                untrusted["generation"],
                untrusted["key"],
                untrusted["bind"],
            )
        except KeyError as error:
            raise ProtocolError(f"the broker's slot has no {error.args[0]!r}") from None


class Exit(NamedTuple):
    """How a raw entry ended: the registers at EEXIT."""

    rdi: int
    rsi: int
    rdx: int
    r8: int
    r9: int
    function: int
    """The leaf that ended it: 4 (EEXIT)."""


class GrantInfo(NamedTuple):
    """What one client holds on one enclave."""

    grant: int
    enclave: str
    slots: tuple[int, ...]


class Activity(NamedTuple):
    """What a client does.  All but `held` is its own claim, and None where it makes none."""

    held: float
    """Slot time in seconds: by the broker's clock, from each assignment until the slot was back."""
    calls: int | None
    """Calls that have ended, since somebody looked for the first time."""
    inside: float | None
    """Seconds in them, of all threads together."""
    running: int | None
    """Threads that are in one now."""

    @classmethod
    def parse(cls, untrusted: Mapping[str, Any]) -> Activity:
        """Parse the broker's ``activity``."""
        return cls(
            untrusted["held"], untrusted.get("calls"), untrusted.get("inside"), untrusted.get("running")
        )


class ClientInfo(NamedTuple):
    """One connected process, as administrators see it."""

    client: int
    name: str
    pid: int
    uid: int
    gid: int
    cgroup: str
    connected: float
    """Seconds since it connected."""
    requests: int
    grants: tuple[GrantInfo, ...]
    activity: Activity | None = None
    """Where it was asked for."""

    @classmethod
    def parse(cls, untrusted: Mapping[str, Any]) -> ClientInfo:
        """Parse the broker's ``client-info``."""
        try:
            grants = tuple(
                GrantInfo(grant["grant"], grant["enclave"], tuple(grant["slots"]))
                for grant in untrusted["grants"]
            )
            told = untrusted.get("activity")
            activity = None if told is None else Activity.parse(told)
            return cls._make([*(untrusted[field] for field in cls._fields[:-2]), grants, activity])
        except KeyError as error:
            raise ProtocolError(f"the broker's client-info has no {error.args[0]!r}") from None


class Revocation(NamedTuple):
    """What a revocation reached."""

    grants: int
    cleared: int
    """Slots whose keys no longer open the gate and that are as new."""
    quarantined: int
    """Slots that are never handed out again, since they could not be repaired."""
    leaked: int
    """Slots whose holder neither ended nor acknowledged that it unmapped them; no key opens them."""
    busy: int
    """Of the leaked ones: those in which a thread of the holder runs still; it never gets a result."""


class Drained(NamedTuple):
    """How far the draining of one enclave came until its deadline."""

    enclave: str
    held: int
    """Grants that were held when it began."""
    revoked: int
    """Of those, how many were taken back at the deadline."""
    left: int
    """Of those, how many are held still."""
    leaked: int
    """Slots of revoked grants that their holders can still map."""
    emptied: bool
    """Whether the enclave was taken down, when the whole host was drained."""

    @classmethod
    def parse(cls, untrusted: Mapping[str, Any]) -> Drained:
        """Parse the broker's ``drained``."""
        return cls(
            untrusted["enclave"],
            untrusted["held"],
            untrusted["revoked"],
            untrusted["left"],
            untrusted["leaked"],
            untrusted.get("emptied", False),
        )


class Undrained(NamedTuple):
    """What is in use again, and what could not be built again."""

    enclaves: tuple[str, ...]
    failed: dict[str, str]
    """Names with the reason; they stay as they were, for another try."""


class Upgraded(NamedTuple):
    """What took an enclave's place, and what it has of it."""

    generation: int
    mrenclave: bytes
    held: int
    """Grants that were held on the old one when it began."""
    revoked: int
    """Of those, how many were taken back at the deadline."""
    entries: int
    """What was handed over, as the image counts it."""
    bytes: int
    """How many those were, sealed."""

    @classmethod
    def parse(cls, untrusted: Mapping[str, Any]) -> Upgraded:
        """Parse the broker's ``upgrade-ok``."""
        return cls(*[untrusted[field] for field in cls._fields])


class EnclaveStatistics(NamedTuple):
    """What one :class:`Enclave` has done in this process."""

    slots: int
    """That this process has, and how many of them no thread has taken."""
    free: int
    calls: int
    """That have ended."""
    pauses: int
    """How often a call came back to Python before it had ended, and went on."""
    ocalls: int
    abandoned: int
    """Calls given up by a time-out, an exception or a cancellation; each cost a slot."""
