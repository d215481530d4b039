"""Destroying an enclave, where the order of two tasks of the broker is what counts."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from typing import Any, cast

import pytest
from modelled_world import ENCLAVE, World

from teemate import errors
from teemate.broker.connections.requests import Destroy


@pytest.fixture
def world() -> Iterator[World]:
    world = World(2, kill=False)
    yield world
    world.warden.failures = 0
    for process in list(world.living()):  # nothing is charged any more then
        world.step(process.end)
    world.pass_time(40)
    world.close()


def test_an_enclave_is_being_destroyed_from_the_moment_that_it_is_asked_for(world: World) -> None:
    """Before the request's own task begins, another may take the enclave down, and it would be twice."""
    service = world.service

    def ask() -> None:
        (administrator,) = service.clients.values()
        request = Destroy(enclave=ENCLAVE, force=True)
        answer = cast("Coroutine[Any, Any, Any]", service.destruction.destroy(administrator, request))
        try:
            assert world.broker_enclave.ending
            with pytest.raises(errors.Draining):
                service.destruction.destroy(administrator, request)
            with pytest.raises(errors.Draining):
                service.lifecycle.owned(administrator, ENCLAVE, "drain")
        finally:
            answer.close()

    world.step(ask)
