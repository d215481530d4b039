"""A slot that comes back is renewed by one request, and each step of it can fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from modelled_enclave import ModelledSlot
from modelled_process import ModelledProcess
from modelled_world import ENCLAVE, World

from teemate.broker.enclaves.enclave import EnclaveState
from teemate.broker.slots.table import SlotState

REFUSED = -5
READY = {SlotState.FREE, SlotState.AHEAD}


@pytest.fixture
def world() -> Iterator[World]:
    world = World(2, kill=False)
    yield world
    world.warden.failures = 0
    for process in list(world.living()):
        world.step(process.end)
    world.pass_time(40)
    world.close()


@pytest.fixture
def holder(world: World) -> ModelledProcess:
    process = world.start_process(1000)
    process.hear()
    return process


def attach(world: World, holder: ModelledProcess) -> tuple[int, int, bytes]:
    """Grant, slot and key; nobody has used it."""
    world.step(lambda: holder.post("attach", enclave=ENCLAVE, slots=1))
    reply = holder.waiting[max(holder.waiting)]
    holder.hear()
    assert reply.ok is not None
    (slot,) = reply.ok["slots"]
    return reply.ok["grant"], slot["slot"], slot["key"]


def give_back(world: World, holder: ModelledProcess, grant: int, index: int) -> None:
    world.step(lambda: holder.post("slots.release", grant=grant, slots=[index], clean=True))


def requests(world: World) -> int:
    return world.warden.statistics().requests


def test_a_slot_that_comes_back_clean_takes_one_request(world: World, holder: ModelledProcess) -> None:
    grant, index, key = attach(world, holder)
    before = requests(world)
    give_back(world, holder, grant, index)
    assert requests(world) == before + 1
    slot = world.enclave.slots[index]
    assert not slot.opens(key)
    assert slot.generation == world.broker_enclave.slot_keys[index].generation
    assert world.broker_enclave.slots.slots[index].state in READY


def test_a_slot_that_somebody_waits_for_is_renewed_in_a_hurry(world: World, holder: ModelledProcess) -> None:
    (grant, index, _), _ = attach(world, holder), attach(world, holder)
    give_back(world, holder, grant, index)
    assert world.warden.hurried == [False]
    grant, index, _ = attach(world, holder)
    world.step(lambda: holder.post("attach", enclave=ENCLAVE, slots=1, wait=30))
    waits = holder.waiting[max(holder.waiting)]
    give_back(world, holder, grant, index)
    assert world.warden.hurried == [False, True]
    holder.hear()
    assert waits.ok is not None


def test_a_slot_is_not_renewed_in_a_hurry_for_a_request_that_it_cannot_serve(
    world: World, holder: ModelledProcess
) -> None:
    other = world.start_process(1001)
    other.hear()
    attach(world, other)
    grant, index, _ = attach(world, holder)
    world.step(lambda: holder.post("attach", enclave=ENCLAVE, slots=2, wait=30))
    waits = holder.waiting[max(holder.waiting)]
    give_back(world, holder, grant, index)
    assert world.warden.hurried == [False]
    world.step(other.end)
    assert world.warden.hurried == [False, True]
    holder.hear()
    assert waits.ok is not None


def test_whether_a_slot_is_wanted_is_asked_when_it_is_its_turn(world: World, holder: ModelledProcess) -> None:
    (grant, index, _), _ = attach(world, holder), attach(world, holder)
    world.warden.hang = 1.0  # with somebody else's request, as it were
    give_back(world, holder, grant, index)
    world.step(lambda: holder.post("attach", enclave=ENCLAVE, slots=1, wait=30))
    waits = holder.waiting[max(holder.waiting)]
    world.pass_time(2)
    assert world.warden.hurried == [True]
    holder.hear()
    assert waits.ok is not None


def test_a_slot_that_comes_back_with_a_call_in_it_is_undone_step_by_step_and_told(
    world: World, holder: ModelledProcess
) -> None:
    _, index, key = attach(world, holder)
    slot = world.enclave.slots[index]
    assert slot.enter(holder, key)
    slot.park()
    before = requests(world)
    world.step(holder.end)
    assert requests(world) == before + 4  # CLEAR when it had left, the renewal up to the repair, RESET, ARM
    assert world.broker_enclave.repaired == 1
    assert not slot.dirty
    assert world.broker_enclave.slots.slots[index].state in READY


@pytest.mark.parametrize(
    ("step", "doing"),
    [
        ("clear", "clear its key"),
        ("repair", "undo what was interrupted in it"),
        ("reset", "reset it"),
        ("arm", "take a new key"),
    ],
)
def test_a_step_that_the_enclave_refuses_puts_the_slot_into_quarantine_and_says_which(
    world: World, holder: ModelledProcess, monkeypatch: pytest.MonkeyPatch, step: str, doing: str
) -> None:
    grant, index, key = attach(world, holder)
    monkeypatch.setattr(ModelledSlot, step, lambda *_, **__: REFUSED)
    give_back(world, holder, grant, index)
    assert world.broker_enclave.slots.slots[index].state is SlotState.QUARANTINED
    reason = world.broker_enclave.slots.slots[index].reason
    assert reason == f"the enclave answered {REFUSED} when asked to {doing}"
    assert world.enclave.slots[index].opens(key) is (step == "clear")


@pytest.mark.parametrize("steps", range(5))
def test_a_renewal_that_two_wardens_do_not_survive_puts_the_slot_into_quarantine(
    world: World, holder: ModelledProcess, steps: int
) -> None:
    grant, index, key = attach(world, holder)
    world.warden.steps_done = steps
    world.warden.failures = 1
    give_back(world, holder, grant, index)
    assert world.broker_enclave.slots.slots[index].state is SlotState.QUARANTINED
    assert not world.enclave.slots[index].opens(key), "what is left of it is cleared in any case"
    assert world.broker_enclave.state is EnclaveState.READY
