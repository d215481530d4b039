"""Control ECALLs: MACs, sequence numbers, scrubbing, repair of the warden's own TCSs."""

from __future__ import annotations

import os
import struct

import pytest
from backends import BACKEND
from gate import (
    ARGUMENT,
    ARM,
    ARMED,
    AUTHOR,
    CLEAR,
    CONTROL,
    E_INTERRUPTED,
    ECALL,
    EEXIT,
    ERESUME,
    FREE,
    LANDED,
    MAC,
    OK,
    PAUSED,
    PROBE,
    REINIT,
    REPORT,
    RESET,
    REWRITE,
    SET_KEY,
    SSA,
    STATE,
    TIME,
    UNKNOWN,
    Call,
    Gate,
    Holder,
    Result,
    address,
)
from images import Images

from teemate._native import ffi


def test_the_same_key_again_succeeds_and_another_is_refused(faults: Gate) -> None:
    again = faults.send(faults.request(SET_KEY))
    assert isinstance(again, Result)
    assert again.status == OK
    other = faults.send(faults.request(SET_KEY), key=os.urandom(16))
    assert not isinstance(other, Result)
    assert other.landed


def test_set_key_tells_the_header_that_the_enclave_has(faults: Gate) -> None:
    told = faults.control(SET_KEY).data
    assert struct.unpack_from("<QI", told) == (faults.header.magic, faults.header.abi_version)
    assert struct.unpack_from("<Q", told, 32)[0] == faults.size


@pytest.mark.parametrize("op", [ARM, CLEAR, RESET, REWRITE, REINIT, TIME, AUTHOR])
@pytest.mark.parametrize("offset", [8, 16, 24, 32, 64, 95, 96, 351])
def test_a_request_that_was_changed_is_refused(faults: Gate, op: int, offset: int) -> None:
    request = faults.request(op, 2, generation=1, argument=0, key=os.urandom(16))
    request[offset] ^= 1
    result = faults.send(request)
    assert isinstance(result, Result)
    assert result.status == MAC
    assert faults.control(PROBE, 0, tcs=2).word == FREE


def test_a_replayed_request_is_refused(faults: Gate) -> None:
    key = os.urandom(16)
    request = faults.request(ARM, 2, generation=1, key=key)
    first = faults.send(request)
    assert isinstance(first, Result)
    assert (first.status, first.state) == (OK, ARMED)
    again = faults.send(request)
    assert isinstance(again, Result)
    assert again.status == MAC
    older = faults.send(faults.request(CLEAR, 2, generation=1, sequence=1))
    assert isinstance(older, Result)
    assert older.status == MAC


def test_arming_again_with_the_same_key_succeeds(faults: Gate) -> None:
    key = os.urandom(16)
    for _ in range(2):
        assert faults.control(ARM, 2, generation=1, key=key).status == OK
    assert faults.control(ARM, 2, generation=1, key=os.urandom(16)).status == STATE
    assert faults.control(ARM, 2, generation=2, key=os.urandom(16)).status == STATE


def test_an_earlier_generation_cannot_come_back(holder: Holder) -> None:
    gate = holder.gate
    gate.release(holder)
    assert gate.control(ARM, holder.slot, generation=1, key=os.urandom(16)).status == STATE
    assert gate.control(CLEAR, holder.slot, generation=2).status == STATE


def test_clearing_and_resetting_twice_is_as_once(holder: Holder) -> None:
    gate = holder.gate
    for _ in range(2):
        result = gate.control(CLEAR, holder.slot, generation=1)
        assert (result.status, result.state) == (OK, FREE)
    for _ in range(2):
        assert gate.control(RESET, holder.slot).status == OK


def test_a_used_slot_is_not_armed_before_it_was_scrubbed(holder: Holder) -> None:
    gate = holder.gate
    assert gate.control(CLEAR, holder.slot, generation=1).status == OK
    assert gate.control(ARM, holder.slot, generation=2, key=os.urandom(16)).status == STATE
    assert gate.control(RESET, holder.slot).status == OK
    assert gate.control(ARM, holder.slot, generation=2, key=os.urandom(16)).status == OK


@pytest.mark.parametrize("op", [ARM, CLEAR, RESET])
def test_the_wardens_own_slots_and_none_beyond_are_handed_out(faults: Gate, op: int) -> None:
    for slot in (0, 1, faults.slots, 1 << 40, (1 << 64) - 1):
        status = faults.control(op, slot, generation=1, key=os.urandom(16)).status
        assert status in (ARGUMENT, STATE)


def test_the_request_and_the_result_must_lie_outside(faults: Gate) -> None:
    for place in (faults.base, faults.base + faults.size - 8, (1 << 64) - 8):
        assert faults.enter(0, faults.key, CONTROL, place).status == ARGUMENT
        request = ffi.new("uint8_t[]", bytes(faults.request(PROBE, result=place)))
        assert faults.enter(0, faults.key, CONTROL, address(request)).status == ARGUMENT


