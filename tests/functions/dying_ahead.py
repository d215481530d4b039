"""Let wardens die at any instruction of making something ready in a slot, and their successors go on.

Run by test_ready_ahead.py in a process of its own, with TEEMATE_TICK, which decides when threads that are
inside are interrupted.  Prints how many died while something was half ready.
"""

from __future__ import annotations

import sys
from pathlib import Path

from function_enclaves import ERESUME, OK, PAUSED, Gate, functions_of
from gate import ARM, CONTROL, address
from handed_out import ALICE, Slots, deploy, invoked, large, repair_warden
from images import BuiltImage

from teemate._native import ffi

ROUNDS = 5000


def die_in_there(gate: Gate, slots: Slots) -> bool:
    """Arm the slot, whose warden is killed at the first interrupt; whether something was half ready then."""
    assert slots.holder is not None
    gate.release(slots.holder)
    slots.generation += 1
    slots.key = bytes([slots.generation % 255 + 1]) * 16
    fields = {"generation": slots.generation, "key": slots.key}
    raw = ffi.new("uint8_t[]", bytes(gate.request(ARM, slots.slot, **fields)))  # type: ignore[arg-type]
    left = gate.enter(0, gate.key, CONTROL, address(raw), pause_after_ns=1, finish=False)
    killed = left.outcome == PAUSED and left.function == ERESUME
    if killed:
        repair_warden(gate, 0)
    assert gate.control(ARM, slots.slot, **fields).status == OK
    cold = not slots.ready
    assert killed or not cold
    assert invoked(slots.take(ALICE), "hello") == (b"\0", not cold)
    return cold


def main() -> None:
    """Arguments: image, SIGSTRUCT, its slots, and how many deaths are enough."""
    sgxs, sigstruct = map(Path, sys.argv[1:3])
    slot_count, enough = map(int, sys.argv[3:5])
    image = BuiltImage(
        name="functions", sgxs=sgxs, sigstruct=sigstruct, elf=sgxs.with_suffix(".elf"), mrenclave=b"",
        slots=slot_count,
    )  # fmt: skip
    deaths = 0
    with Gate(image) as gate:
        slots = Slots(gate)
        deploy(slots, ALICE, "hello", large(20_000))
        slots.starts(ALICE, "hello", times=3)
        before = None
        for _ in range(ROUNDS):
            died = die_in_there(gate, slots)
            assert slots.holder is not None
            if died:  # of two that died it is believed to be the cause: another deployment begins anew
                functions_of(slots.holder).deploy("hello", large(20_000), replace=True)
                slots.starts(ALICE, "hello", times=2)
            slots.free()
            after = slots.carol.usage()
            slots.take(ALICE)
            before = before or after
            assert (after.heap_used, after.blocks_owned) == (before.heap_used, before.blocks_owned)
            deaths += died
            if deaths == enough:
                break
    print(deaths)


if __name__ == "__main__":
    main()
