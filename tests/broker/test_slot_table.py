"""The slot table, driven through every order of events that hypothesis can think of."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from teemate.broker.slots.table import SlotState, SlotTable, Ticket

SLOTS = 6
UIDS = st.integers(1, 4)


class Model(RuleBasedStateMachine):
    """A second, naive account of who holds what and who waits, compared after every step.

    The model of fairness: a queue per uid; a share is what is usable over the uids at work.  Whenever
    slots can be given, the oldest request of a uid goes first that stays within its share; when there
    is none, one that does not; between several, that of the uid that was served longest ago (by
    its place in `turn`).
    """

    tickets: Bundle[Ticket] = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(range(SLOTS))
        self.owner: dict[int, int] = {}
        self.counted: dict[int, int] = {}
        self.arming = set(range(SLOTS))
        self.free: set[int] = set()
        self.withheld: set[int] = set()
        self.quarantined: set[int] = set()
        self.queues: dict[int, list[Ticket]] = {}
        self.turn: list[int] = []
        self.grants = 0

    # -- the naive account ---------------------------------------------------------

    def due(self, ticket: Ticket) -> bool:
        at_work = set(self.counted.values()) | set(self.queues) | {ticket.uid}
        share = max(1, (SLOTS - len(self.quarantined)) // len(at_work))
        held = sum(1 for uid in self.counted.values() if uid == ticket.uid)
        return held + ticket.count <= share

    def candidates(self) -> list[Ticket]:
        """Who may be served if it fits, the one whose turn it is first."""
        heads = [self.queues[uid][0] for uid in self.turn]
        return [ticket for ticket in heads if self.due(ticket)] or heads

    def expect_served(self, served: list[Ticket]) -> None:
        for ticket in served:
            fitting = [other for other in self.candidates() if other.count <= len(self.free)]
            assert fitting, "got what nobody could have"
            assert ticket is fitting[0], "another order than by share, and in turn between uids"
            uid = ticket.uid
            self.turn.remove(uid)
            self.queues[uid].pop(0)
            if self.queues[uid]:
                self.turn.append(uid)
            else:
                del self.queues[uid]
            self.take(ticket)

    def take(self, ticket: Ticket) -> None:
        assert ticket.slots is not None
        assert len(set(ticket.slots)) == ticket.count
        for index in ticket.slots:
            assert index in self.free, f"slot {index} was handed out though it was not free"
            self.free.discard(index)
            assert index not in self.owner, f"slot {index} has two holders"
            self.owner[index] = ticket.grant
            self.counted[index] = ticket.uid

    # -- events ----------------------------------------------------------------------

    @rule(target=tickets, uid=UIDS, count=st.integers(0, 4))
    def request(self, uid: int, count: int) -> Ticket:
        self.grants += 1
        ticket = self.table.request(uid, self.grants, count)
        if uid not in self.queues:
            self.queues[uid] = []
            self.turn.append(uid)
        self.queues[uid].append(ticket)
        if ticket.slots is not None:
            first = not count or (self.queues[uid] == [ticket] and count <= len(self.free))
            assert first, "overtook an older one of its user, or got slots that are not there"
            assert (
                not count
                or self.due(ticket)
                or not any(self.due(self.queues[other][0]) for other in self.turn)
            ), "overtook somebody who is entitled"
            self.queues[uid].remove(ticket)
            if not self.queues[uid]:
                del self.queues[uid]
                self.turn.remove(uid)
            self.take(ticket)
        self.expect_served(self.table.serve_waiting())
        return ticket

    @rule(ticket=consumes(tickets))
    def cancel(self, ticket: Ticket) -> None:
        if ticket.slots is not None:
            with pytest.raises(ValueError, match="does not wait"):
                self.table.cancel(ticket)
            return
        self.queues[ticket.uid].remove(ticket)
        if not self.queues[ticket.uid]:
            self.turn.remove(ticket.uid)
            del self.queues[ticket.uid]
        self.expect_served(self.table.cancel(ticket))

    @precondition(lambda self: self.arming)
    @rule(data=st.data())
    def arm(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.arming)))
        self.arming.discard(index)
        self.counted.pop(index, None)
        self.free.add(index)
        wanted = self.table.is_wanted(index)
        served = self.table.armed(index)
        assert wanted == bool(served) or (wanted and self.arming)
        self.expect_served(served)

    @precondition(lambda self: self.owner)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.owner)))
        del self.owner[index]
        self.arming.add(index)
        self.table.returned(index)

    @precondition(lambda self: self.owner)
    @rule(data=st.data())
    def withhold(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.owner)))
        del self.owner[index]
        self.withheld.add(index)
        self.table.withhold(index, "holder lives")

    @precondition(lambda self: self.withheld)
    @rule(data=st.data())
    def holder_ended(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.withheld)))
        self.withheld.discard(index)
        self.arming.add(index)
        self.table.returned(index)

    @precondition(lambda self: len(self.quarantined) < 2)
    @rule(index=st.integers(0, SLOTS - 1))
    def quarantine(self, index: int) -> None:
        if index in self.quarantined:
            with pytest.raises(ValueError, match="quarantined"):
                self.table.quarantine(index, "again")
            return
        for place in (self.arming, self.free, self.withheld):
            place.discard(index)
        self.owner.pop(index, None)
        self.counted.pop(index, None)
        self.quarantined.add(index)
        self.table.quarantine(index, "left interrupted")
        assert all(ticket.count > self.table.usable for ticket in self.table.impossible())

    @precondition(lambda self: self.free or self.quarantined)
    @rule(data=st.data())
    def what_nobody_holds_cannot_come_back(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.free | self.quarantined)))
        with pytest.raises(ValueError, match="cannot become"):
            self.table.returned(index)

    # -- what always holds ---------------------------------------------------------

    @invariant()
    def the_counts_are_right(self) -> None:
        now = self.table.statistics()
        assert now.total == SLOTS
        assert (now.arming, now.free, now.assigned, now.withheld, now.quarantined) == (
            len(self.arming),
            len(self.free),
            len(self.owner),
            len(self.withheld),
            len(self.quarantined),
        )
        assert now.waiting == sum(map(len, self.queues.values()))
        for index, grant in self.owner.items():
            assert self.table.slots[index].state is SlotState.ASSIGNED
            assert self.table.slots[index].grant == grant

    @invariant()
    def nobody_waits_for_what_is_there(self) -> None:
        assert not [ticket for ticket in self.candidates() if ticket.count <= len(self.free)]

    @invariant()
    def what_a_user_gave_back_counts_until_it_is_free(self) -> None:
        for uid in range(1, 5):
            assert self.table.held(uid) == sum(1 for other in self.counted.values() if other == uid)


TestSlotTable = Model.TestCase
TestSlotTable.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_user_with_many_requests_does_not_push_out_a_user_with_one() -> None:
    table = SlotTable(range(1))
    table.armed(0)
    table.request(1, 1, 1)
    many = [table.request(1, 2 + n, 1) for n in range(5)]
    single = table.request(2, 100, 1)
    order = []
    for _ in range(4):
        table.returned(0)
        order += table.armed(0)
    assert order == [many[0], single, many[1], many[2]]


def test_a_large_request_is_not_overtaken_by_small_ones_of_its_own_user() -> None:
    table = table_of(3)
    table.request(1, 1, 3)
    large = table.request(1, 2, 3)
    small = table.request(1, 3, 1)
    assert give_back(table, 0) == []
    assert give_back(table, 1) == []
    assert give_back(table, 2) == [large]
    assert small.slots is None


def test_a_request_within_its_share_is_not_starved_by_small_ones_of_others() -> None:
    """Somebody who gives back and takes again all the time never gets more than a share meanwhile."""
    table = table_of(6)
    held = [table.request(1, n, 1) for n in range(6)]
    large = table.request(2, 10, 3)
    served: list[Ticket] = []
    for round_ in range(6):
        assert held[round_].slots is not None
        held.append(table.request(1, 20 + round_, 1))
        served += give_back(table, held[round_].slots[0])
        if large.slots is not None:
            break
    assert served == [large]


def test_a_hog_that_repeats_large_requests_blocks_nobody() -> None:
    table = table_of(6)
    table.request(1, 1, 2)  # keeps what it has, so that its large requests never fit
    hogs = [table.request(1, 2 + n, 6) for n in range(3)]
    assert table.request(2, 10, 3).slots is not None, "its share is there, whatever others wait for"
    beyond = table.request(2, 11, 1)
    assert beyond.slots is not None, "what nobody can take who is entitled to it is not kept back"
    for hog in hogs:
        assert table.cancel(hog) == []


def test_who_wants_more_than_a_share_does_not_go_before_who_does_not() -> None:
    table = table_of(6)
    first = table.request(1, 1, 6)
    more = table.request(1, 2, 1)
    due = table.request(2, 3, 2)
    assert first.slots is not None
    assert give_back(table, 0) == [], "one is kept for who is entitled to two"
    assert give_back(table, 1) == [due]
    assert more.slots is None
    assert give_back(table, 2) == [more], "nobody is entitled to this one"


def table_of(slots: int) -> SlotTable:
    """A table whose slots are free."""
    table = SlotTable(range(slots))
    for index in range(slots):
        table.armed(index)
    return table


def give_back(table: SlotTable, index: int) -> list[Ticket]:
    """The slot goes the whole way; returns who is served with it."""
    table.returned(index)
    return table.armed(index)


def test_a_slot_is_wanted_when_somebody_who_waits_gets_it_or_its_like() -> None:
    table = table_of(3)
    assert table.request(1, 1, 3).slots is not None
    ticket = table.request(2, 2, 2)
    table.returned(0)
    assert not table.is_wanted(0)
    table.returned(1)
    assert table.is_wanted(0), "with the other one it is"
    assert table.armed(0) == []
    assert table.is_wanted(1)
    assert table.held(1) == 2, "asking changes nothing"
    assert table.armed(1) == [ticket]


def test_what_came_back_last_is_given_first_and_what_nobody_has_had_last() -> None:
    table = SlotTable(range(4))
    for index in range(4):
        table.armed(index)
    assert table.put_ahead() == 3  # of those that nobody has had
    table.put_back(3)
    assert [table.request(1, grant, 1).slots for grant in (1, 2)] == [(0,), (1,)]
    for index in (1, 0):
        table.returned(index)
        table.armed(index)
    assert table.request(2, 3, 1).slots == (0,)
    assert table.put_ahead() == 1
    assert table.request(2, 4, 2).slots == (2, 3)
