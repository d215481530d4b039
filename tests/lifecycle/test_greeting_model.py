"""Clients that are greeted without Python: what holds when the broker dies, and who is not greeted so."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from charged_slots import charged_slots, owned_slots
from modelled_process import ModelledProcess, Reply
from modelled_restart import MortalWorld, ResumingProcess
from modelled_world import ENCLAVE

from teemate import wire
from teemate.broker._door import lib
from teemate.broker.connections.identity import groups_in, label_in
from teemate.broker.policy.limits import Resource
from teemate.broker.restart.cells import Cells
from teemate.broker.slots.table import SlotState
from teemate.errors import ConnectionLost

SLOTS = 3
POINTS = 7
"""The place's cell, the grant's, both replies, the request that is taken out of the socket, the record,
and both cells again."""


@pytest.fixture
def world() -> Iterator[MortalWorld]:
    world = MortalWorld(SLOTS, kill=False)
    for _ in range(2):  # who came twice will come again
        guest = world.start_process(1000)
        guest.hear()
        world.step(guest.end)
    yield world
    for process in list(world.living()):
        world.step(process.end)
    world.pass_time(40)
    assert not world.errors()
    world.close()


def greeted(world: MortalWorld) -> int:
    return world.service.attendant.statistics().greeted


def new_process(
    world: MortalWorld, uid: int = 1000, groups: bytes = b"", label: bytes = b""
) -> ResumingProcess:
    process = world.new_process(uid)
    assert isinstance(process, ResumingProcess)
    process.groups, process.label = groups, label
    return process


def expect(world: MortalWorld, groups: bytes, label: bytes) -> None:
    """Have such processes of the user expected."""
    for _ in range(2):
        guest = new_process(world, 1000, groups, label)
        world.reconnect(guest)
        guest.hear()
        world.step(guest.end)


def come(world: MortalWorld, process: ResumingProcess) -> Reply:
    world.step(lambda: world.come(process))
    reply = process.waiting[max(process.waiting)]
    process.hear()
    return reply


def granted(reply: Reply) -> tuple[int, int, bytes]:
    """Grant, slot and key."""
    assert reply.ok is not None, reply.error
    (slot,) = reply.ok["slots"]
    return reply.ok["grant"], slot["slot"], slot["key"]


def end(world: MortalWorld, process: ModelledProcess, grant: int) -> None:
    world.step(lambda: process.post("detach", grant=grant, clean=True))
    process.hear()
    assert process.answered[-1].ok is not None


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


@pytest.mark.parametrize(("uid", "groups"), [(1001, b""), (1000, struct.pack("I", 7))])
def test_another_user_and_a_process_in_other_groups_are_not_taken_for_who_is_expected(
    world: MortalWorld, uid: int, groups: bytes
) -> None:
    process = new_process(world, uid, groups)
    grant, _index, _key = granted(come(world, process))
    assert greeted(world) == 0
    (client,) = (c for c in world.service.clients.values() if c.identity.pid == world.pid(process))
    assert (client.identity.uid, len(client.identity.groups)) == (uid, len(groups) // 4)
    end(world, process, grant)


SEVEN, EIGHT = struct.pack("I", 7), struct.pack("I", 8)


@pytest.mark.parametrize(
    ("was", "groups", "label"),
    [
        ((SEVEN, b""), b"", b""),
        ((SEVEN, b""), EIGHT, b""),
        ((SEVEN, b""), SEVEN + EIGHT, b""),
        ((b"", b"one"), b"", b""),
        ((b"", b"one"), b"", b"two"),
        ((b"", b"one"), b"", b"ones"),
        ((SEVEN, b"ones"), b"ones", SEVEN),
    ],
)
def test_who_is_expected_in_a_group_or_with_a_label_is_nobody_without(
    world: MortalWorld, was: tuple[bytes, bytes], groups: bytes, label: bytes
) -> None:
    world.service.attendant.guests.dismiss_all()
    expect(world, *was)
    process = new_process(world, 1000, groups, label)
    grant, _index, _key = granted(come(world, process))
    assert greeted(world) == 0
    (client,) = (c for c in world.service.clients.values() if c.identity.pid == world.pid(process))
    assert (client.identity.groups, client.identity.label) == (groups_in(groups), label_in(label))
    end(world, process, grant)
    like_them = new_process(world, 1000, *was)
    grant, _index, _key = granted(come(world, like_them))
    assert greeted(world) == 1
    (client,) = (c for c in world.service.clients.values() if c.identity.pid == world.pid(like_them))
    assert (client.identity.groups, client.identity.label) == (groups_in(was[0]), label_in(was[1]))
    end(world, like_them, grant)


def test_who_left_its_group_and_resumed_gives_nobody_the_rights_it_had(world: MortalWorld) -> None:
    """It keeps them itself, with what it held: its identity is that of its first connection."""
    processes = [new_process(world, 1000, SEVEN) for _ in range(3)]
    for process in processes:
        world.reconnect(process)
        process.hear()
    world.restart()
    for process in processes:
        process.hear()
        process.groups = b""
        world.come_back(process)
    resumed = [c for c in world.service.clients.values() if c.identity.groups == groups_in(SEVEN)]
    assert len(resumed) == len(processes), "the guard of this test: they are"
    assert not world.service.attendant.statistics().places
    process = new_process(world)
    granted(come(world, process))
    (client,) = (c for c in world.service.clients.values() if c.identity.pid == world.pid(process))
    assert not client.identity.groups


def test_who_is_not_in_the_groups_of_its_identity_any_more_is_not_expected(
    world: MortalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lets one be another than its connection's: the control lets everybody be SEVEN's."""
    guests = world.service.attendant.guests
    guests.dismiss_all()
    expect(world, SEVEN, b"")
    assert world.service.attendant.statistics().places
    guests.dismiss_all()
    monkeypatch.setattr("teemate.broker.connections.guests.peer_bytes", lambda _: (b"", b""))
    expect(world, SEVEN, b"")
    assert not world.service.attendant.statistics().places


