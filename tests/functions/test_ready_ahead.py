"""A slot that waits for its holder has ready what starts often, and nobody gets at it who does not own it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import modules as wasm
import pytest
from backends import sim_only
from function_enclaves import (
    ERESUME,
    OK,
    Gate,
    Holder,
    functions_of,
    installed,
    leave_inside,
    names,
    owner,
    weakened,
)
from gate import ARM, CONTROL, LEFT, PAUSED, TIME, address
from handed_out import ALICE, BOB, HELLO, Slots, deploy, invoked, large, repair_warden
from images import BuiltImage, Images

import teemate
from teemate._native import ffi
from teemate.functions import FunctionLimits

SECOND = 1_000_000_000
UNDEFINED = 6
"""UD2: the SDK's tm_panic()."""


@pytest.fixture
def gate() -> Iterator[Gate]:
    with Gate(installed()) as gate:
        yield gate


def is_ready_the_third_time(image: BuiltImage) -> bool:
    with Gate(image) as gate:
        slots = Slots(gate)
        deploy(slots, ALICE, "hello")
        assert slots.starts(ALICE, "hello") == [False, False]
        return slots.starts(ALICE, "hello", times=1) == [True]


def test_what_starts_often_is_ready_for_the_next_holder() -> None:
    assert is_ready_the_third_time(installed())


def test_an_image_that_makes_nothing_ready_is_found(images: Images, tmp_path: Path) -> None:
    assert not is_ready_the_third_time(weakened(images, tmp_path, "TM_TEST_NOTHING_READY"))


def test_what_runs_often_but_does_not_start_often_is_not_made_ready(gate: Gate) -> None:
    slots = Slots(gate)
    deploy(slots, ALICE, "hello")
    holder = slots.next(ALICE)
    assert [invoked(holder, "hello")[1] for _ in range(10)] == [False] + [True] * 9
    slots.free()
    assert slots.ready == 0


def test_what_is_ready_and_runs_stays_ready_for_the_next_ones(gate: Gate) -> None:
    slots = Slots(gate)
    deploy(slots, ALICE, "hello")
    slots.starts(ALICE, "hello")
    assert slots.starts(ALICE, "hello", times=100) == [True] * 100


def test_what_has_not_started_for_a_minute_is_not_made_ready(gate: Gate) -> None:
    slots = Slots(gate)
    assert gate.control(TIME, argument=1_000 * SECOND).status == OK
    deploy(slots, ALICE, "hello")
    slots.starts(ALICE, "hello")
    assert gate.control(TIME, argument=1_059 * SECOND).status == OK
    slots.free()
    assert slots.ready > 0
    slots.take(ALICE)
    assert gate.control(TIME, argument=1_061 * SECOND).status == OK
    slots.free()
    assert slots.ready == 0


def test_nothing_is_made_ready_while_somebody_waits_for_the_slot(gate: Gate) -> None:
    slots = Slots(gate)
    deploy(slots, ALICE, "hello")
    slots.starts(ALICE, "hello")
    slots.free()
    assert slots.ready > 0
    slots.take(ALICE)
    slots.free(waited_for=True)
    assert slots.ready == 0


def test_another_owner_gets_a_slot_with_nothing_of_it(gate: Gate) -> None:
    slots = Slots(gate)
    deploy(slots, ALICE, "hello")
    slots.starts(ALICE, "hello", times=3)
    slots.free()
    assert slots.ready > 0
    owned = slots.carol.usage().blocks_owned
    bob = functions_of(slots.take(BOB))
    assert names(bob) == []
    assert slots.ready == 0
    assert slots.carol.usage().blocks_owned == owned
    for what in (bob.invoke, bob.describe, bob.logs, bob.remove):
        with pytest.raises(teemate.NotFound):
            what("hello")
    bob.deploy("hello", wasm.printing(b"bob's"))
    assert slots.holder is not None
    assert invoked(slots.holder, "hello") == (b"bob's", False)


def test_of_what_is_ready_each_holder_finds_his_own(gate: Gate) -> None:
    slots = Slots(gate)
    deploy(slots, ALICE, "hello", wasm.printing(b"alice's"))
    deploy(slots, BOB, "hello", wasm.printing(b"bob's"))
    for uid in (ALICE, BOB, ALICE, BOB):
        slots.starts(uid, "hello", times=1)
    assert invoked(slots.next(ALICE), "hello") == (b"alice's", True)
    assert invoked(slots.next(BOB), "hello") == (b"bob's", True)


