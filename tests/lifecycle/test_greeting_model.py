"""Clients that are greeted without Python: what holds when the broker dies, and what they count as."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from charged_slots import charged_slots, owned_slots
from greeted_processes import come, end, expect, expecting_world, granted, greeted, new_process, said_last
from modelled_process import Reply
from modelled_restart import MortalWorld, ResumingProcess
from modelled_world import ENCLAVE

from teemate.broker._door import lib
from teemate.broker.policy.limits import Resource
from teemate.broker.restart.cells import Cells
from teemate.broker.slots.table import SlotState

SLOTS = 3
POINTS = 7
"""The place's cell, the grant's, both replies, the request that is taken out of the socket, the record,
and both cells again."""


@pytest.fixture
def world() -> Iterator[MortalWorld]:
    yield from expecting_world(SLOTS)


def killed_at(world: MortalWorld, process: ResumingProcess, points: int) -> tuple[bool, Reply]:
    """Let the broker die at a point of a cold attach; whether it did, and the answer of whichever broker."""
    world.step(lambda: world.die_after(points))
    reply = come(world, process)
    died = world.dead
    world.restart()
    for one in (world.administrator, process):
        one.hear()
        world.come_back(one)
    process.hear()
    if reply.ok is None:  # another session: it asks again, as our clients do
        assert not process.waiting
        world.step(lambda: process.post("attach", enclave=ENCLAVE, slots=1))
        reply = process.waiting[max(process.waiting)]
        process.hear()
    return died, reply


def test_who_is_expected_is_greeted_and_given_a_grant_without_python(world: MortalWorld) -> None:
    process = new_process(world)
    grant, index, key = granted(come(world, process))
    assert greeted(world) == world.service.attendant.statistics().given == 1
    assert world.enclave.slots[index].opens(key)
    (client,) = (c for c in world.service.clients.values() if c.identity.uid == 1000)
    assert client.identity.pid == world.pid(process)
    assert client.started == process.number
    assert client.account.used[Resource.CONNECTIONS] == 1
    end(world, process, grant)


def test_a_broker_dies_and_another_does_what_was_asked_of_the_first(world: MortalWorld) -> None:
    for points in range(POINTS):
        process = new_process(world)
        died, reply = killed_at(world, process, points)
        assert died, f"the guard of this test: there are so many points, and {points} is one"
        grant, index, key = granted(reply)
        assert set(world.service.grants) == {grant}
        assert world.service.grants[grant].slots == [index]
        assert world.service.grants[grant].client.identity.pid == world.pid(process)
        assert world.enclave.slots[index].opens(key)
        audited = [record for record in world.records if record.get("audit") == "grant"]
        assert [record["grant"] for record in audited].count(grant) == 1
        assert charged_slots(world.service) == owned_slots(world.service)
        end(world, process, grant)
        world.step(process.end)
        for _ in range(2):  # the next broker expects nobody yet
            guest = world.start_process(1000)
            guest.hear()
            world.step(guest.end)


def test_without_what_stands_in_the_places_a_client_is_forgotten(
    world: MortalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: at some point only a place's cell says who was greeted."""
    process = new_process(world)
    world.step(lambda: world.die_after(1))  # the cell is written, and the client has read nothing
    come(world, process)
    assert world.dead
    monkeypatch.setattr(Cells, "_take_up_greeted", lambda *_: None)
    world.restart()
    for one in (world.administrator, process):
        one.hear()
        world.come_back(one)
    assert process.answered[-1].ok is not None
    assert "resumed" not in process.answered[-1].ok


def test_who_was_greeted_and_died_unknown_to_the_broker_leaves_nothing(world: MortalWorld) -> None:
    process = new_process(world)
    world.step(lambda: world.die_after(3))  # both cells, and both replies
    reply = come(world, process)
    _grant, index, key = granted(reply)
    assert world.dead
    world.step(process.end)
    world.restart()
    world.administrator.hear()
    world.come_back(world.administrator)
    assert not world.service.grants
    assert not world.enclave.slots[index].opens(key)
    states = {slot.state for slot in world.broker_enclave.slots.slots.values()}
    assert states <= {SlotState.FREE, SlotState.AHEAD}