def test_an_unknown_operation_is_an_error(faults: Gate) -> None:
    assert faults.control(99).status == UNKNOWN
    assert faults.control(0).status == UNKNOWN


# ---- scrubbing ------------------------------------------------------------------------


def test_the_next_holder_finds_nothing_of_the_one_before(holder: Holder) -> None:
    gate = holder.gate
    assert holder.call(b"plant") == (OK, b"")
    status, planted = holder.call(b"search")
    assert status == OK
    stack, data, _ = struct.unpack("<QQQ", planted)
    assert stack > 0
    assert data > 0
    gate.release(holder)
    fresh = gate.assign(holder.slot, 2)
    assert fresh.call(b"search") == (OK, bytes(24))


def interrupt_with_secret(holder: Holder) -> int:
    """Interrupt a call that holds a secret in registers, let it end, and count what is left in the SSA.

    0 also when an interrupt of the search was saved in the same frame, or the thread was paused early.
    """
    gate = holder.gate
    word = ffi.new("uint64_t *", 0)
    spin = Call(b"spin_with_secret", struct.pack("<Q", address(word)))
    left = gate.enter(holder.slot, holder.key, ECALL, spin.address, pause_after_ns=1_000_000, finish=False)
    assert left.outcome == PAUSED
    word[0] = 1
    left = gate.enter(holder.slot, holder.key, ECALL, spin.address, function=left.function)
    assert (left.outcome, left.function, left.status) == (0, EEXIT, OK)
    found: tuple[int, int, int] = struct.unpack("<QQQ", holder.call(b"search")[1])
    return found[2]


def test_an_interrupts_saved_registers_are_scrubbed_too(holder: Holder) -> None:
    gate = holder.gate
    # The control: such an interrupt leaves something.  A processor has others than ours, too.
    assert any(interrupt_with_secret(holder) for _ in range(100))
    gate.release(holder)
    assert gate.assign(holder.slot, 2).call(b"search") == (OK, bytes(24))


def test_the_authors_reset_hook_runs_at_each_reset(holder: Holder) -> None:
    gate = holder.gate
    before = holder.call(b"resets")[1]
    gate.release(holder)
    after = gate.assign(holder.slot, 2).call(b"resets")[1]
    assert int.from_bytes(after, "little") == int.from_bytes(before, "little") + 1


# ---- the author's own -------------------------------------------------------------------


def test_an_author_control_ecall_is_called_by_name(faults: Gate) -> None:
    result = faults.author(b"echo", b"input")
    assert (result.status, result.data) == (OK, b"input".ljust(192, b"\0"))
    assert faults.author(b"no such").status == UNKNOWN
    assert faults.author(b"").status == UNKNOWN
    assert faults.author(b"e" * 64).status == UNKNOWN


def test_author_code_does_not_run_on_a_clients_tcs(faults: Gate) -> None:
    assert faults.author(b"echo", tcs=2).status == STATE


def test_time_never_goes_back(holder: Holder) -> None:
    gate = holder.gate
    for told, known in ((5000, 5000), (7000, 7000), (6000, 7000), (0, 7000)):
        assert gate.control(TIME, argument=told).status == OK
        assert int.from_bytes(holder.call(b"time")[1], "little") == known


def test_a_report_names_the_image(faults: Gate, images: Images) -> None:
    result = faults.control(REPORT, data=bytes(64) + b"d" * 64)
    assert result.status == OK
    assert len(result.data) == 432
    assert result.data[64:96] == images.faults.mrenclave
    assert result.data[320:384] == b"d" * 64
    assert (result.data[:16].rstrip(b"\0") == b"sim") == (BACKEND == "sim")


def test_where_a_slot_faulted_is_told(holder: Holder, images: Images) -> None:
    call = Call(b"divide", struct.pack("<Q", 1))
    left = holder.start(call)
    assert (left.function, left.vector) == (ERESUME, 0)
    result = holder.gate.control(SSA, holder.slot)
    assert result.status == OK
    assert result.exitinfo & 0xFF == 0
    assert result.exitinfo >> 31 == 1
    assert 0 < result.rip < holder.gate.header.td_offset
    assert holder.gate.control(SSA, holder.slot, argument=3).status == ARGUMENT


# ---- repair of the warden's own TCSs ---------------------------------------------------------


def interrupt(gate: Gate, name: bytes, tcs: int) -> None:
    """Leave a control ECALL hanging: the warden is killed there."""
    raw = ffi.new("uint8_t[]", bytes(gate.request(AUTHOR, data=name.ljust(64, b"\0"))))
    left = gate.interrupt(tcs, gate.key, CONTROL, address(raw))
    assert left.outcome == PAUSED or left.function == ERESUME


