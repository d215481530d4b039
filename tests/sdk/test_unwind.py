"""What the warden does through a client's own TCS: look, and undo what was interrupted there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import sim_only
from gate import (
    ARGUMENT,
    ARMED,
    CLEAR,
    CLEARED,
    ECALL,
    EEXIT,
    ERESUME,
    FREE,
    INSIDE,
    INTERRUPTED,
    LANDED,
    OCALL_RETURN,
    OK,
    PARKED,
    PAUSED,
    PROBE,
    RESET,
    STATE,
    UNWIND,
    UNWOUND,
    Call,
    Gate,
    Holder,
    Left,
)
from images import Images


def unwind(gate: Gate, slot: int, generation: int = 0) -> tuple[int, int, int]:
    """CSSA, slot word before, and whether anything was done."""
    left = gate.enter(slot, gate.key, UNWIND, generation)
    assert (left.outcome, left.rdi) == (LANDED, UNWOUND)
    return left.status, left.length, left.nonce


def interrupt(holder: Holder, name: bytes = b"loop") -> Call:
    """Leave a call in the slot, interrupted."""
    call = Call(name)
    left = holder.gate.interrupt(holder.slot, holder.key, ECALL, call.address)
    assert left.outcome == PAUSED
    return call


def resume(holder: Holder) -> Left:
    """ERESUME; a call that goes on in there is paused."""
    return holder.gate.enter(holder.slot, bytes(16), function=ERESUME, pause_after_ns=1_000_000, finish=False)


def nothing_told(left: Left) -> bool:
    """At the landing page with zeros."""
    return (left.outcome, left.rdi, left.status, left.length, left.nonce, left.r9) == (LANDED, 0, 0, 0, 0, 0)


def test_looking_tells_and_changes_nothing(holder: Holder) -> None:
    gate = holder.gate
    word = holder.generation << 8
    assert unwind(gate, holder.slot) == (0, word | ARMED, 0)
    interrupt(holder)
    for _ in range(2):
        assert unwind(gate, holder.slot) == (1, word | INSIDE, 0)
    assert gate.control(CLEAR, holder.slot, generation=1).status == OK
    assert unwind(gate, holder.slot) == (1, word | INSIDE | CLEARED, 0)


def test_undoing_wants_the_control_key(holder: Holder) -> None:
    gate = holder.gate
    assert nothing_told(gate.enter(holder.slot, os.urandom(16), UNWIND, 1))
    left = gate.enter(holder.slot, holder.key, UNWIND, 1)
    assert (left.function, left.status) == (EEXIT, ARGUMENT)
    assert holder.call(b"empty") == (OK, b"")
    interrupt(holder)
    assert gate.control(CLEAR, holder.slot, generation=1).status == OK
    assert nothing_told(gate.enter(holder.slot, holder.key, UNWIND, 1))
    assert gate.control(PROBE, tcs=holder.slot).state == INSIDE | CLEARED


def test_undoing_wants_a_key_that_was_taken_away_and_its_generation(holder: Holder) -> None:
    gate = holder.gate
    interrupt(holder)
    assert unwind(gate, holder.slot, 1)[2] == 0
    assert gate.control(CLEAR, holder.slot, generation=1).status == OK
    for other in (2, 1 << 40, (1 << 64) - 1):
        assert unwind(gate, holder.slot, other)[2] == 0
    assert unwind(gate, holder.slot, 1) == (1, 1 << 8 | INSIDE | CLEARED, 1)


def test_the_wardens_own_slots_are_not_undone_this_way(faults: Gate) -> None:
    for tcs in (0, 1):
        assert unwind(faults, tcs, 1)[2] == 0


def test_an_interrupted_call_that_was_undone_lands_and_its_slot_is_free(holder: Holder) -> None:
    gate = holder.gate
    interrupt(holder)
    assert gate.control(CLEAR, holder.slot, generation=1).status == OK
    assert gate.control(RESET, holder.slot).status == STATE
    assert unwind(gate, holder.slot, 1)[2] == 1
    assert unwind(gate, holder.slot, 1) == (1, 1 << 8 | FREE, 1)
    assert nothing_told(resume(holder))
    assert unwind(gate, holder.slot, 1) == (0, 1 << 8 | FREE, 1)
    left = resume(holder)
    assert (left.function, left.vector) == (ERESUME, 13)
    assert gate.control(RESET, holder.slot).status == OK
    assert gate.assign(holder.slot, 2).call(b"echo", b"next") == (OK, b"next")


def test_a_parked_call_that_was_undone_does_not_come_back(holder: Holder) -> None:
    gate = holder.gate
    out = holder.start(Call(b"ocall", b"question"))
    assert gate.control(CLEAR, holder.slot, generation=1).status == OK
    assert unwind(gate, holder.slot, 1) == (0, 1 << 8 | PARKED | CLEARED, 1)
    assert nothing_told(gate.enter(holder.slot, holder.key, OCALL_RETURN, out.nonce))
    assert gate.control(RESET, holder.slot).status == OK
    fresh = gate.assign(holder.slot, 2)
    assert nothing_told(gate.enter(holder.slot, fresh.key, OCALL_RETURN, out.nonce))
    assert fresh.call(b"empty") == (OK, b"")


def test_who_has_the_key_is_told_of_its_own_interruption_and_nobody_else(holder: Holder) -> None:
    gate = holder.gate
    interrupt(holder)
    left = holder.start(Call(b"empty"))
    assert (left.outcome, left.rdi, left.status) == (LANDED, INTERRUPTED, 0)
    assert nothing_told(gate.enter(holder.slot, os.urandom(16), ECALL, Call(b"empty").address))
    assert gate.control(CLEAR, holder.slot, generation=1).status == OK
    assert nothing_told(holder.start(Call(b"empty")))


@sim_only("nobody can say where hardware interrupts a thread")
@pytest.mark.parametrize("thefts", [5])
def test_whoever_resumes_the_wardens_entry_finishes_it_and_lands_in_its_own_process_on_its_own_stack(
    images: Images, thefts: int
) -> None:
    image = images.build("faults", nssa=64)
    done = subprocess.run(
        [
            *(sys.executable, str(Path(__file__).with_name("stolen_entries.py"))),
            *(str(image.sgxs), str(image.sigstruct), str(thefts)),
        ],
        env=os.environ | {"TEEMATE_TICK": "2us-20us", "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == thefts
