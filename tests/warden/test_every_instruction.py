"""A client that is killed at any instruction inside leaves what repair makes whole."""

from __future__ import annotations

import ctypes
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from backends import sim_only
from crash_world import World
from elves import compile_elf
from images import Images, layout_options, sources
from stepping import Outcome, Stepper, build_stepping

from teemate.image import SigParams, layout_image, sign_with_key

pytestmark = sim_only(
    "hardware keeps a debugger's trap flag out of release enclaves; the gate's code is the same"
)

HERE = Path(__file__).resolve().parent
FULL = bool(os.environ.get("TEEMATE_TEST_FULL"))

SHARED = 1
VALUE = b"v" * 40
"""A value's and a block's bytes are written by instructions that count each, so they are few."""


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def put(key: bytes, value: bytes, expected: int = 0) -> bytes:
    return struct.pack("<BBHIQQ", SHARED, 0, len(key), len(value), 0, expected) + key + value


def name(key: bytes) -> bytes:
    return struct.pack("<BBHI", SHARED, 0, len(key), 0) + key


class Operation(NamedTuple):
    before: list[tuple[str, bytes]]
    call: tuple[str, bytes]


OPERATIONS = {
    "malloc": Operation([], ("take", numbers(48))),
    "malloc from the middle": Operation(
        [("take", numbers(200, 48, 200, 48)), ("give", numbers(0, 2))], ("take", numbers(100))
    ),
    "free": Operation([("take", numbers(48))], ("give", numbers(0))),
    "free between free blocks": Operation(
        [("take", numbers(48, 48, 48, 48)), ("give", numbers(0, 2))], ("give", numbers(1))
    ),
    "put of a new key": Operation([], ("put", put(b"new", VALUE))),
    "put over a value": Operation([], ("put", put(b"one", VALUE))),
    "put over a value by a larger one": Operation([], ("put", put(b"two", VALUE * 4))),
    "delete": Operation([], ("delete", name(b"two"))),
    "compare_and_swap": Operation([], ("compare_and_swap", put(b"new", VALUE))),
    "transfer under two locks": Operation([("transfer", numbers(7))], ("transfer", numbers(5))),
    "more blocks than a slot lists": Operation([("hoard", numbers(64, 1))], ("hoard", numbers(2, 1))),
}

Maker = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def make_vault(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Build the vault with crash.c, with a protection switched off or none."""
    folder = tmp_path_factory.mktemp("crash")

    def make(test_build: str) -> tuple[Path, Path]:
        stem = folder / (test_build or "whole")
        elf, sgxs, sigstruct = (stem.with_suffix(end) for end in (".elf", ".sgxs", ".sig"))
        compile_elf([*sources("vault"), HERE / "crash.c"], elf, test_build=test_build)
        # No time: the warden would enter to tell it whenever it likes.
        built = layout_image(elf, sgxs, layout_options("vault", slots=2, stack="16K", heap="64K", time=False))
        sigstruct.write_bytes(sign_with_key(SigParams().unsigned(built.mrenclave), images.key).to_bytes())
        return sgxs, sigstruct

    return make


@pytest.fixture(scope="module")
def stepping(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_stepping(tmp_path_factory.mktemp("stepping"))


def populate(world: World) -> None:
    """Some values, so that there is something to go wrong."""
    for key in (b"one", b"two", b"three"):
        world.vault.put(key, b"old value of " + key)


@pytest.fixture(scope="module")
def world(make_vault: Maker, stepping: ctypes.CDLL) -> Iterator[World]:
    with World(*make_vault(""), stepping) as world:
        populate(world)
        yield world


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
    hole: str, operation: str, make_vault: Maker, stepping: ctypes.CDLL
) -> None:
    """The same steps see it when redo records are not carried out, or owned blocks not freed."""
    with World(*make_vault(hole), stepping) as world:
        populate(world)
        outcome = step(world, operation)
    assert outcome.wrong
