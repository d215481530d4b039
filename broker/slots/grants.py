"""What a client holds on one enclave."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import trio

from teemate.broker.policy.limits import Charge

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.enclaves.enclave import Enclave

__all__ = ["Grant", "Outcome", "Waiter"]


@final
@dataclass(eq=False, slots=True)
class Outcome:
    """What became of the slots of a revoked grant, and word when nothing is left to wait for."""

    cleared: int = 0
    quarantined: int = 0
    finished: trio.Event = field(default_factory=trio.Event)


@final
@dataclass(eq=False, slots=True)
class Grant:
    """The alias mapping and the slots; `charges` has one charge per slot that is not back yet."""

    number: int
    client: Client
    enclave: Enclave
    charge: Charge
    charges: dict[int, Charge] = field(default_factory=dict)
    awaited: int = 0
    """Slots that requests of this grant wait for."""
    in_reclaim: int = 0
    """Slots that were given back and that the warden has not finished with."""
    revoked: bool = False
    leaked: bool = False
    """Whether it was revoked and its holder neither ended nor acknowledged in time."""
    over: bool = False
    handed_out: bool = False
    """Whether the client has it, and not only asked for it."""
    outcome: Outcome | None = None
    uncleared: set[int] = field(default_factory=set)
    """Slots that are in quarantine, and whose keys no warden could take away."""

    def give_back(self, index: int) -> bool:
        """The slot is not this grant's any more: its user pays no longer, and its time is counted.

        False when it came back before.
        """
        charge = self.charges.pop(index, None)
        if charge is None:
            return False
        charge.release()
        self.client.slot_seconds += time.monotonic() - self.enclave.slots.slots[index].since
        return True

    @property
    def slots(self) -> list[int]:
        """The slots that the client holds, ascending."""
        return sorted(self.charges)

    @property
    def mapped_still(self) -> bool:
        """Whether its mapping is leaked: revoked, and its holder lives and has not said that it is gone."""
        if not self.leaked:
            return False
        return bool(self.charges) if self.outcome is None else not self.outcome.finished.is_set()

    def settle(self) -> None:
        """Tell who revokes this grant when everything of it is back."""
        if self.outcome is not None and not self.charges and not self.in_reclaim:
            self.outcome.finished.set()


@final
@dataclass(eq=False, slots=True)
class Waiter:
    """A request that waits for slots, and the charges for them; `error` is set when they will not come."""

    charges: list[Charge]
    event: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None
    since: float = field(default_factory=time.monotonic)
