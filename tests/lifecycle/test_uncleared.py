"""Revoking when the warden does not get a key away, or not yet: `revoke` must not end well before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from modelled_process import ModelledProcess, Reply
from modelled_world import ENCLAVE, World

from teemate.broker.enclaves.enclave import EnclaveState
from teemate.broker.slots.revocation import Revocation

ATTEMPTS = 3
"""Of a CLEAR, before the enclave is given up."""


@pytest.fixture
def world() -> Iterator[World]:
    world = World(2, kill=False)
    yield world
    world.warden.failures = 0
    for process in list(world.living()):  # nothing is charged any more then
        world.step(process.end)
    world.pass_time(40)
    world.close()


def ask(world: World, process: ModelledProcess, op: str, **args: object) -> Reply:
    """Post a request and let the broker work; the reply may not be there yet."""
    world.step(lambda: process.post(op, **args))
    reply = process.waiting[max(process.waiting)]
    process.hear()
    return reply


@pytest.fixture
def holder(world: World) -> ModelledProcess:
    process = world.start_process(1000)
    process.hear()
    return process


def attach(world: World, holder: ModelledProcess) -> tuple[int, int, bytes]:
    """Grant, slot and key."""
    ok = ask(world, holder, "attach", enclave=ENCLAVE, slots=1).ok
    assert ok is not None
    (slot,) = ok["slots"]
    return ok["grant"], slot["slot"], slot["key"]


def test_a_warden_that_fails_now_and_then_does_not_keep_a_key(world: World, holder: ModelledProcess) -> None:
    grant, index, key = attach(world, holder)
    world.warden.failures = ATTEMPTS - 1
    reply = ask(world, world.administrator, "revoke", grant=grant, grace=0)
    assert reply.ok is not None
    assert not world.enclave.slots[index].opens(key)
    assert world.broker_enclave.state is EnclaveState.READY


def test_a_key_that_no_warden_gets_away_fails_the_revocation_and_the_enclave_is_given_up(
    world: World, holder: ModelledProcess
) -> None:
    grant, index, key = attach(world, holder)
    world.warden.failures = 100
    reply = ask(world, world.administrator, "revoke", grant=grant, grace=0)
    assert world.enclave.slots[index].opens(key), "the guard of this test: the key is there still"
    assert reply.error is not None
    assert reply.error["code"] == "enclave-lost"
    assert reply.error["detail"] == {"uncleared": 1}
    assert world.broker_enclave.state is EnclaveState.QUARANTINED
    assert "could not be taken away" in world.broker_enclave.reason
    refused = ask(world, holder, "attach", enclave=ENCLAVE, slots=1)
    assert refused.error is not None
    assert refused.error["code"] == "enclave-lost"


def test_that_the_holder_left_does_not_hide_a_key_that_its_process_has_still(
    world: World, holder: ModelledProcess
) -> None:
    grant, index, key = attach(world, holder)
    world.warden.hang = 1.0
    reply = ask(world, world.administrator, "revoke", grant=grant, grace=5)
    world.warden.failures = 100  # also the request that hangs
    world.step(holder.disconnect)  # and it lives on
    world.pass_time(20)
    world.administrator.hear()
    assert world.enclave.slots[index].opens(key), "the guard of this test: the key is there still"
    assert reply.error is not None
    assert reply.error["detail"] == {"uncleared": 1}


def test_a_slot_that_was_given_back_just_before_is_closed_before_the_answer(
    world: World, holder: ModelledProcess
) -> None:
    grant, index, key = attach(world, holder)
    world.warden.hang = 5.0
    ask(world, holder, "slots.release", grant=grant, slots=[index], clean=True)
    reply = ask(world, world.administrator, "revoke", grant=grant, grace=0)
    assert world.enclave.slots[index].opens(key), "the guard of this test: the warden is not done"
    assert reply.ok is None
    assert reply.error is None
    world.pass_time(6)
    world.administrator.hear()
    assert not world.enclave.slots[index].opens(key)
    assert reply.ok is not None


def test_a_slot_that_was_given_back_and_whose_key_stays_fails_the_revocation(
    world: World, holder: ModelledProcess
) -> None:
    grant, index, key = attach(world, holder)
    world.warden.hang = 5.0
    ask(world, holder, "slots.release", grant=grant, slots=[index], clean=True)
    reply = ask(world, world.administrator, "revoke", grant=grant, grace=0)
    world.warden.failures = 100
    world.pass_time(6)
    world.administrator.hear()
    assert world.enclave.slots[index].opens(key), "the guard of this test: the key is there still"
    assert reply.error is not None
    assert reply.error["detail"] == {"uncleared": 1}


def test_a_second_revocation_does_not_end_well_before_the_key_is_gone(
    world: World, holder: ModelledProcess
) -> None:
    """The slot is in quarantine then, and not the grant's any more; its holder can enter it all the same."""
    grant, index, key = attach(world, holder)
    world.warden.failures = 1000
    for _ in range(2):
        reply = ask(world, world.administrator, "revoke", grant=grant, grace=0)
        assert world.enclave.slots[index].opens(key), "the guard of this test: the key is there still"
        assert reply.error is not None
        assert reply.error["detail"] == {"uncleared": 1}
    world.warden.failures = 0
    reply = ask(world, world.administrator, "revoke", grant=grant, grace=0)
    assert reply.ok is not None
    assert not world.enclave.slots[index].opens(key)


def test_without_the_wait_the_answer_comes_while_the_key_opens(
    world: World, holder: ModelledProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the wait."""

    async def wait(_grant: object) -> None:
        pass

    monkeypatch.setattr(Revocation, "_wait_returned", staticmethod(wait))
    grant, index, key = attach(world, holder)
    world.warden.hang = 5.0
    ask(world, holder, "slots.release", grant=grant, slots=[index], clean=True)
    reply = ask(world, world.administrator, "revoke", grant=grant, grace=0)
    assert reply.ok is not None
    assert world.enclave.slots[index].opens(key)
