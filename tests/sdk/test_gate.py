"""Who gets through the gate, and in which state of the slot."""

from __future__ import annotations

import os
import struct

import pytest
from gate import (
    ARGUMENT,
    ARM,
    ARMED,
    BIND,
    CLEAR,
    CLEARED,
    CONTROL,
    ECALL,
    EEXIT,
    EXIT_DONE,
    EXIT_OCALL,
    FREE,
    INSIDE,
    MAC,
    NOTREADY,
    OCALL_RETURN,
    OK,
    PARKED,
    PAUSED,
    PROBE,
    RESET,
    STATE,
    UNBOUND,
    UNKNOWN,
    Call,
    Gate,
    Holder,
    Left,
    address,
)
from images import Images

from teemate._native import ffi


def test_the_right_key_opens_the_slot(holder: Holder) -> None:
    assert holder.call(b"echo", b"hello") == (OK, b"hello")


@pytest.mark.parametrize("bit", [0, 1, 63, 64, 100, 127])
def test_a_forged_key_is_refused_at_the_landing_page(holder: Holder, bit: int) -> None:
    forged = bytearray(holder.key)
    forged[bit // 8] ^= 1 << bit % 8
    left = holder.gate.enter(holder.slot, bytes(forged), ECALL, Call(b"echo").address)
    assert left.landed
    assert holder.call(b"echo", b"still there") == (OK, b"still there")


def test_a_refused_entry_reads_nothing_of_its_caller(holder: Holder) -> None:
    assert holder.gate.enter(holder.slot, os.urandom(16), ECALL, 16).landed
    assert holder.gate.enter(holder.slot, os.urandom(16), CONTROL, 16).landed


def test_another_slots_key_does_not_open_this_one(faults: Gate) -> None:
    one, two = faults.assign(2), faults.assign(3)
    assert faults.enter(one.slot, two.key, ECALL, Call(b"empty").address).landed


def test_a_replayed_key_of_an_earlier_generation_is_refused(holder: Holder) -> None:
    old = holder.key
    holder.gate.release(holder)
    fresh = holder.gate.assign(holder.slot, 2)
    assert holder.gate.enter(holder.slot, old, ECALL, Call(b"empty").address).landed
    assert fresh.call(b"empty") == (OK, b"")


def test_zeros_open_no_free_slot(faults: Gate) -> None:
    assert faults.enter(2, bytes(16), ECALL, Call(b"empty").address).landed


def test_a_cleared_slot_refuses_its_key(holder: Holder) -> None:
    result = holder.gate.control(CLEAR, holder.slot, generation=1)
    assert (result.status, result.state) == (OK, FREE)
    assert holder.start(Call(b"empty")).landed


def test_the_control_key_opens_no_ecall(holder: Holder) -> None:
    assert holder.gate.enter(holder.slot, holder.gate.key, ECALL, Call(b"empty").address).landed


def test_a_slots_key_opens_no_control_ecall(holder: Holder) -> None:
    request = ffi.new("uint8_t[]", bytes(holder.gate.request(PROBE, holder.slot)))
    left = holder.gate.enter(holder.slot, holder.key, CONTROL, address(request))
    assert (left.function, left.status) == (EEXIT, ARGUMENT)


def test_an_unknown_selector_is_an_error(holder: Holder) -> None:
    assert holder.gate.enter(holder.slot, holder.key, 3).status == ARGUMENT
    assert holder.call(b"empty") == (OK, b"")


# ---- binding -----------------------------------------------------------------------------


def armed(gate: Gate, slot: int = 2) -> Holder:
    key = os.urandom(16)
    assert gate.control(ARM, slot, generation=1, key=key).status == OK
    return Holder(gate, slot, key, 1, 1000)


def test_an_unbound_slot_takes_no_ecall(faults: Gate) -> None:
    assert armed(faults).start(Call(b"empty")).status == UNBOUND


def test_the_identity_may_ride_on_the_first_call(faults: Gate) -> None:
    holder = armed(faults)
    call = Call(b"caller", bind=faults.binding(2, 1, uid=4242))
    left = holder.start(call)
    assert left.status == OK
    slot, _, generation = struct.unpack_from("<IIQ", call.output(left.length))
    uid = struct.unpack_from("<I", call.output(left.length), 48)[0]
    assert (slot, generation, uid) == (2, 1, 4242)


@pytest.mark.parametrize("offset", [8, 40, 48, 56, 87])
def test_a_binding_with_a_wrong_mac_is_refused(faults: Gate, offset: int) -> None:
    holder = armed(faults)
    raw = bytearray(faults.binding(2, 1))
    raw[offset] ^= 1
    room = ffi.new("uint8_t[]", bytes(raw))
    assert faults.enter(2, holder.key, BIND, address(room)).status == MAC
    assert holder.start(Call(b"empty", bind=bytes(raw))).status == MAC
    assert holder.start(Call(b"empty")).status == UNBOUND


def test_a_binding_for_another_slot_or_generation_is_refused(faults: Gate) -> None:
    holder = armed(faults)
    assert holder.start(Call(b"empty", bind=faults.binding(3, 1))).status == MAC
    assert holder.start(Call(b"empty", bind=faults.binding(2, 2))).status == STATE


def test_a_bound_slot_keeps_its_identity(holder: Holder) -> None:
    assert holder.bind().status == OK
    other = holder.gate.binding(holder.slot, 1, uid=holder.uid + 1)
    assert holder.start(Call(b"empty", bind=other)).status == STATE
    assert holder.call(b"empty") == (OK, b"")


# ---- arguments ---------------------------------------------------------------------------


def test_an_unknown_name_is_an_error(holder: Holder) -> None:
    assert holder.call(b"no such call")[0] == UNKNOWN
    assert holder.call(b"ech")[0] == UNKNOWN
    assert holder.call(b"echoo")[0] == UNKNOWN


@pytest.mark.parametrize("field", ["name", "in", "out", "ocall_buf", "bind"])
@pytest.mark.parametrize("where", ["first byte", "last byte", "before", "around"])
def test_pointers_into_the_enclave_are_refused(holder: Holder, field: str, where: str) -> None:
    gate = holder.gate
    places = {
        "first byte": gate.base,
        "last byte": gate.base + gate.size - 1,
        "before": gate.base - 3,
        "around": gate.base - 4096,
    }
    changes = {field: places[where]}
    length = {"name": "name_len", "in": "in_len", "out": "out_cap", "ocall_buf": "ocall_cap"}.get(field)
    if length:
        changes[length] = 64
    if field == "ocall_buf":
        changes["ocall_cap"] = 4096
    if where == "around":
        if field in ("name", "bind", "ocall_buf"):
            changes[field] = gate.base - 8  # their length is bounded, or fixed
        else:
            changes[str(length)] = gate.size + 8192
    call = Call(b"echo", b"x" * 64, changes=changes)
    assert holder.start(call).status == ARGUMENT
    assert holder.call(b"echo", b"fine") == (OK, b"fine")


@pytest.mark.parametrize("field", ["name_len", "in_len", "out_cap", "ocall_cap"])
@pytest.mark.parametrize("length", [(1 << 64) - 1, (1 << 64) - 4096, (1 << 64) - (1 << 46)])
def test_lengths_that_overflow_are_refused(holder: Holder, field: str, length: int) -> None:
    address_field = {"name_len": "name", "in_len": "in", "out_cap": "out", "ocall_cap": "ocall_buf"}[field]
    changes = {field: length, address_field: holder.gate.base + holder.gate.size + (1 << 20)}
    assert holder.start(Call(b"echo", b"x", changes=changes)).status == ARGUMENT
    assert holder.call(b"echo", b"fine") == (OK, b"fine")


def test_the_call_structure_must_lie_outside(holder: Holder) -> None:
    gate = holder.gate
    for place in (gate.base, gate.base + gate.size - 1, gate.base - 79, (1 << 64) - 8):
        assert gate.enter(holder.slot, holder.key, ECALL, place).status == ARGUMENT
        assert gate.enter(holder.slot, holder.key, BIND, place).status == ARGUMENT


@pytest.mark.parametrize(
    "changes", [{"name_len": 0}, {"name_len": 65}, {"ocall_cap": 4095}, {"reserved": 1}], ids=str
)
def test_fields_out_of_bounds_are_refused(holder: Holder, changes: dict[str, int]) -> None:
    assert holder.start(Call(b"empty", changes=changes)).status == ARGUMENT


def test_an_answer_that_does_not_fit_tells_how_much_it_needs(holder: Holder) -> None:
    call = Call(b"produce", struct.pack("<Q", 5000), capacity=100)
    left = holder.start(call)
    assert (left.status, left.length) == (-7, 5000)
    call = Call(b"produce", struct.pack("<Q", 5000), capacity=5000)
    left = holder.start(call)
    assert (left.status, left.length, call.output(5000)) == (OK, 5000, b"Z" * 5000)


def test_large_payloads_come_through(holder: Holder) -> None:
    payload = os.urandom(300_000)
    assert holder.call(b"echo", payload, len(payload)) == (OK, payload)


# ---- OCALLs ------------------------------------------------------------------------------


def park(holder: Holder, name: bytes = b"ocall") -> tuple[Call, Left]:
    call = Call(name, b"question")
    left = holder.start(call)
    assert (left.function, left.rdi, left.status) == (EEXIT, EXIT_OCALL, 0)
    return call, left


def test_an_ocall_goes_out_and_its_answer_comes_back(holder: Holder) -> None:
    call, out = park(holder)
    assert bytes(ffi.buffer(call.ocall, out.length)) == struct.pack("<I", 4) + b"echo" + b"question"
    ffi.memmove(call.ocall, b"answer", 6)
    left = holder.gate.enter(holder.slot, holder.key, OCALL_RETURN, out.nonce, 0, 6)
    assert (left.rdi, left.status, call.output(left.length)) == (EXIT_DONE, OK, b"answer")


def test_only_the_ocalls_own_return_is_let_in(holder: Holder) -> None:
    gate = holder.gate
    _, out = park(holder)
    assert gate.control(PROBE, 0, tcs=holder.slot).state == PARKED
    assert holder.start(Call(b"empty")).landed
    assert holder.bind().landed
    assert gate.enter(holder.slot, holder.key, OCALL_RETURN, out.nonce ^ 2, 0, 0).landed
    assert gate.enter(holder.slot, os.urandom(16), OCALL_RETURN, out.nonce, 0, 0).landed
    left = gate.enter(holder.slot, holder.key, OCALL_RETURN, out.nonce, 0, 0)
    assert (left.rdi, left.status) == (EXIT_DONE, OK)


def test_an_ocalls_nonce_cannot_be_used_again(holder: Holder) -> None:
    gate = holder.gate
    call, out = park(holder, b"ocall_twice")
    second = gate.enter(holder.slot, holder.key, OCALL_RETURN, out.nonce, 0, 5)
    assert second.rdi == EXIT_OCALL
    assert second.nonce != out.nonce
    assert gate.enter(holder.slot, holder.key, OCALL_RETURN, out.nonce, 0, 5).landed
    left = gate.enter(holder.slot, holder.key, OCALL_RETURN, second.nonce, 0, 4)
    assert (left.status, left.length) == (OK, 4)
    assert gate.enter(holder.slot, holder.key, OCALL_RETURN, second.nonce, 0, 4).landed
    assert call.output(4) is not None
    assert holder.call(b"empty") == (OK, b"")


@pytest.mark.parametrize("length", [2049, 8193, (1 << 64) - 1])
def test_an_answer_that_is_too_long_is_an_error(holder: Holder, length: int) -> None:
    _, out = park(holder)
    left = holder.gate.enter(holder.slot, holder.key, OCALL_RETURN, out.nonce, 0, length)
    assert left.rdi == EXIT_DONE
    assert left.status in (-7, -10)


def test_a_failed_ocall_is_an_error_in_the_enclave(holder: Holder) -> None:
    _, out = park(holder)
    left = holder.gate.enter(holder.slot, holder.key, OCALL_RETURN, out.nonce, -1, 0)
    assert (left.rdi, left.status) == (EXIT_DONE, -10)


def test_no_ocall_leaves_while_a_lock_is_held(holder: Holder) -> None:
    assert holder.call(b"ocall_locked")[0] == STATE


def test_a_cleared_slot_does_not_come_back_from_its_ocall(holder: Holder) -> None:
    gate = holder.gate
    _, out = park(holder)
    result = gate.control(CLEAR, holder.slot, generation=1)
    assert (result.status, result.state) == (OK, PARKED | CLEARED)
    assert gate.enter(holder.slot, holder.key, OCALL_RETURN, out.nonce, 0, 0).landed
    assert gate.control(RESET, holder.slot).status == STATE
    assert gate.control(ARM, holder.slot, generation=2, key=os.urandom(16)).status == STATE


# ---- interrupted -------------------------------------------------------------------------


def test_an_interrupted_slot_takes_the_control_key_only(holder: Holder) -> None:
    gate = holder.gate
    call = Call(b"loop")
    left = gate.interrupt(holder.slot, holder.key, ECALL, call.address)
    assert left.outcome == PAUSED
    assert holder.start(Call(b"empty")).landed
    probe = gate.control(PROBE, 0, tcs=holder.slot)
    assert (probe.status, probe.cssa, probe.state) == (OK, 1, INSIDE)
    result = gate.control(CLEAR, holder.slot, generation=1)
    assert (result.status, result.state) == (OK, INSIDE | CLEARED)
    assert gate.control(RESET, holder.slot).status == STATE


def test_before_its_key_is_set_an_enclave_takes_nothing_else(images: Images) -> None:
    with Gate(images.faults, start=False) as gate:
        assert gate.enter(2, bytes(16), ECALL, Call(b"empty").address).landed
        assert gate.control(PROBE).status == NOTREADY
        assert gate.control(ARM, 2, generation=1, key=os.urandom(16)).status == NOTREADY


def test_a_word_counts_its_calls(holder: Holder) -> None:
    before = holder.gate.control(PROBE, 0, tcs=holder.slot)
    holder.call(b"empty")
    holder.call(b"empty")
    after = holder.gate.control(PROBE, 0, tcs=holder.slot)
    assert (after.state, after.calls) == (ARMED, before.calls + 2)
