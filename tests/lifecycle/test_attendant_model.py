"""Attaches that are answered without Python: what holds when the broker dies or somebody interferes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from charged_slots import charged_slots, owned_slots
from modelled_process import ModelledProcess, Reply
from modelled_restart import MortalWorld
from modelled_world import ENCLAVE

from teemate.broker._door import ffi, lib
from teemate.broker.connections.attendant import Attendant
from teemate.broker.connections.guests import Guests
from teemate.broker.policy.limits import Resource
from teemate.broker.restart.cells import Cells
from teemate.broker.slots.table import SlotState

SLOTS = 3
POINTS = 5
"""The cell, the reply, the request that is taken out of the socket, the record, and the cell again."""


@pytest.fixture
def world() -> Iterator[MortalWorld]:
    world = MortalWorld(SLOTS, kill=False)
    yield world
    for process in list(world.living()):
        world.step(process.end)
    world.pass_time(40)
    assert not world.errors()
    world.close()


@pytest.fixture
def process(world: MortalWorld) -> ModelledProcess:
    process = world.start_process(1000)
    process.hear()
    return process


def ask(world: MortalWorld, process: ModelledProcess, op: str, **args: object) -> Reply:
    world.step(lambda: process.post(op, **args))
    reply = process.waiting[max(process.waiting)]
    process.hear()
    return reply


def granted(reply: Reply) -> tuple[int, int, bytes]:
    """Grant, slot and key."""
    assert reply.ok is not None, reply.error
    (slot,) = reply.ok["slots"]
    return reply.ok["grant"], slot["slot"], slot["key"]


def given(world: MortalWorld) -> int:
    return world.service.attendant.statistics().given


def attach(world: MortalWorld, process: ModelledProcess) -> tuple[int, int, bytes]:
    before = given(world)
    found = granted(ask(world, process, "attach", enclave=ENCLAVE, slots=1))
    assert given(world) == before + 1, "the guard of these tests: it was given ahead"
    return found


def states(world: MortalWorld) -> list[SlotState]:
    return [slot.state for slot in world.broker_enclave.slots.slots.values()]


def killed_at(world: MortalWorld, process: ModelledProcess, points: int) -> tuple[bool, Reply]:
    """Let the broker die at a point of an attach; whether it did, and the answer of whichever broker."""
    world.step(lambda: world.die_after(points))
    world.step(lambda: process.post("attach", enclave=ENCLAVE, slots=1))
    reply = process.waiting[max(process.waiting)]
    process.hear()
    died = world.dead
    world.restart()
    for one in (world.administrator, process):
        one.hear()
        world.come_back(one)
    process.hear()
    return died, reply


@pytest.mark.parametrize("points", range(POINTS))
def test_a_broker_that_dies_anywhere_in_an_attach_has_given_one_grant_to_one_client(
    world: MortalWorld, process: ModelledProcess, points: int
) -> None:
    died, reply = killed_at(world, process, points)
    assert died, "the guard of this test: there are so many points"
    grant, index, key = granted(reply)
    assert set(world.service.grants) == {grant}
    assert world.service.grants[grant].slots == [index]
    assert world.enclave.slots[index].opens(key)
    assert world.service.grants[grant].client.identity.pid == world.pid(process)
    audited = [record for record in world.records if record.get("audit") == "grant"]
    assert [(record["grant"], record["slots"]) for record in audited] == [(grant, [index])]
    assert charged_slots(world.service) == owned_slots(world.service)
    assert ask(world, process, "detach", grant=grant, clean=True).ok is not None
    assert states(world).count(SlotState.ASSIGNED) == 0
    assert not world.enclave.slots[index].opens(key)


def test_without_what_stands_in_the_cells_a_grant_is_lost(
    world: MortalWorld, process: ModelledProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: some point is between the reply and the client's record."""
    monkeypatch.setattr(Cells, "take_up", lambda *_: set())
    lost = 0
    for points in range(POINTS):
        other = world.start_process(1000)
        other.hear()
        _, reply = killed_at(world, other, points)
        grant, _index, _key = granted(reply)
        lost += grant not in world.service.grants
        world.step(other.end)
    assert lost


