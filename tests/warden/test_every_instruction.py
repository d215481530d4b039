"""A client that is killed at any instruction inside leaves what repair makes whole."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from backends import sim_only
from crash_operations import FULL, OPERATIONS
from crash_world import World, populate
from stepping import Outcome, Stepper

pytestmark = sim_only(
    "hardware keeps a debugger's trap flag out of release enclaves; the gate's code is the same"
)


def step(world: World, operation: str, **options: int | bool | tuple[int, ...]) -> Outcome:
    saved = world.save()
    try:
        before, call = OPERATIONS[operation]
        return Stepper(world, before, call).run(**options)  # type: ignore[arg-type]
    finally:
        world.put_back(saved)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_death_at_any_instruction_is_repaired(world: World, operation: str) -> None:
    """TEEMATE_TEST_FULL examines each instruction by itself, and kills at fifty of each operation."""
    kills = tuple(random.sample(range(1 << 20), 50 if FULL else 2))
    outcome = step(world, operation, every=FULL, kills=kills)
    print(
        f"{operation}: {outcome.instructions} instructions, examined at {outcome.examined}, "
        f"of these {outcome.killed} by SIGKILL; done from instruction {outcome.done_from} on"
    )
    assert not outcome.wrong, outcome.wrong[:5]
    assert outcome.instructions > 500
    assert outcome.examined >= (outcome.instructions if FULL else 30)


@pytest.mark.parametrize(("hole", "operation"), [("redo", "put over a value"), ("owned", "put over a value")])
def test_without_repairs_work_deaths_leave_damage(
    hole: str, operation: str, make_vault: Callable[[str], tuple[Path, Path]], stepping: ctypes.CDLL
) -> None:
    """The same steps see it when redo records are not carried out, or owned blocks not freed."""
    with World(*make_vault(hole), stepping) as world:
        populate(world)
        outcome = step(world, operation)
    assert outcome.wrong