def test_a_function_that_was_removed_or_replaced_meanwhile_does_not_run(gate: Gate) -> None:
    slots = Slots(gate)
    deploy(slots, ALICE, "hello")
    alice = owner(gate, 3, ALICE)
    slots.starts(ALICE, "hello")
    slots.free()
    assert slots.ready > 0
    alice.deploy("hello", wasm.printing(b"another"), replace=True)
    assert invoked(slots.take(ALICE), "hello") == (b"another", False)
    slots.starts(ALICE, "hello")
    slots.free()
    alice.remove("hello")
    holder = slots.take(ALICE)
    with pytest.raises(teemate.NotFound):
        functions_of(holder).invoke("hello")
    slots.free()
    assert slots.ready == 0


def with_parameters(count: int) -> bytes:
    """A module with a type of so many parameters, which does nothing."""
    types = [b"\x60\0\0", b"\x60" + wasm.vector([bytes([wasm.I32])] * count) + b"\0"]
    exports = [wasm.name("memory") + b"\2\0", wasm.name("_start") + b"\0\0"]
    sections = {1: types, 3: [b"\0"], 5: [b"\0\1"], 7: exports, 10: [b"\2\0" + wasm.END]}
    body = b"".join(wasm.section(number, wasm.vector(items)) for number, items in sections.items())
    return b"\0asm\1\0\0\0" + body


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (large(40_000), large(70_000)),
        (wasm.command(b"", locals_=20_000), wasm.command(b"", locals_=20_000, functions=[b""] * 3)),
        (with_parameters(16), with_parameters(17)),
    ],
    ids=["code", "locals", "parameters"],
)
def test_what_takes_long_to_prepare_is_left_to_its_first_invocation(
    gate: Gate, short: bytes, long: bytes
) -> None:
    slots = Slots(gate)
    deploy(slots, ALICE, "short", short)
    deploy(slots, ALICE, "long", long)
    assert slots.starts(ALICE, "short", "long", times=4) == [False, False] * 2 + [True, False] * 2


def test_what_takes_too_long_to_prepare_takes_no_place_from_others(gate: Gate) -> None:
    slots = Slots(gate)
    long = [f"long-{number}" for number in range(4)]
    for name in long:
        deploy(slots, ALICE, name, large(70_000))
    deploy(slots, BOB, "short")
    slots.starts(BOB, "short", times=3)
    slots.starts(ALICE, *long, times=8)
    assert slots.starts(BOB, "short", times=1) == [True]


def test_what_is_there_no_more_takes_no_place_from_others(gate: Gate) -> None:
    slots = Slots(gate)
    for number in range(4):
        deploy(slots, ALICE, f"gone-{number}")
        slots.starts(ALICE, f"gone-{number}", times=6)
        functions_of(slots.next(ALICE)).remove(f"gone-{number}")
    deploy(slots, BOB, "hello")
    assert slots.starts(BOB, "hello", times=3) == [False, False, True]


@pytest.fixture(scope="module")
def troubled(images: Images, tmp_path_factory: pytest.TempPathFactory) -> BuiltImage:
    """With a small heap; and the length of a module says whether preparing it ahead goes wrong."""
    folder = tmp_path_factory.mktemp("troubled")
    return weakened(images, folder, "TM_TEST_READY_TROUBLE", slots=20, heap=16 << 20)


GIVES_UP, FAULTS, HANGS, HANGS_ONCE, WELL = range(5)


def of_length(module: bytes, rest: int = WELL) -> bytes:
    """A module whose length leaves this rest when it is divided by 5."""
    return module + wasm.section(0, wasm.name("x" * ((rest - len(module) - 3) % 5)))


def test_all_that_is_ready_is_an_eighth_of_the_heap_at_most(troubled: BuiltImage) -> None:
    with Gate(troubled) as gate:
        slots = Slots(gate, onlooker=21)
        for number in range(4):
            deploy(slots, ALICE, f"function-{number}", of_length(large(25_000)))
        slots.starts(ALICE, *(f"function-{number}" for number in range(4)))
        slots.free()
        each, heap = slots.ready, slots.carol.usage().heap
        assert 256 << 10 < each <= 1 << 20
        for slot in range(3, 20):
            assert gate.control(ARM, slot, generation=1, key=b"k" * 16).status == OK
        assert heap // 8 - each - (256 << 10) < slots.ready <= heap // 8
        last = Holder(gate, 19, b"k" * 16, 1, ALICE)
        assert last.bind().status == OK
        assert invoked(last, "function-0") == (b"\0", False)