def test_who_dies_with_a_grant_that_no_record_has_loses_it_and_the_slot_comes_back(
    world: MortalWorld, process: ModelledProcess
) -> None:
    world.step(lambda: world.die_after(2))  # the cell and the reply
    world.step(lambda: process.post("attach", enclave=ENCLAVE, slots=1))
    reply = process.waiting[max(process.waiting)]
    process.hear()
    assert world.dead
    _grant, index, key = granted(reply)
    world.step(process.end)
    world.restart()
    world.administrator.hear()
    world.come_back(world.administrator)
    assert not world.service.grants
    assert not world.enclave.slots[index].opens(key)
    assert set(states(world)) <= {SlotState.FREE, SlotState.AHEAD}


def test_a_grant_that_nobody_took_is_nobodys_after_a_restart(
    world: MortalWorld, process: ModelledProcess
) -> None:
    assert SlotState.AHEAD in states(world)
    world.restart()
    process.hear()
    world.come_back(process)
    assert not world.service.grants
    assert set(states(world)) <= {SlotState.FREE, SlotState.AHEAD}
    assert ask(world, process, "ping").ok is not None  # until then the token before is good, too
    attach(world, process)


def test_a_drained_enclave_gives_nothing(world: MortalWorld, process: ModelledProcess) -> None:
    ask(world, world.administrator, "drain", enclave=ENCLAVE, deadline=0)
    assert SlotState.AHEAD not in states(world)
    reply = ask(world, process, "attach", enclave=ENCLAVE, slots=1)
    assert reply.error is not None
    assert reply.error["code"] == "draining"
    assert given(world) == 0


def begin_upgrade(world: MortalWorld) -> trio.Event:
    """What `upgrade` does before it builds: the enclave is `ready` until it is drained."""

    def begin() -> trio.Event:
        world.service.attendant.call_all_in()
        return world.service.generations.begin(world.broker_enclave)

    return world.step(begin)


def end_upgrade(world: MortalWorld, done: trio.Event) -> None:
    world.step(lambda: world.service.generations.finish(world.broker_enclave, done))


def test_an_enclave_that_is_upgraded_gives_nothing(world: MortalWorld, process: ModelledProcess) -> None:
    done = begin_upgrade(world)
    assert SlotState.AHEAD not in states(world)
    world.step(lambda: process.post("attach", enclave=ENCLAVE, slots=1))
    assert not process.hear(), "it waits for the upgrade, as everybody does"
    end_upgrade(world, done)
    (reply,) = process.hear()
    grant, _index, _key = granted(reply)
    assert given(world) == 0
    ask(world, process, "detach", grant=grant, clean=True)
    attach(world, process)


def test_whoever_waits_for_the_end_of_an_upgrade_is_given_nothing_besides(
    world: MortalWorld, process: ModelledProcess
) -> None:
    """When its attach is granted nobody asks again whether its seat is good still."""
    done = begin_upgrade(world)
    before = world.service.attendant.statistics().seats
    world.step(lambda: process.post("attach", enclave=ENCLAVE, slots=1))
    assert world.service.attendant.statistics().seats == before - 1
    end_upgrade(world, done)
    ask(world, world.administrator, "ping")  # with which the shelf is filled again
    assert SlotState.AHEAD in states(world)
    process.hear()
    second = ask(world, process, "attach", enclave=ENCLAVE, slots=1)
    assert second.ok is not None
    assert given(world) == 0
    assert world.broker_enclave.clients_by_uid == {1000: 1}


def test_a_grant_that_was_just_given_is_revoked_with_all_others(
    world: MortalWorld, process: ModelledProcess
) -> None:
    """Its note has not come yet when the administrator asks."""

    def both() -> None:
        process.post("attach", enclave=ENCLAVE, slots=1)
        assert world.service.attendant.step()
        assert not world.service.grants, "the guard of this test: the broker does not know of it"
        world.administrator.post("revoke", enclave=ENCLAVE, grace=0)

    world.step(both)
    revoked = world.administrator.waiting[max(world.administrator.waiting)]
    world.pass_time(5)
    process.hear()
    world.administrator.hear()
    (reply,) = [reply for reply in process.answered if reply.op == "attach"]
    _grant, index, key = granted(reply)
    assert revoked.ok is not None
    assert revoked.ok["grants"] == 1
    assert not world.enclave.slots[index].opens(key)


