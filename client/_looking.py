"""What administrators see of slots, of who waits for them, and of denials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from teemate.errors import ProtocolError

__all__ = ["DenialInfo", "Holders", "ProcessInfo", "SlotInfo", "WaitingInfo"]


class ProcessInfo(NamedTuple):
    """A connected process, or one that has left with something withheld."""

    client: int
    name: str
    pid: int
    uid: int
    cgroup: str

    @classmethod
    def parse(cls, untrusted: Mapping[str, Any]) -> ProcessInfo:
        """Take it out of an answer's entry."""
        return cls._make(untrusted[field] for field in cls._fields)


class SlotInfo(NamedTuple):
    """One slot of an enclave, as administrators see it."""

    slot: int
    state: str
    """``arming``, ``free``, ``assigned``, ``withheld`` or ``quarantined``."""
    reason: str
    """Why it is withheld or quarantined; else empty."""
    grant: int | None
    holder: ProcessInfo | None
    """Whose it is, or was when it is withheld."""
    calls: int | None = None
    """How many the enclave's gate has let end in it, ever; None where nobody asked or could tell."""
    former: int | None = None
    """Of one in quarantine, the uid that had it last, if somebody had."""

    @classmethod
    def parse(cls, untrusted: Mapping[str, Any]) -> SlotInfo:
        """Parse the broker's ``slot-info``."""
        try:
            holder = ProcessInfo.parse(untrusted) if "client" in untrusted else None
            return cls(
                untrusted["slot"],
                untrusted["state"],
                untrusted.get("reason", ""),
                untrusted.get("grant"),
                holder,
                untrusted.get("calls"),
                untrusted.get("former"),
            )
        except KeyError as error:
            raise ProtocolError(f"the broker's slot-info has no {error.args[0]!r}") from None


class WaitingInfo(NamedTuple):
    """A request that waits for slots."""

    process: ProcessInfo
    slots: int
    waited: float
    """Seconds."""

    @classmethod
    def parse(cls, untrusted: Mapping[str, Any]) -> WaitingInfo:
        """Parse the broker's ``waiting-info``."""
        try:
            return cls(ProcessInfo.parse(untrusted), untrusted["slots"], untrusted["waited"])
        except KeyError as error:
            raise ProtocolError(f"the broker's waiting-info has no {error.args[0]!r}") from None


class Holders(NamedTuple):
    """Who holds the slots of an enclave, and who waits for some, the next one first."""

    slots: tuple[SlotInfo, ...]
    waiting: tuple[WaitingInfo, ...]


class DenialInfo(NamedTuple):
    """Denials that are alike; `pid` and `ago` are the last one's."""

    uid: int
    pid: int
    cgroup: str
    operation: str
    missing_rule: str
    times: int
    ago: float
    """Seconds."""

    @classmethod
    def parse(cls, untrusted: Mapping[str, Any]) -> DenialInfo:
        """Parse the broker's ``denial-info``."""
        try:
            return cls._make(untrusted[field] for field in cls._fields)
        except KeyError as error:
            raise ProtocolError(f"the broker's denial-info has no {error.args[0]!r}") from None