class _Unsent:
    """The attendant, with a hello of which it says that it could not be answered."""

    def attendant_take(self, native: object, seat: int, greeting: Any) -> None:
        lib.attendant_take(native, seat, greeting)
        greeting.unsent = errno.ENOBUFS

    def __getattr__(self, name: str) -> object:
        return getattr(lib, name)


def test_who_reads_no_more_is_no_reason_to_complain_and_who_cannot_be_told_is(
    world: MortalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def complaints() -> list[dict[str, object]]:
        return [record for record in world.records if record["event"] == "cannot send"]

    shown: list[object] = []
    monitoring = world.service.monitoring
    monkeypatch.setattr(monitoring, "sent", lambda _, data, __: shown.append(wire.decode(data)["id"]))
    monkeypatch.setattr("teemate.broker.telemetry.audit._COMPLAINTS_AT_ONCE", 3)
    world.step(lambda: world.administrator.post("monitor"))
    shown.clear()
    for _ in range(20):
        process = new_process(world)

        def come_and_read_nothing(process: ResumingProcess = process) -> None:
            world.come(process)
            assert process.sock is not None
            process.sock.shutdown(socket.SHUT_RD)

        world.step(come_and_read_nothing)
        world.step(process.end)
    assert greeted(world) > 3
    assert shown.count(0) == 20 - greeted(world), "what was not sent is not shown as sent"
    assert not complaints()
    monkeypatch.setattr("teemate.broker.connections.guests.lib", _Unsent())
    count = 10
    for _ in range(count):
        world.step(lambda: world.come(new_process(world)))
    told = complaints()
    assert 0 < len(told) < count
    assert all(record["uid"] == 1000 and record["reason"] == os.strerror(errno.ENOBUFS) for record in told)
    assert [client.identity.uid for client in world.service.clients.values()] == [0]


@pytest.mark.parametrize("ended", [False, True])
def test_who_cannot_be_identified_any_more_is_refused_although_it_was_greeted(
    world: MortalWorld, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """Without a cgroup it would be another to enclaves whose principals have one."""
    process = new_process(world)
    cgroup_of = mock.Mock(side_effect=ConnectionLost(f"process {world.pid(process)} ended"))
    if not ended:
        cgroup_of.side_effect = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    monkeypatch.setattr("teemate.broker.connections.guests.cgroup_of", cgroup_of)
    world.step(lambda: world.come(process))
    assert greeted(world) == 1
    assert [client.identity.uid for client in world.service.clients.values()] == [0]
    assert not world.service.grants
    told = "client was gone before it was identified" if ended else "connection refused"
    (record,) = [record for record in world.records if record["event"] == told]
    assert record["uid"] == 1000
    assert charged_slots(world.service) == owned_slots(world.service)
    assert process.sock is not None
    (message,) = said_last(process.sock)
    assert message["error"]["code"] == ("connection-lost" if ended else "limit-reached")


def said_last(sock: socket.socket) -> list[dict[str, Any]]:
    """What was sent that answers nothing."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(BlockingIOError):
        while (packet := wire.receive(sock)).data:
            wire.close_all(packet.fds)
            found.append(wire.decode(packet.data))
    return [message for message in found if message["id"] is None]


class _Misread:
    """The attendant, of whose greetings the broker fails to make a client."""

    def attendant_take(self, native: object, seat: int, greeting: Any) -> None:
        lib.attendant_take(native, seat, greeting)
        greeting.told.name[0], greeting.told.name_size = 0xFF, 1

    def __getattr__(self, name: str) -> object:
        return getattr(lib, name)


@pytest.mark.parametrize("at", ["the greeting", "the grant"])
def test_a_slot_that_was_given_while_the_broker_failed_is_nobodys(
    world: MortalWorld, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    process = new_process(world)
    if at == "the greeting":
        monkeypatch.setattr("teemate.broker.connections.guests.lib", _Misread())
    else:
        monkeypatch.setattr(world.service.granting, "given", mock.Mock(side_effect=MemoryError))
    _grant, index, key = granted(come(world, process))
    assert greeted(world) == 1
    assert [record["event"] for record in world.errors()] == ["internal error"]
    world.records.clear()
    process.hear()
    assert process.sock is None, "its connection has ended"
    assert not world.service.grants
    assert [client.identity.uid for client in world.service.clients.values()] == [0]
    assert world.broker_enclave.slots.slots[index].state is SlotState.QUARANTINED
    assert not world.enclave.slots[index].opens(key)
    assert charged_slots(world.service) == owned_slots(world.service)


def test_a_client_is_served_whether_or_not_viewers_can_be_shown_that_it_came(
    world: MortalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.step(lambda: world.administrator.post("monitor"))
    with monkeypatch.context() as failing:
        failing.setattr(world.service.monitoring, "received", mock.Mock(side_effect=MemoryError))
        process = new_process(world)
        grant, _index, _key = granted(come(world, process))
    assert greeted(world) == 1
    assert {record["event"] for record in world.errors()} == {"internal error"}
    world.records.clear()
    end(world, process, grant)


def test_who_resumes_is_not_greeted_as_a_new_client(world: MortalWorld) -> None:
    process = new_process(world)
    grant, _index, _key = granted(come(world, process))
    world.restart()
    process.hear()
    world.administrator.hear()
    world.come_back(world.administrator)
    for _ in range(2):
        world.start_process(1000).hear()
    before = greeted(world)
    world.come_back(process)
    assert greeted(world) == before
    assert set(world.service.grants) == {grant}
    end(world, process, grant)


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


def test_who_was_just_greeted_hears_with_all_others_that_there_will_be_nothing_to_resume(
    world: MortalWorld,
) -> None:
    process = new_process(world)

    def come_last() -> None:
        world.come(process)
        while world.service.attendant.step():
            pass
        assert len(world.service.clients) == 1, "the guard of this test: the broker does not know of it"
        world.service.say_farewell("the broker ends")

    world.step(come_last)
    assert greeted(world) == 1
    assert process.sock is not None
    (message,) = said_last(process.sock)
    assert "the broker ends" in message["error"]["message"]


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


def test_a_process_that_left_slots_behind_is_not_greeted_without_python(world: MortalWorld) -> None:
    """They count against what the process may have (slots_per_client), whatever connection it comes with."""
    process = new_process(world)
    granted(come(world, process))
    assert greeted(world) == 1
    world.step(process.disconnect)
    process.forget()
    granted(come(world, process))
    assert greeted(world) == 1
    grant, _index, _key = granted(come(world, new_process(world)))
    assert greeted(world) == 2, "another one is"
    assert grant in world.service.grants


def test_a_process_that_was_one_too_many_to_be_told_apart_is_when_another_has_ended(
    world: MortalWorld,
) -> None:
    guests, left_behind = world.service.attendant.guests, world.service.reclaimer.left_behind
    process = new_process(world)

    def leave(pid: int) -> None:
        left_behind[pid] = []
        guests.bar(pid)

    def end_of(pid: int) -> None:
        del left_behind[pid]
        guests.bar(pid)

    for pid in range(1, 65):
        leave(pid)
    assert world.service.attendant.statistics().places
    leave(world.pid(process))
    assert not world.service.attendant.statistics().places
    expect(world, b"", b"")
    assert not world.service.attendant.statistics().places, "it cannot be told from others"
    end_of(1)
    expect(world, b"", b"")
    assert world.service.attendant.statistics().places
    before = greeted(world)
    grant, _index, _key = granted(come(world, process))
    assert greeted(world) == before
    end(world, process, grant)
    for pid in [*range(2, 65), world.pid(process)]:
        end_of(pid)
    granted(come(world, new_process(world)))
    assert greeted(world) == before + 1


def test_a_process_that_leaves_slots_behind_is_given_none_by_its_other_connection(
    world: MortalWorld,
) -> None:
    """Which has a seat from before: slots_per_client is of the process, whatever connections it has."""
    world.broker_enclave.policy = replace(world.broker_enclave.policy, slots_per_client=1)
    process = new_process(world)
    world.reconnect(process)
    process.hear()
    assert world.service.attendant.statistics().seats, "the guard of this test: it has one"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as other:
        other.bind(f"{world._address}-again-{process.number}")

        def attach_and_leave() -> None:
            other.connect(world._address)
            wire.send(other, wire.encode({"id": 1, "op": "hello", "args": {"version": 1}}))
            args = {"enclave": ENCLAVE, "slots": 1}
            wire.send(other, wire.encode({"id": 2, "op": "attach", "args": args}))

        world.step(attach_and_leave)
        assert len(world.service.grants) == 1
    world.step(lambda: None)
    assert world.pid(process) in world.service.reclaimer.left_behind
    world.step(lambda: process.post("attach", enclave=ENCLAVE, slots=1))
    (reply,) = process.hear()
    assert reply.error is not None
    assert reply.error["detail"]["limit"] == "slots_per_client"


def test_a_user_in_many_groups_takes_no_place_from_others(
    world: MortalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def places_of_another() -> int:
        for group in range(20):
            for _ in range(2):
                process = new_process(world, 1000, struct.pack("I", group))
                world.reconnect(process)
                process.hear()
                world.step(process.end)
        return world.service.ledger.account(1001).places

    for _ in range(2):
        other = world.start_process(1001)
        other.hear()
        world.step(other.end)
    assert places_of_another()
    monkeypatch.setattr("teemate.broker.connections.guests._OF_ONE_USER", 100)
    assert not places_of_another(), "the control: else it could"
