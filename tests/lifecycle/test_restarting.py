"""A broker that dies and what the next one makes of it, where the order of things is what counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import trio
from modelled_process import ModelledProcess, Reply
from modelled_restart import MortalWorld, ResumingProcess
from modelled_world import ENCLAVE

from teemate.broker.enclaves.enclave import EnclaveState
from teemate.broker.restart.resumption import Resumption
from teemate.broker.slots.reclaim import Reclaimer
from teemate.broker.slots.revocation import Revocation
from teemate.broker.slots.table import SlotState


@pytest.fixture
def world() -> Iterator[MortalWorld]:
    world = MortalWorld(3, kill=False)
    yield world
    world.warden.failures = 0
    for process in list(world.living()):
        world.step(process.end)
    world.pass_time(40)
    world.close()


@pytest.fixture
def holder(world: MortalWorld) -> ModelledProcess:
    process = world.start_process(1000)
    process.hear()
    return process


def ask(world: MortalWorld, process: ModelledProcess, op: str, **args: object) -> Reply:
    """Post a request and let the broker work; the reply may not be there yet, nor come from this broker."""
    world.step(lambda: process.post(op, **args))
    reply = process.waiting[max(process.waiting)]
    process.hear()
    return reply


def attach(world: MortalWorld, holder: ModelledProcess) -> tuple[int, int, bytes]:
    """Grant, slot and key."""
    ok = ask(world, holder, "attach", enclave=ENCLAVE, slots=1).ok
    assert ok is not None
    (slot,) = ok["slots"]
    return ok["grant"], slot["slot"], slot["key"]


def restart(world: MortalWorld, *who: ModelledProcess) -> None:
    world.restart()
    for process in (world.administrator, *who):
        process.hear()
        world.come_back(process)


def test_a_drain_that_is_asked_for_again_has_what_is_left_of_its_time(
    world: MortalWorld, holder: ModelledProcess
) -> None:
    attach(world, holder)
    reply = ask(world, world.administrator, "drain", enclave=ENCLAVE, deadline=10.0)
    for _ in range(3):
        world.pass_time(3)
        restart(world, holder)
        assert reply.ok is None
    world.pass_time(1)
    world.administrator.hear()
    assert reply.ok is not None, "it got all of its time once more"
    assert reply.ok["enclaves"][0]["left"] == 1


def test_a_revocation_that_is_asked_for_again_gives_its_time_once(
    world: MortalWorld, holder: ModelledProcess
) -> None:
    grant, _index, _key = attach(world, holder)
    reply = ask(world, world.administrator, "revoke", grant=grant, grace=30.0)
    for _ in range(3):
        world.pass_time(8)
        restart(world, holder)
        assert reply.ok is None
    world.pass_time(10)
    world.administrator.hear()
    assert reply.ok is not None, "the holder got all of its time once more"


def test_slots_that_come_back_while_a_broker_still_starts_are_written_down_until_they_are_closed(
    world: MortalWorld, holder: ModelledProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant, index, _key = attach(world, holder)
    recycle = Reclaimer._recycle

    async def late(*args: Any) -> None:
        await trio.sleep(10)
        await recycle(*args)

    monkeypatch.setattr(Reclaimer, "_recycle", late)
    world.next_hang = 5.0  # of the slots that nobody held, for which the start waits
    restart(world, holder)
    ask(world, holder, "slots.release", grant=grant, slots=[index], clean=True)
    (client,) = (client for client in world.service.clients.values() if client.returning)
    world.pass_time(6)
    assert world.broker_enclave.slots.statistics().free == 2, "the guard of this test: it has started"
    assert [slot for _serial, slot in client.returning] == [index]
    world.pass_time(6)
    assert not client.returning
    assert world.broker_enclave.slots.statistics().free == 3


def test_slots_of_an_enclave_that_nobody_gets_into_come_back_after_a_restart(
    world: MortalWorld, holder: ModelledProcess
) -> None:
    """Else it could never be taken down when its next generation is there."""
    grant, index, _key = attach(world, holder)
    world.warden.failures = 10
    ask(world, world.administrator, "revoke", grant=grant, grace=0)
    assert world.broker_enclave.state is EnclaveState.QUARANTINED, "the guard of this test"
    restart(world, holder)
    assert world.broker_enclave.state is EnclaveState.QUARANTINED
    counts = world.broker_enclave.slots.statistics()
    assert (counts.arming, counts.free, counts.quarantined) == (0, 2, 1)
    assert world.broker_enclave.slots.slots[index].reason


def test_a_key_that_no_warden_could_take_away_is_gone_after_a_restart(
    world: MortalWorld, holder: ModelledProcess
) -> None:
    grant, index, key = attach(world, holder)
    world.warden.failures = 10
    ask(world, world.administrator, "revoke", grant=grant, grace=0)
    assert world.enclave.slots[index].opens(key), "the guard of this test"
    restart(world, holder)
    assert not world.enclave.slots[index].opens(key)


def test_a_slot_whose_holder_lives_on_without_its_connection_is_closed_after_a_restart(
    world: MortalWorld, holder: ModelledProcess
) -> None:
    """It was withheld, and the broker died before the warden had taken its key."""
    _grant, index, key = attach(world, holder)
    world.warden.hang = 5.0
    world.step(holder.disconnect)
    assert world.enclave.slots[index].opens(key), "the guard of this test: the warden is not done"
    restart(world)
    assert world.broker_enclave.slots.slots[index].state is SlotState.WITHHELD
    assert not world.enclave.slots[index].opens(key)


@pytest.mark.parametrize("careful", [True, False])
def test_a_revocation_is_answered_after_a_restart_when_what_had_come_back_is_closed(
    world: MortalWorld, holder: ModelledProcess, monkeypatch: pytest.MonkeyPatch, careful: bool
) -> None:
    """Without the wait, which is the control of this test, the key still opens."""
    grant, index, key = attach(world, holder)
    world.warden.hang = 5.0
    ask(world, holder, "slots.release", grant=grant, slots=[index], clean=True)
    reply = ask(world, world.administrator, "revoke", grant=grant, grace=0)
    if not careful:
        revoke = Revocation._revoke

        def hasty(self: Revocation, *args: object, **_named: object) -> object:
            return revoke(self, *args)  # type: ignore[arg-type]

        async def wait(_grant: object) -> None:
            pass

        monkeypatch.setattr(Revocation, "_revoke", hasty)
        monkeypatch.setattr(Revocation, "_wait_returned", staticmethod(wait))
    world.next_hang = 5.0
    restart(world, holder)
    assert (reply.ok is None) is careful
    assert world.enclave.slots[index].opens(key), "the guard of this test: the warden is not done"
    world.pass_time(6)
    world.administrator.hear()
    assert reply.ok is not None
    assert not world.enclave.slots[index].opens(key)


@pytest.mark.parametrize("careful", [True, False])
def test_the_token_before_is_good_for_nothing_once_a_request_was_answered(
    world: MortalWorld, holder: ModelledProcess, monkeypatch: pytest.MonkeyPatch, careful: bool
) -> None:
    """Where the broker does not let go of it, which is the control of this test, it is good again."""
    if not careful:

        def keep(_self: Resumption, _client: object) -> None:
            pass

        monkeypatch.setattr(Resumption, "first_request", keep)
    attach(world, holder)
    assert isinstance(holder, ResumingProcess)
    before = holder.shown
    assert before is not None
    restart(world, holder)
    assert holder.shown != before
    assert ask(world, holder, "ping").ok is not None
    world.restart()
    holder.hear()
    assert world.resumes(holder, before) is not careful
