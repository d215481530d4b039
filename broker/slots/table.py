"""Which slot of an enclave is whose: the table alone, without any input or output.

Life of a slot: ``arming`` (the warden scrubs it and gives it a new key) → ``free`` → ``assigned``, maybe by
way of ``ahead`` (the attendant may give it to somebody at any moment: attendant.py) → ``arming`` again, or
``withheld`` while its former holder may still stand at its AEP, or
``quarantined`` for good.

Who asks for more than is free waits in a queue: first come, first served inside a uid.  Between
uids one rule holds: **while others want slots, nobody gets more than an equal share**.

A uid's *share* is the usable slots divided by the uids that hold some or wait for some.  It *holds*
what is assigned to it, what is withheld because of it, and what it gave back until that is armed
again.  A request that fits into its uid's share is *due*.  Slots go to the due requests first, in
turn between uids, and one that does not fit yet holds back no other due one.  Only when none is due
do slots go to those that want more than their share, in turn, to whoever fits.

Why nobody who stays within a share starves: what the others are given while a due request waits
lies within their shares, so apart from what they had before they cannot hold more than all other
shares together, and the slots of this share come free without anybody reserving them.  That is why
what a uid gives back counts as its own until it is free: else somebody who returns and
takes slots quickly could keep a larger due request waiting with what is being scrubbed.

Why a hog gains nothing: a request for more than the share, however large, however long it may wait
and however often it is repeated, blocks no slot for anybody else, and being turned down or timing out
puts no successor in front of the others.  The price is that while several uids are at work, a
request for more than a share may see `Busy` though its wait was long; alone, a uid's share is
everything, and its large requests are not overtaken by its small ones.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

__all__ = ["Slot", "SlotState", "SlotStatistics", "SlotTable", "Ticket"]


class SlotState(enum.Enum):
    """Where a slot is in its life."""

    ARMING = "arming"
    FREE = "free"
    AHEAD = "ahead"
    """Free as well, for all who look; nobody waits for slots while there are such ones."""
    ASSIGNED = "assigned"
    WITHHELD = "withheld"
    QUARANTINED = "quarantined"

    @property
    def shown(self) -> str:
        """As everybody but the attendant has it."""
        return "free" if self is SlotState.AHEAD else str(self.value)


_HELD = frozenset({SlotState.ASSIGNED, SlotState.WITHHELD})


@final
class Slot:
    """One slot; only the table changes it."""

    __slots__ = ("former", "grant", "index", "known", "reason", "since", "state", "uid")

    def __init__(self, index: int) -> None:
        self.index = index
        self.state = SlotState.ARMING
        self.grant: int | None = None
        self.uid: int | None = None
        """Whom it counts for: its holder, then its last one until it is armed again."""
        self.former: int | None = None
        """Whose it was when it was put into quarantine."""
        self.known = False
        """Whether it has had a holder: its memory is warm then, and something may be ready in it."""
        self.reason = ""
        self.since = 0.0
        """When it was assigned."""


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
    """How many slots are in which state, and how many requests wait for slots.

    `held_seconds`: how long all slots together were somebody's, from each assignment until the slot was given
    back or its holder had ended, counted since this table was made.
    """

    total: int
    arming: int
    free: int
    assigned: int
    withheld: int
    quarantined: int
    waiting: int
    held_seconds: float


@final
class SlotTable:
    """The slots of one enclave that clients can get; all of them start as ``arming``."""

    def __init__(self, indices: Iterable[int], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.call_in: Callable[[], None] = lambda: None
        """Called when slots that are ahead are wanted here: afterwards there are none."""
        self.on_move: Callable[[], None] = lambda: None
        """Called when a slot has changed."""
        self._held_seconds = 0.0  # of the slots in use, less their clocks at their assignment
        self.slots = {index: Slot(index) for index in indices}
        self._counts = dict.fromkeys(SlotState, 0)
        self._counts[SlotState.ARMING] = len(self.slots)
        self._free: deque[int] = deque()  # the next one first: what came back last, then those nobody has had
        self._queues: dict[int, deque[Ticket]] = {}
        self._turn: deque[int] = deque()  # uids that wait, the next one first
        self._held: dict[int, int] = {}

    @property
    def usable(self) -> int:
        """Slots that are not quarantined: more can never be had at once."""
        return len(self.slots) - self._counts[SlotState.QUARANTINED]

    @property
    def in_use(self) -> int:
        """Slots that somebody has, or may still use though they were taken back."""
        return self._counts[SlotState.ASSIGNED] + self._counts[SlotState.WITHHELD]

    @property
    def arming(self) -> int:
        """Slots that the warden works on."""
        return self._counts[SlotState.ARMING]

    # -- asking ----------------------------------------------------------------

    def request(self, uid: int, grant: int, count: int) -> Ticket:
        """Ask for `count` slots.  The ticket is served at once when they are free and it is its turn.

        :meth:`serve_waiting` is to be called then: a new user makes the shares of the others smaller.
        """
        ticket = Ticket(uid, grant, count)
        if count > len(self._free) and self._counts[SlotState.AHEAD]:
            self.call_in()
        queue = self._queues.get(uid)
        if not count or (queue is None and count <= len(self._free) and self._may_overtake(ticket)):
            self._serve(ticket)
            return ticket
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
        return self.serve_waiting()

    def waiting(self) -> list[Ticket]:
        """Return the tickets that wait, in no particular order."""
        return [ticket for queue in self._queues.values() for ticket in queue]

    def impossible(self) -> list[Ticket]:
        """Return the waiting tickets that ask for more than is usable; the caller cancels them."""
        usable = self.usable
        return [ticket for ticket in self.waiting() if ticket.count > usable]

    # -- after a restart -------------------------------------------------------

    def restore(self, index: int, uid: int, grant: int, withheld: str) -> None:
        """The slot is held as before; `withheld` is the reason when it is not the client's any more."""
        self._move(index, SlotState.ASSIGNED, SlotState.ARMING)
        slot = self.slots[index]
        slot.grant = grant
        self._count_for(slot, uid)
        if withheld:
            self.withhold(index, withheld)

    # -- life of a slot ----------------------------------------------------------

    def armed(self, index: int) -> list[Ticket]:
        """The slot has a new key: it is free.  Returns the tickets that are served with it."""
        self._move(index, SlotState.FREE, SlotState.ARMING)
        self._put_free(index)
        return self.serve_waiting()

    def returned(self, index: int) -> None:
        """The holder gave the slot back, or has ended: the warden gets it."""
        self._move(index, SlotState.ARMING, SlotState.ASSIGNED, SlotState.WITHHELD)

    def withhold(self, index: int, reason: str) -> None:
        """The holder's process may still use the slot, though it has no right to any more."""
        self._move(index, SlotState.WITHHELD, SlotState.ASSIGNED)
        self.slots[index].reason = reason

    def quarantine(self, index: int, reason: str, former: int | None = None) -> None:
        """Never hand this slot out again; `former` says whose it was where an earlier broker put it there."""
        if self.slots[index].state is SlotState.AHEAD:
            self.call_in()
        if self.slots[index].state is SlotState.FREE:
            self._free.remove(index)
        self._move(
            index,
            SlotState.QUARANTINED,
            *(state for state in SlotState if state is not SlotState.QUARANTINED),
        )
        self.slots[index].reason = reason
        if former is not None:
            self.slots[index].former = former

    # -- ahead of any request ------------------------------------------------------

    def put_ahead(self) -> int | None:
        """Let the attendant have a free slot; None when there is none, or somebody waits for slots."""
        if not self._free or self._queues:
            return None
        # What nobody has had is for who asks here, but for the last of it.
        index = self._free.popleft() if self.slots[self._free[0]].known else self._free.pop()
        self._move(index, SlotState.AHEAD, SlotState.FREE)
        return index

    def take_ahead(self, index: int, uid: int, grant: int) -> None:
        """The attendant gave it to `grant`."""
        self._move(index, SlotState.ASSIGNED, SlotState.AHEAD)
        self.slots[index].grant = grant
        self._count_for(self.slots[index], uid)

    def put_back(self, index: int) -> None:
        """The attendant did not give it to anybody, and will not."""
        self._move(index, SlotState.FREE, SlotState.AHEAD)
        self._put_free(index)

    @property
    def ahead(self) -> int:
        """Slots that the attendant has."""
        return self._counts[SlotState.AHEAD]

    def _move(self, index: int, new: SlotState, *expected: SlotState) -> None:
        slot = self.slots[index]
        if slot.state not in expected:
            raise ValueError(f"slot {index} is {slot.state.value}, cannot become {new.value}")
        self._keep_time(slot, new)
        self._counts[slot.state] -= 1
        self._counts[new] += 1
        slot.state = new
        slot.known |= new is SlotState.ASSIGNED
        slot.reason = ""
        if new is not SlotState.WITHHELD:
            slot.grant = None
        if new is SlotState.QUARANTINED:
            slot.former = slot.uid
        if new in (SlotState.FREE, SlotState.QUARANTINED):
            self._count_for(slot, None)
        self.on_move()

    def _put_free(self, index: int) -> None:
        if self.slots[index].known:
            self._free.appendleft(index)
        else:
            self._free.append(index)

    def _keep_time(self, slot: Slot, new: SlotState) -> None:
        was_held, is_held = slot.state in _HELD, new in _HELD
        if is_held and not was_held:
            slot.since = self._clock()
            self._held_seconds -= slot.since
        elif was_held and not is_held:
            self._held_seconds += self._clock()

    def _count_for(self, slot: Slot, uid: int | None) -> None:
        if slot.uid is not None:
            self._held[slot.uid] -= 1
            if not self._held[slot.uid]:
                del self._held[slot.uid]
        slot.uid = uid
        if uid is not None:
            self._held[uid] = self._held.get(uid, 0) + 1

    # -- serving ---------------------------------------------------------------

    def share(self, newcomer: int | None = None) -> int:
        """Return the slots that each uid at work is entitled to, `newcomer` counted as one of them."""
        at_work = self._held.keys() | self._queues.keys()
        users = len(at_work) + (newcomer is not None and newcomer not in at_work)
        return max(1, self.usable // max(1, users))

    def held(self, uid: int) -> int:
        """Return how many slots count for `uid`."""
        return self._held.get(uid, 0)

    def _due(self, ticket: Ticket, share: int) -> bool:
        return self.held(ticket.uid) + ticket.count <= share

    def _may_overtake(self, ticket: Ticket) -> bool:
        """Whether a new request that fits goes before all that wait, none of which can be served now."""
        if not self._turn:
            return True
        share = self.share(ticket.uid)
        if self._due(ticket, share):
            return True
        return not any(self._due(queue[0], share) for queue in self._queues.values())

    def _serve(self, ticket: Ticket) -> None:
        ticket.slots = tuple(self._free.popleft() for _ in range(ticket.count))
        for index in ticket.slots:
            self._move(index, SlotState.ASSIGNED, SlotState.FREE)
            self.slots[index].grant = ticket.grant
            self._count_for(self.slots[index], ticket.uid)

    def serve_waiting(self) -> list[Ticket]:
        """Serve whoever can be served now; returns their tickets."""
        served = []
        while (uid := self._next(len(self._free))) is not None:
            queue = self._queues[uid]
            ticket = queue.popleft()
            self._serve(ticket)
            served.append(ticket)
            self._turn.remove(uid)
            if queue:
                self._turn.append(uid)
            else:
                del self._queues[uid]
        return served

    def is_wanted(self, index: int) -> bool:
        """Whether somebody would be served at once if this slot, and all that are armed now, came free."""
        if not self._turn:
            return False
        slot = self.slots[index]
        former = slot.uid
        self._count_for(slot, None)
        uid = self._next(len(self._free) + self.arming)
        self._count_for(slot, former)
        return uid is not None

    def _next(self, free: int) -> int | None:
        """Return the uid whose oldest request is served next with so many slots, None when there is none."""
        if not self._turn:
            return None
        share = self.share()
        heads = [self._queues[uid][0] for uid in self._turn]
        due = [ticket for ticket in heads if self._due(ticket, share)]
        for ticket in due or heads:
            if ticket.count <= free:
                return ticket.uid
        return None

    def counts(self) -> tuple[int, int, int, int, int, int]:
        """All, free, used, withheld and quarantined slots, and requests that wait: ``slot-counts``'s order.

        Asked for whenever a slot moves: :meth:`statistics` would take longer than all the rest of that.
        """
        counts = self._counts
        free = counts[SlotState.FREE] + counts[SlotState.AHEAD]
        used = counts[SlotState.ASSIGNED] + counts[SlotState.ARMING]
        waiting = sum(map(len, self._queues.values()))
        return (
            len(self.slots), free, used, counts[SlotState.WITHHELD], counts[SlotState.QUARANTINED], waiting
        )  # fmt: skip

    def statistics(self) -> SlotStatistics:
        """The table at this moment."""
        total, free, _, withheld, quarantined, waiting = self.counts()
        return SlotStatistics(
            total=total,
            arming=self.arming,
            free=free,
            assigned=self._counts[SlotState.ASSIGNED],
            withheld=withheld,
            quarantined=quarantined,
            waiting=waiting,
            held_seconds=self._held_seconds + self.in_use * self._clock(),
        )
