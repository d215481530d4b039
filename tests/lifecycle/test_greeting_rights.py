"""Clients that are greeted without Python: nobody is taken for somebody who may do more."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest
from greeted_processes import come, end, expect, expecting_world, granted, greeted, new_process
from modelled_restart import MortalWorld
from modelled_world import ENCLAVE

from teemate import wire
from teemate.broker.connections.identity import groups_in, label_in

SLOTS = 3


@pytest.fixture
def world() -> Iterator[MortalWorld]:
    yield from expecting_world(SLOTS)


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