def test_nothing_is_made_ready_while_the_heap_is_short(troubled: BuiltImage) -> None:
    with Gate(troubled) as gate:
        slots = Slots(gate)
        deploy(slots, ALICE, "hello", of_length(HELLO))
        slots.starts(ALICE, "hello")
        bob = gate.assign(3, uid=BOB)
        for number in range(3):
            functions_of(bob).deploy(f"large-{number}", wasm.command(b"", data=bytes(1 << 20), pages=17))
        grow = wasm.i32(60) + wasm.GROW + wasm.DROP + wasm.ENDLESS
        limits = FunctionLimits(memory=4 << 20)
        functions_of(bob).deploy("endless", wasm.command(grow, pages=1), limits=limits)
        slots.free()
        assert slots.ready > 0
        slots.take(ALICE)
        leave_inside(gate, bob, "endless")
        leave_inside(gate, gate.assign(4, uid=BOB), "endless")
        slots.free()
        assert slots.ready == 0


# -- what goes wrong in there ------------------------------------------------------------


def test_a_module_that_cannot_be_made_ready_leaves_the_slot_sound_and_cold(troubled: BuiltImage) -> None:
    with Gate(troubled) as gate:
        slots = Slots(gate)
        deploy(slots, ALICE, "well", of_length(HELLO))
        deploy(slots, ALICE, "gives-up", of_length(HELLO, GIVES_UP))
        slots.starts(ALICE, "well", "gives-up", "gives-up", times=1)
        slots.free()
        assert slots.ready == 0
        assert invoked(slots.take(ALICE), "well") == (b"hello", False)
        # It is not tried again.
        assert slots.starts(ALICE, "well", "gives-up") == [True, False] * 2


def warden_ends(gate: Gate, slots: Slots, *, faults: bool = False) -> None:
    """Have a warden end while it makes something ready in the slot, and its successor arm it."""
    assert slots.holder is not None
    gate.release(slots.holder)
    slots.holder = None
    slots.generation += 1
    slots.key = b"k" * 16
    fields = {"generation": slots.generation, "key": slots.key}
    raw = ffi.new("uint8_t[]", bytes(gate.request(ARM, slots.slot, **fields)))  # type: ignore[arg-type]
    left = gate.interrupt(0, gate.key, CONTROL, address(raw))
    if faults:
        assert (left.outcome, left.vector) == (LEFT, UNDEFINED)
    else:
        assert (left.outcome, left.function) == (PAUSED, ERESUME)
    repair_warden(gate, 0)
    assert gate.control(ARM, slots.slot, **fields).status == OK
    assert slots.ready == 0


@pytest.mark.parametrize("trouble", [FAULTS, HANGS], ids=["faults", "is killed"])
def test_wardens_that_end_in_there_leave_the_slot_sound_and_cold(troubled: BuiltImage, trouble: int) -> None:
    with Gate(troubled) as gate:
        slots = Slots(gate)
        deploy(slots, ALICE, "hello", of_length(HELLO, trouble))
        slots.starts(ALICE, "hello", times=1)
        assert slots.holder is not None
        before = slots.carol.usage()
        invoked(slots.next(ALICE), "hello")
        for _ in range(2):
            warden_ends(gate, slots, faults=trouble == FAULTS)
            assert invoked(slots.take(ALICE), "hello") == (b"hello", False)
        assert slots.starts(ALICE, "hello", times=4) == [False] * 4  # nobody tries again
        after = slots.carol.usage()
        assert (after.heap_used, after.blocks_owned) == (before.heap_used, before.blocks_owned)


def test_one_warden_that_was_killed_in_there_leaves_nothing_cold_for_good(troubled: BuiltImage) -> None:
    with Gate(troubled) as gate:
        slots = Slots(gate)
        deploy(slots, ALICE, "hello", of_length(HELLO, HANGS_ONCE))
        slots.starts(ALICE, "hello", times=1)
        invoked(slots.next(ALICE), "hello")
        warden_ends(gate, slots)
        assert invoked(slots.take(ALICE), "hello") == (b"hello", False)
        assert slots.starts(ALICE, "hello", times=4) == [True] * 4


@sim_only("nobody can say where hardware interrupts a thread")
def test_wardens_may_be_killed_anywhere_in_there() -> None:
    image = installed()
    path = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [
            *(sys.executable, str(Path(__file__).with_name("dying_ahead.py"))),
            *(str(image.sgxs), str(image.sigstruct), str(image.slots), "10"),
        ],
        env=os.environ | {"TEEMATE_TICK": "20us-400us", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 10