def test_places_count_as_grants_of_their_user(world: MortalWorld) -> None:
    """Who has places and asks for the last ones of a limit gets them; nobody gets more than the limit."""
    ledger = world.service.ledger
    world.step(lambda: (ledger.bounds.update({Resource.GRANTS: 2}), world.service.attendant.start_anew()))
    for _ in range(2):
        world.start_process(1000).hear()
    assert 0 < world.service.attendant.statistics().places <= 2
    processes = [new_process(world) for _ in range(5)]

    def all_at_once() -> None:
        for process in processes:
            process.connect(world._address)
            process.post("attach", enclave=ENCLAVE, slots=1, wait=0.0)

    world.step(all_at_once)
    replies = [reply for process in processes for reply in process.hear() if reply.op == "attach"]
    assert len(replies) == 5
    assert sum(reply.ok is not None for reply in replies) == 2
    assert {reply.error["code"] for reply in replies if reply.error} == {"limit-reached"}


def test_places_count_as_connections_of_their_user(world: MortalWorld) -> None:
    """The same for who may have so many connections: whoever is let in by whom, there are no more."""
    limit, ledger, attendant = 3, world.service.ledger, world.service.attendant
    account = ledger.account(1000)
    world.step(lambda: (ledger.bounds.update({Resource.CONNECTIONS: limit}), attendant.start_anew()))
    expect(world, b"", b"")
    assert 0 < attendant.statistics().places <= limit
    before, processes = greeted(world), [new_process(world) for _ in range(5)]

    def all_at_once() -> None:
        for process in processes:
            world.come(process)

    world.step(all_at_once)
    assert account.used[Resource.CONNECTIONS] + account.places <= limit
    assert before < greeted(world) <= before + limit
    told = [said_last(process.sock) for process in processes if process.sock is not None]
    refused = [message["error"]["code"] for messages in told for message in messages]
    assert refused == ["limit-reached"] * (len(processes) - limit)
    assert len(world.service.grants) == limit, "and everybody else gets what it came for"


def test_connections_beyond_the_places_are_let_in_as_ever(world: MortalWorld) -> None:
    processes = [new_process(world) for _ in range(12)]

    def all_at_once() -> None:
        for process in processes:
            process.connect(world._address)
        while world.service.attendant.step():
            pass

    world.step(all_at_once)
    assert all(process.hear()[0].ok is not None for process in processes)
    assert 0 < greeted(world) < 12


def test_a_client_that_was_just_greeted_is_listed_and_revoked_with_all_others(world: MortalWorld) -> None:
    """Its note has not come yet when the administrator asks."""
    process = new_process(world)

    def both() -> None:
        world.come(process)
        while world.service.attendant.step():
            pass
        assert not world.service.grants, "the guard of this test: the broker does not know of it"
        world.administrator.post("revoke", enclave=ENCLAVE, grace=0)

    world.step(both)
    world.pass_time(5)
    world.administrator.hear()
    revoked = world.administrator.answered[-1]
    process.hear()
    (reply,) = [reply for reply in process.answered if reply.op == "attach"]
    _grant, index, key = granted(reply)
    assert revoked.ok is not None
    assert revoked.ok["grants"] == 1
    assert not world.enclave.slots[index].opens(key)


def test_a_policy_that_is_read_again_ends_the_places(world: MortalWorld) -> None:
    assert world.service.attendant.statistics().places
    world.step(world.service.attendant.start_anew)
    assert not world.service.attendant.statistics().places
    assert {account.places for account in world.service.ledger._known.values()} == {0}
    process = new_process(world)
    grant, _index, _key = granted(come(world, process))
    assert greeted(world) == 0
    end(world, process, grant)


def test_places_that_nobody_used_are_not_paid_for(world: MortalWorld) -> None:
    """Others decide how often they are taken away and kept anew: whenever an enclave comes or goes."""
    guests, attendant = world.service.attendant.guests, world.service.attendant
    bucket = world.service.ledger.account(1000).bucket

    def keep_anew() -> None:
        attendant.epoch += 1
        guests._short.update(guests._guests.values())
        guests.restock()

    places = attendant.statistics().places
    assert places
    bucket.take(1000.0)  # else there is no room for what comes back
    before, bucket.rate = bucket._tokens, 1e-9
    for _ in range(50):
        world.step(keep_anew)
        assert attendant.statistics().places == places
    assert before - 1.0 < bucket._tokens <= bucket.burst


def test_who_does_not_come_again_is_expected_no_more(world: MortalWorld) -> None:
    assert world.service.attendant.statistics().places
    world.pass_time(125)
    assert not world.service.attendant.statistics().places
    assert not lib.attendant_listens(world.service.attendant.native)