def repair(gate: Gate, broken: int) -> None:
    other = 1 - broken
    frames = gate.control(PROBE, tcs=broken).cssa
    assert gate.control(REWRITE, broken, argument=frames, tcs=other).status == OK
    for _ in range(frames):
        left = gate.enter(broken, bytes(16), function=ERESUME)
        assert left.outcome == LANDED
    assert gate.control(PROBE, tcs=broken).cssa == 0
    assert gate.control(REINIT, broken, tcs=other).status == OK


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("name", [b"hang", b"crash"])
def test_a_hanging_or_crashed_control_ecall_is_undone_through_the_other_tcs(
    faults: Gate, broken: int, name: bytes
) -> None:
    interrupt(faults, name, broken)
    assert faults.control(PROBE, tcs=broken).cssa == 1
    assert faults.author(b"echo", tcs=broken).status == E_INTERRUPTED
    repair(faults, broken)
    assert faults.author(b"echo", b"well", tcs=broken).status == OK
    assert faults.assign(2).call(b"empty") == (OK, b"")


def test_a_hundred_hanging_control_ecalls_in_a_row_leave_the_enclave_usable(faults: Gate) -> None:
    for round_ in range(100):
        interrupt(faults, b"hang", round_ % 2)
        repair(faults, round_ % 2)
    assert faults.author(b"echo", b"well").status == OK
    assert faults.assign(2).call(b"echo", b"well") == (OK, b"well")


def test_both_of_the_wardens_tcs_can_be_repaired_at_once(faults: Gate) -> None:
    interrupt(faults, b"hang", 0)
    interrupt(faults, b"hang", 1)
    repair(faults, 0)
    repair(faults, 1)
    assert faults.author(b"echo", tcs=0).status == OK
    assert faults.author(b"echo", tcs=1).status == OK


def test_a_death_at_any_instruction_leaves_the_heap_whole(faults: Gate) -> None:
    holder = faults.assign(2)
    deaths = 60
    for death in range(deaths):
        interrupt(faults, b"churn", death % 2)
        repair(faults, death % 2)
        status, reply = holder.call(b"churned")
        assert status == OK, death
        linked, _, _, blocks, _, _, owned = struct.unpack("<7Q", reply)
        # What is linked is kept and nothing else is; each death loses two blocks at most.
        assert blocks - owned == linked
        assert owned <= 2 * (death + 1)


def test_a_lock_that_a_dead_warden_held_is_free_after_its_repair(faults: Gate) -> None:
    interrupt(faults, b"hang_locked", 0)
    repair(faults, 0)
    holder = faults.assign(2)
    assert holder.call(b"count", struct.pack("<Q", 1))[0] == -9
    assert holder.call(b"count", struct.pack("<Q", 1))[0] == OK


def test_a_warden_that_died_in_a_reset_leaves_it_to_be_done_again(holder: Holder) -> None:
    gate = holder.gate
    assert gate.control(CLEAR, holder.slot, generation=1).status == OK
    assert gate.author(b"reset_hangs", struct.pack("<Q", 1)).status == OK
    raw = ffi.new("uint8_t[]", bytes(gate.request(RESET, holder.slot)))
    left = gate.interrupt(0, gate.key, CONTROL, address(raw))
    assert left.outcome == PAUSED
    assert gate.control(ARM, holder.slot, tcs=1, generation=2, key=os.urandom(16)).status == STATE
    assert gate.author(b"reset_hangs", struct.pack("<Q", 0), tcs=1).status == OK
    repair(gate, 0)
    assert gate.control(RESET, holder.slot).status == OK
    assert gate.control(ARM, holder.slot, generation=2, key=os.urandom(16)).status == OK


def test_a_reset_through_a_tcs_where_somebody_stands_is_done_through_the_other(
    holder: Holder,
) -> None:
    """The very same request: that it came to such a TCS has not used it up."""
    gate = holder.gate
    assert gate.control(CLEAR, holder.slot, generation=1).status == OK
    interrupt(gate, b"hang", 0)  # whoever has the descriptor can stand there, on the way to being refused
    request = gate.request(RESET, holder.slot)
    refused = gate.send(request, tcs=0)
    assert isinstance(refused, Result)
    assert refused.status == E_INTERRUPTED
    done = gate.send(request, tcs=1)
    assert isinstance(done, Result)
    assert done.status == OK
    assert gate.control(ARM, holder.slot, tcs=1, generation=2, key=os.urandom(16)).status == OK


def test_rewriting_ones_own_tcs_or_an_armed_clients_is_refused(faults: Gate) -> None:
    assert faults.control(REWRITE, 0, argument=1, tcs=0).status == ARGUMENT
    assert faults.control(REWRITE, 2, argument=1, tcs=0).status == ARGUMENT
    faults.assign(2)
    assert faults.control(REWRITE, 2, generation=1, argument=1, tcs=0).status == STATE
    assert faults.control(REWRITE, 1, argument=4, tcs=0).status == ARGUMENT
    assert faults.control(REINIT, 0, tcs=0).status == ARGUMENT
