"""A slot that waits for its holder has ready what starts often, and nobody gets at it who does not own it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import modules as wasm
import pytest
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
from gate import ARM, CONTROL, LANDED, LEFT, PAUSED, PROBE, REINIT, REWRITE, TIME, address
from images import BuiltImage, Images

import teemate
from teemate._native import ffi
from teemate.functions import FunctionLimits, Functions
from teemate.functions import _wire as wire

ALICE, BOB, CAROL = 1001, 1002, 1003
SECOND = 1_000_000_000
UNDEFINED = 6
"""UD2: the SDK's tm_panic()."""
HELLO = wasm.printing(b"hello")


@pytest.fixture
def gate() -> Iterator[Gate]:
    with Gate(installed()) as gate:
        yield gate


def invoked(holder: Holder, name: str) -> tuple[bytes, bool]:
    """What a function wrote, and whether its module was ready."""
    status, reply = holder.call(b"invoke", wire.invoke(name, b"", (), None, None), wire.room_for(1 << 20))
    assert status == OK
    text, length, warm = struct.unpack_from("<3I", reply, 32)
    return reply[48 + text : 48 + text + length], bool(warm)


class Slots:
    """Hands one slot out again and again, as a broker does; CAROL, who has nothing there, looks on."""

    def __init__(self, gate: Gate, slot: int = 2, onlooker: int = 5) -> None:
        self.gate = gate
        self.slot = slot
        self.generation = 0
        self.holder: Holder | None = None
        self.carol = owner(gate, onlooker, CAROL)

    def free(self, *, waited_for: bool = False) -> None:
        """Take it back from whoever has it, and arm it again."""
        if self.holder is not None:
            self.gate.release(self.holder)
        self.generation += 1
        self.key = bytes([self.generation % 255 + 1]) * 16
        fields = {"generation": self.generation, "argument": int(waited_for), "key": self.key}
        assert self.gate.control(ARM, self.slot, **fields).status == OK

    def take(self, uid: int) -> Holder:
        """Its next holder."""
        self.holder = Holder(self.gate, self.slot, self.key, self.generation, uid)
        assert self.holder.bind().status == OK
        return self.holder

    def next(self, uid: int) -> Holder:
        """Both."""
        self.free()
        return self.take(uid)

    def starts(self, uid: int, *functions: str, times: int = 2) -> list[bool]:
        """Each function so often, by a new holder each time; whether it was ready."""
        return [invoked(self.next(uid), name)[1] for _ in range(times) for name in functions]

    @property
    def ready(self) -> int:
        """Bytes that are ready in free slots."""
        return self.carol.usage().heap_ready


def deploy(slots: Slots, uid: int, name: str, module: bytes = HELLO, **options: object) -> Functions:
    functions = functions_of(slots.next(uid))
    functions.deploy(name, module, **options)  # type: ignore[arg-type]
    return functions


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


def large(size: int, functions: int = 100) -> bytes:
    """A module of about so many bytes, which does not become smaller by being compiled."""
    step = wasm.i32(8) + wasm.i32(1) + wasm.I32_STORE
    code = step * (size // functions // len(step))
    return wasm.command(wasm.write(1, 0, 1), functions=[code] * functions)


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


def repair_warden(gate: Gate, broken: int) -> None:
    """As its successor does, through the other TCS."""
    frames = gate.control(PROBE, tcs=broken).cssa
    assert gate.control(REWRITE, broken, argument=frames, tcs=1 - broken).status == OK
    for _ in range(frames):
        assert gate.enter(broken, bytes(16), function=ERESUME).outcome == LANDED
    assert gate.control(REINIT, broken, tcs=1 - broken).status == OK


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


def test_wardens_may_be_killed_anywhere_in_there(gate: Gate) -> None:
    slots = Slots(gate)
    deploy(slots, ALICE, "hello", large(20_000))
    slots.starts(ALICE, "hello", times=3)
    before, deaths = None, 0
    for round_ in range(60):
        assert slots.holder is not None
        gate.release(slots.holder)
        after = slots.carol.usage()
        before = before or after
        assert (after.heap_used, after.blocks_owned) == (before.heap_used, before.blocks_owned)
        slots.generation += 1
        slots.key = bytes([round_ + 1]) * 16
        fields = {"generation": slots.generation, "key": slots.key}
        raw = ffi.new("uint8_t[]", bytes(gate.request(ARM, slots.slot, **fields)))  # type: ignore[arg-type]
        pause = (round_ + 1) * 20_000
        left = gate.enter(0, gate.key, CONTROL, address(raw), pause_after_ns=pause, finish=False)
        if left.outcome == PAUSED and left.function == ERESUME:
            deaths += 1
            repair_warden(gate, 0)
        assert gate.control(ARM, slots.slot, **fields).status == OK
        assert invoked(slots.take(ALICE), "hello")[0] == b"\0"
        if deaths:  # of two that died in there the function is believed to be the cause: another begins anew
            functions_of(slots.holder).deploy("hello", large(20_000), replace=True)
            slots.starts(ALICE, "hello", times=2)
