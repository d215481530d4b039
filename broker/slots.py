"""Which slot of an enclave is whose: the table alone, without any input or output.

Life of a slot: ``arming`` (the warden scrubs it and gives it a new key) → ``free`` → ``assigned``
→ ``arming`` again, or ``withheld`` while its former holder may still stand at its AEP, or
``quarantined`` for good.

Who asks for more than is free waits in a queue: first come, first served inside a uid, and in
turn between uids, so that a user with many processes does not push out a user with one.  The
request whose turn it is gets its slots all at once; smaller requests behind it do not overtake it,
else a large one could wait for ever.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

__all__ = ["Slot", "SlotState", "SlotStatistics", "SlotTable", "Ticket"]


class SlotState(enum.Enum):
    """Where a slot is in its life."""

    ARMING = "arming"
    FREE = "free"
    ASSIGNED = "assigned"
    WITHHELD = "withheld"
    QUARANTINED = "quarantined"


@final
class Slot:
    """One slot; only the table changes it."""

    __slots__ = ("grant", "index", "reason", "state")

    def __init__(self, index: int) -> None:
        self.index = index
        self.state = SlotState.ARMING
        self.grant: int | None = None
        self.reason = ""


@final
class Ticket:
    """A place in the queue; `slots` is filled when it is served."""

    __slots__ = ("count", "grant", "slots", "uid")

    def __init__(self, uid: int, grant: int, count: int) -> None:
        self.uid = uid
        self.grant = grant
        self.count = count
        self.slots: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotStatistics:
    """How many slots are in which state, and how many requests wait for slots."""

    total: int
    arming: int
    free: int
    assigned: int
    withheld: int
    quarantined: int
    waiting: int


@final
class SlotTable:
    """The slots of one enclave that clients can get; all of them start as ``arming``."""

    def __init__(self, indices: Iterable[int]) -> None:
        self.slots = {index: Slot(index) for index in indices}
        self._counts = dict.fromkeys(SlotState, 0)
        self._counts[SlotState.ARMING] = len(self.slots)
        self._free: deque[int] = deque()
        self._queues: dict[int, deque[Ticket]] = {}
        self._turn: deque[int] = deque()  # uids that wait, the next one first

    @property
    def usable(self) -> int:
        """Slots that are not quarantined: more can never be had at once."""
        return len(self.slots) - self._counts[SlotState.QUARANTINED]

    # -- asking ----------------------------------------------------------------

    def request(self, uid: int, grant: int, count: int) -> Ticket:
        """Ask for `count` slots.  The ticket is served at once when they are free and nobody waits."""
        ticket = Ticket(uid, grant, count)
        if not self._turn and count <= len(self._free):
            self._serve(ticket)
        else:
            queue = self._queues.get(uid)
            if queue is None:
                queue = self._queues[uid] = deque()
                self._turn.append(uid)
            queue.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> list[Ticket]:
        """Leave the queue; returns the tickets that are served now that this one is out of the way."""
        queue = self._queues.get(ticket.uid)
        if ticket.slots is not None or queue is None or ticket not in queue:
            raise ValueError("this ticket does not wait")
        queue.remove(ticket)
        if not queue:
            del self._queues[ticket.uid]
            self._turn.remove(ticket.uid)
        return self._serve_waiting()

    def waiting(self) -> list[Ticket]:
        """Return the tickets that wait, in no particular order."""
        return [ticket for queue in self._queues.values() for ticket in queue]

    def impossible(self) -> list[Ticket]:
        """Return the waiting tickets that ask for more than is usable; the caller cancels them."""
        usable = self.usable
        return [ticket for ticket in self.waiting() if ticket.count > usable]

    # -- life of a slot ----------------------------------------------------------

    def armed(self, index: int) -> list[Ticket]:
        """The slot has a new key: it is free.  Returns the tickets that are served with it."""
        self._move(index, SlotState.FREE, SlotState.ARMING)
        self._free.append(index)
        return self._serve_waiting()

    def returned(self, index: int) -> None:
        """The holder gave the slot back, or has ended: the warden gets it."""
        self._move(index, SlotState.ARMING, SlotState.ASSIGNED, SlotState.WITHHELD)

    def withhold(self, index: int, reason: str) -> None:
        """The holder's process may still use the slot, though it has no right to any more."""
        self._move(index, SlotState.WITHHELD, SlotState.ASSIGNED)
        self.slots[index].reason = reason

    def quarantine(self, index: int, reason: str) -> None:
        """Never hand this slot out again."""
        if self.slots[index].state is SlotState.FREE:
            self._free.remove(index)
        self._move(
            index,
            SlotState.QUARANTINED,
            *(state for state in SlotState if state is not SlotState.QUARANTINED),
        )
        self.slots[index].reason = reason

    def _move(self, index: int, new: SlotState, *expected: SlotState) -> None:
        slot = self.slots[index]
        if slot.state not in expected:
            raise ValueError(f"slot {index} is {slot.state.value}, cannot become {new.value}")
        self._counts[slot.state] -= 1
        self._counts[new] += 1
        slot.state = new
        slot.reason = ""
        if new is not SlotState.WITHHELD:
            slot.grant = None

    # -- serving ---------------------------------------------------------------

    def _serve(self, ticket: Ticket) -> None:
        ticket.slots = tuple(self._free.popleft() for _ in range(ticket.count))
        for index in ticket.slots:
            self._move(index, SlotState.ASSIGNED, SlotState.FREE)
            self.slots[index].grant = ticket.grant

    def _serve_waiting(self) -> list[Ticket]:
        served = []
        while self._turn:
            uid = self._turn[0]
            queue = self._queues[uid]
            if queue[0].count > len(self._free):
                break
            ticket = queue.popleft()
            self._serve(ticket)
            served.append(ticket)
            self._turn.popleft()
            if queue:
                self._turn.append(uid)
            else:
                del self._queues[uid]
        return served

    def statistics(self) -> SlotStatistics:
        """The table at this moment."""
        counts = self._counts
        return SlotStatistics(
            total=len(self.slots),
            arming=counts[SlotState.ARMING],
            free=counts[SlotState.FREE],
            assigned=counts[SlotState.ASSIGNED],
            withheld=counts[SlotState.WITHHELD],
            quarantined=counts[SlotState.QUARANTINED],
            waiting=sum(len(queue) for queue in self._queues.values()),
        )