def test_who_waits_for_more_slots_than_are_free_gets_those_that_were_ahead(
    world: MortalWorld, process: ModelledProcess
) -> None:
    other = world.start_process(1001)
    other.hear()
    attach(world, process)
    assert SlotState.AHEAD in states(world)
    reply = ask(world, other, "attach", enclave=ENCLAVE, slots=SLOTS - 1)
    assert reply.ok is not None
    assert len(reply.ok["slots"]) == SLOTS - 1


def test_while_somebody_waits_nothing_is_given_ahead_of_it(
    world: MortalWorld, process: ModelledProcess
) -> None:
    waiting, third = world.start_process(1001), world.start_process(1002)
    grant, _index, _key = attach(world, process)
    world.step(lambda: waiting.post("attach", enclave=ENCLAVE, slots=SLOTS, wait=20.0))
    assert SlotState.AHEAD not in states(world)
    before = given(world)
    ask(world, third, "attach", enclave=ENCLAVE, slots=1, wait=0.0)
    assert given(world) == before
    ask(world, process, "detach", grant=grant, clean=True)


def test_what_cannot_be_recorded_ends_with_its_clients_connection_and_harms_nobody_else(
    world: MortalWorld, process: ModelledProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = world.start_process(1001)
    other.hear()

    def full(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patched:
        patched.setattr(type(world.service.state), "answered", full)
        world.step(lambda: process.post("attach", enclave=ENCLAVE, slots=1))
    assert len(world.errors()) == 1
    world.records.clear()
    process.hear()
    assert process.sock is None
    assert not world.service.grants
    assert states(world).count(SlotState.WITHHELD) == 1
    world.step(process.end)
    attach(world, other)  # as nobody's shelf and cell is in disorder
    world.step(lambda: world.service.attendant.close(world.broker_enclave))
    assert SlotState.AHEAD not in states(world)
    assert charged_slots(world.service) == owned_slots(world.service)


def test_an_attendant_that_has_ended_takes_back_and_counts_nothing(
    world: MortalWorld, process: ModelledProcess
) -> None:
    """What ends after it, as an enclave does, has nothing there any more."""
    attendant, enclave = world.service.attendant, world.broker_enclave

    def use() -> None:
        native, attendant.native = attendant.native, ffi.NULL
        try:
            attendant.count(enclave)
            attendant.withdraw(enclave)
            attendant.close(enclave)
            attendant.call_in(next(iter(world.service.clients.values())).account)
        finally:
            attendant.native = native

    assert SlotState.AHEAD in states(world)
    world.step(use)
    attach(world, process)


def test_who_leaves_while_its_attach_is_answered_is_not_heard_a_second_time(
    world: MortalWorld, process: ModelledProcess
) -> None:
    """Its reply lies unread: so the next call of the broker's on the socket fails, and takes no message."""
    seen = 0

    def leave() -> int:
        nonlocal seen
        seen += 1
        if seen == 3:  # of POINTS: it was answered, and its request is still there
            process.disconnect()
        return 1

    callback = ffi.callback("int(void)", leave)
    world.step(lambda: lib.attendant_mortal(world.service.attendant.native, callback))
    world.step(lambda: process.post("attach", enclave=ENCLAVE, slots=1))
    assert process.sock is None, "the guard of this test: it left"
    assert given(world) == 1
    assert world.broker_enclave.attaches == 1
    assert states(world).count(SlotState.WITHHELD) == 1
    world.step(lambda: lib.attendant_mortal(world.service.attendant.native, world._attendant_lives))


def test_a_user_gets_no_more_grants_than_its_limit_however_many_of_its_connections_are_seated(
    world: MortalWorld, process: ModelledProcess
) -> None:
    ledger = world.service.ledger
    world.step(lambda: ledger.bounds.update({Resource.GRANTS: 2}))
    more = [world.start_process(1000) for _ in range(3)]
    for one in more:
        one.hear()

    def all_at_once() -> None:
        for one in (process, *more):
            one.post("attach", enclave=ENCLAVE, slots=1, wait=0.0)

    world.step(all_at_once)
    answers = [one.hear() for one in (process, *more)]
    replies = [reply for heard in answers for reply in heard if reply.op == "attach"]
    assert sum(reply.ok is not None for reply in replies) == 2
    assert {reply.error["code"] for reply in replies if reply.error} == {"limit-reached"}


def test_what_the_seat_that_makes_room_was_given_counts_before_another_is_taken(
    world: MortalWorld, process: ModelledProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guests, "came", lambda *_: None)  # who may come takes of the same limit
    world.step(lambda: world.service.ledger.bounds.update({Resource.GRANTS: 16}))
    more = [world.start_process(1000) for _ in range(16)]
    (client,) = (c for c in world.service.clients.values() if c.identity.pid == world.pid(process))
    account = client.account
    assert len(account.seats) == 16
    assert all(seat.connection is not client.connection for seat in account.seats)

    def take_one_more() -> int:
        more[0].post("attach", enclave=ENCLAVE, slots=1)
        assert world.service.attendant.step()
        assert not world.service.grants, "the guard of this test: nobody knows of it yet"
        assert client.connection is not None
        seat = world.service.attendant._take_seat(client.connection)
        most = account.used[Resource.GRANTS] + len(account.seats)
        if seat is not None:
            world.service.attendant._recall([seat])
        return most

    assert world.step(take_one_more) <= 16


def test_a_slot_that_was_not_taken_back_before_it_goes_to_another_is_found_out(
    world: MortalWorld, process: ModelledProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the tests above: who puts slots back and leaves them on the shelf gives them twice."""

    def careless(self: Attendant, enclave: Any) -> None:
        for ready in self._shelves[enclave].ready.values():
            enclave.slots.put_back(ready.slot)

    other = world.start_process(1001)
    other.hear()
    assert SlotState.AHEAD in states(world)
    monkeypatch.setattr(Attendant, "withdraw", careless)
    reply = ask(world, other, "attach", enclave=ENCLAVE, slots=SLOTS)
    assert reply.ok is not None
    taken = granted(ask(world, process, "attach", enclave=ENCLAVE, slots=1))[1]
    assert taken in {slot["slot"] for slot in reply.ok["slots"]}, "one slot, two holders"
    assert world.errors(), "and the slot table does not have it"
    world.records.clear()
    monkeypatch.undo()
    world.step(world.service.attendant._shelves[world.broker_enclave].ready.clear)


def test_of_a_users_idle_connections_the_newest_are_seated_and_all_are_served(
    world: MortalWorld, process: ModelledProcess
) -> None:
    more = [world.start_process(1000) for _ in range(20)]
    assert world.service.attendant.statistics().seats == 16 + 1, "and the administrator's"
    grant, _index, _key = attach(world, more[-1])
    before = given(world)
    reply = ask(world, process, "attach", enclave=ENCLAVE, slots=1)
    assert reply.ok is not None
    assert given(world) == before
    ask(world, process, "detach", grant=reply.ok["grant"], clean=True)
    ask(world, more[-1], "detach", grant=grant, clean=True)


def test_a_connection_that_asks_for_other_things_all_the_time_is_not_seated_any_more(
    world: MortalWorld, process: ModelledProcess
) -> None:
    for _ in range(4):
        assert ask(world, process, "ping").ok is not None
    assert world.service.attendant.statistics().passed_on == 4
    assert ask(world, process, "ping").ok is not None
    assert world.service.attendant.statistics().passed_on == 4
    reply = ask(world, process, "attach", enclave=ENCLAVE, slots=1)
    assert reply.ok is not None
    ask(world, process, "detach", grant=reply.ok["grant"], clean=True)
    attach(world, process)
