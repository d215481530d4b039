"""Telling who is where no client has to be: in the warden's own TCSs, or in a neighbour's slot.

Who maps an enclave can enter any of its TCSs and resume any interrupted call; the gate refuses the one,
and the other ends the call.  Neither takes the enclave down: the warden gets through by its other TCS,
and a stolen call is repaired.  But somebody does it on purpose, so the log says whom it can be: every process
that holds a grant, and none else that the broker knows of.  One alone is the culprit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import trio

if TYPE_CHECKING:
    from teemate.broker.enclaves.enclave import Enclave
    from teemate.broker.service import Service
    from teemate.broker.slots.grants import Grant

__all__ = ["IntruderStatistics", "Intruders"]

_QUIET = 10.0
"""Seconds between two records about one enclave: who enters all the time would fill the log."""
_NAMED = 16
"""Processes that a record names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntruderStatistics:
    """Entries that found a warden's TCS busy, calls that somebody else resumed, and records about them."""

    contended: int
    stolen: int
    reported: int


@final
class Intruders:
    """Counts and reports what only a process that means harm does."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._contended = 0
        self._stolen = 0
        self._reported = 0
        self._quiet_until: dict[tuple[str, str], float] = {}

    def contended(self, enclave: Enclave, count: int) -> None:
        """Somebody else was in a TCS of the warden's, so often since it was last asked for something."""
        self._contended += count
        self._report(
            enclave, "warden's TCS entered", None, count=count,
            reason="a process enters the TCSs of the warden, which has to try again or to use its other one",
        )  # fmt: skip

    def stolen(self, grant: Grant, slots: tuple[int, ...]) -> None:
        """The holder of `grant` says that somebody else resumed the call that was interrupted in its slot."""
        self._stolen += 1
        victim = grant.client.identity.pid
        self._report(
            grant.enclave, "slot stolen", victim, grant=grant.number, pid=victim, slots=list(slots),
            reason="its holder says that another process of this enclave resumed the call in it",
        )  # fmt: skip

    def _report(self, enclave: Enclave, event: str, victim: int | None, **facts: object) -> None:
        now = trio.current_time()
        if now < self._quiet_until.get((enclave.name, event), 0.0):
            return
        self._quiet_until[enclave.name, event] = now + _QUIET
        self._reported += 1
        suspects = sorted(pid for pid in self._holders(enclave) if pid != victim)
        culprit = {"culprit": suspects[0]} if len(suspects) == 1 else {"suspects": suspects[:_NAMED]}
        self._service.log.warning(event, enclave=enclave.name, **facts, **culprit)

    def _holders(self, enclave: Enclave) -> set[int]:
        """The processes that got the enclave's descriptor from the broker, as far as it knows of them."""
        clients = list(self._service.clients.values())
        return {
            client.identity.pid
            for client in clients
            if any(grant.enclave is enclave for grant in [*client.grants.values(), *client.withheld])
        }

    def statistics(self) -> IntruderStatistics:
        """What was seen so far."""
        return IntruderStatistics(contended=self._contended, stolen=self._stolen, reported=self._reported)
