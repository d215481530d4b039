"""The slot table, driven through every order of events that hypothesis can think of."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from teemate.broker.slots import SlotState, SlotTable, Ticket

SLOTS = 6
UIDS = st.integers(1, 4)


class Model(RuleBasedStateMachine):
    """A second, naive account of who holds what and who waits, compared after every step.

    The model of fairness: a queue per uid; whenever slots can be given, the uid that was served
    longest ago among those that wait (by its place in `turn`) gets its oldest request, whole.
    """

    tickets: Bundle[Ticket] = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(range(SLOTS))
        self.owner: dict[int, int] = {}
        self.arming = set(range(SLOTS))
        self.free: set[int] = set()
        self.withheld: set[int] = set()
        self.quarantined: set[int] = set()
        self.queues: dict[int, list[Ticket]] = {}
        self.turn: list[int] = []
        self.grants = 0

    # -- the naive account ---------------------------------------------------------

    def expect_served(self, served: list[Ticket]) -> None:
        expected = []
        while self.turn and self.queues[self.turn[0]][0].count <= len(self.free):
            uid = self.turn.pop(0)
            ticket = self.queues[uid].pop(0)
            if self.queues[uid]:
                self.turn.append(uid)
            expected.append(ticket)
            self.take(ticket)
        assert served == expected, "another order than first come first served per uid, in turn between uids"

    def take(self, ticket: Ticket) -> None:
        assert ticket.slots is not None
        assert len(set(ticket.slots)) == ticket.count
        for index in ticket.slots:
            assert index in self.free, f"slot {index} was handed out though it was not free"
            self.free.discard(index)
            assert index not in self.owner, f"slot {index} has two holders"
            self.owner[index] = ticket.grant

    # -- events ----------------------------------------------------------------------

    @rule(target=tickets, uid=UIDS, count=st.integers(0, 4))
    def request(self, uid: int, count: int) -> Ticket:
        self.grants += 1
        waited = bool(self.turn)
        ticket = self.table.request(uid, self.grants, count)
        if not waited and count <= len(self.free):
            self.take(ticket)
        else:
            assert ticket.slots is None, "overtook somebody, or got slots that are not there"
            if not self.queues.get(uid):
                self.queues[uid] = []
                self.turn.append(uid)
            self.queues[uid].append(ticket)
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
        self.expect_served(self.table.cancel(ticket))

    @precondition(lambda self: self.arming)
    @rule(data=st.data())
    def arm(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.arming)))
        self.arming.discard(index)
        self.free.add(index)
        self.expect_served(self.table.armed(index))

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
        if self.turn:
            assert self.queues[self.turn[0]][0].count > len(self.free)


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


def test_a_large_request_is_not_overtaken_by_small_ones_behind_it() -> None:
    table = SlotTable(range(3))
    for index in range(3):
        table.armed(index)
    table.request(1, 1, 3)
    large = table.request(2, 2, 3)
    small = table.request(3, 3, 1)
    table.returned(0)
    assert table.armed(0) == []
    table.returned(1)
    table.armed(1)
    table.returned(2)
    assert table.armed(2) == [large]
    assert small.slots is None
