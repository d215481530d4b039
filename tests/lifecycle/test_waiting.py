"""Requests for slots that wait, and what else is done with their grant meanwhile."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from typing import Any, cast

import pytest
import trio
from charged_slots import charged_slots, owned_slots
from modelled_process import ModelledProcess
from modelled_world import ENCLAVE, World

from teemate import errors
from teemate.broker.connections.requests import Acquire, Answer, Attach
from teemate.broker.slots.table import SlotState

SLOTS = 2


@pytest.fixture
def world() -> Iterator[World]:
    world = World(SLOTS, kill=False)
    yield world
    for process in list(world.living()):  # nothing is charged any more then
        world.step(process.end)
    world.pass_time(40)
    world.close()


@pytest.fixture
def holder(world: World) -> ModelledProcess:
    """Has all slots."""
    process = world.start_process(1000)
    world.step(lambda: process.post("attach", enclave=ENCLAVE, slots=SLOTS))
    process.hear()
    return process


def free_all(world: World, holder: ModelledProcess) -> None:
    (reply,) = [reply for reply in holder.answered if reply.op == "attach"]
    assert reply.ok is not None
    grant, slots = reply.ok["grant"], [slot["slot"] for slot in reply.ok["slots"]]
    world.step(lambda: holder.post("slots.release", grant=grant, slots=slots, clean=True))


def test_a_grant_that_waits_for_its_slots_gets_no_others_meanwhile(
    world: World, holder: ModelledProcess
) -> None:
    """When it fails in the end, those would be nobody's: charged for ever, and no one could have them."""
    waiting = world.start_process(1000)
    waiting.hear()
    service = world.service
    client = next(c for c in service.clients.values() if c.identity.pid == world.pid(waiting))

    def begin() -> tuple[Coroutine[Any, Any, Answer], Coroutine[Any, Any, Answer] | None]:
        attaching = service.granting.attach(client, Attach(enclave=ENCLAVE, slots=1, wait=5.0))
        (number,) = client.grants
        try:
            more = service.granting.acquire(client, Acquire(grant=number, count=1, wait=5.0))
        except errors.NotFound:
            more = None  # nobody was told of it yet
        return cast("Any", attaching), cast("Any", more)

    attaching, more = world.step(begin)
    (grant,) = client.grants.values()
    free_all(world, holder)

    async def finish() -> None:
        """In the order that is bad: the second request, a revocation, and the first one's end."""
        if more is not None:
            await more
        await service.revocation.revoke_all([grant], 0.0, "a test", "it is one")
        with pytest.raises(errors.Revoked):
            await attaching
        assert grant.over

    trio.from_thread.run(finish, trio_token=world._token)
    assert charged_slots(service) == owned_slots(service)
    world.step(waiting.end)
    world.pass_time(1)
    table = world.broker_enclave.slots.slots.values()
    assert all(slot.state in (SlotState.FREE, SlotState.AHEAD) for slot in table)
    assert charged_slots(service) == 0
