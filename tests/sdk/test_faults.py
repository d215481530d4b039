"""Code that goes wrong inside: what the caller sees, and that nobody else is touched."""

from __future__ import annotations

import struct

import pytest
from gate import CLEAR, CLEARED, ERESUME, INSIDE, OK, RESET, SSA, STATE, Call, Gate, Holder

DIVIDE, ILLEGAL, PAGE_FAULT = 0, 6, 14


@pytest.mark.parametrize(
    ("name", "payload", "vector"),
    [
        (b"divide", struct.pack("<Q", 1), DIVIDE),
        (b"illegal", b"", ILLEGAL),
        (b"panic", b"", ILLEGAL),
        (b"keep_lock", b"", ILLEGAL),
        (b"smash", struct.pack("<Q", 64), ILLEGAL),
        (b"peek", struct.pack("<Q", 64), PAGE_FAULT),
        (b"poke", struct.pack("<QQ", 64, 1), PAGE_FAULT),
        (b"overflow_stack", b"", PAGE_FAULT),
    ],
    ids=["divide", "illegal", "panic", "keep lock", "smash", "peek", "poke", "overflow stack"],
)
def test_a_fault_ends_the_call_and_touches_nobody_else(
    faults: Gate, name: bytes, payload: bytes, vector: int
) -> None:
    holder, other = faults.assign(2), faults.assign(3)
    left = holder.start(Call(name, payload))
    assert (left.function, left.vector) == (ERESUME, vector)
    assert other.call(b"echo", b"fine") == (OK, b"fine")
    assert holder.start(Call(b"empty")).landed
    told = faults.control(SSA, holder.slot)
    # SDM volume 3D, EXITINFO: #PF is told only where MISCSELECT.EXINFO is set, which these images leave.
    assert told.exitinfo == (0 if vector == PAGE_FAULT else 0x80000000 | 3 << 8 | vector)
    assert 0 < told.rip < faults.size
    result = faults.control(CLEAR, holder.slot, generation=1)
    assert (result.status, result.state) == (OK, INSIDE | CLEARED)
    assert faults.control(RESET, holder.slot).status == STATE


def test_the_header_the_text_and_the_guard_pages_cannot_be_written(faults: Gate) -> None:
    header = faults.header
    text = faults.base + 0x2000
    guard = faults.base + header.stack_offset + 2 * header.stack_stride - 4096
    for slot, place in enumerate((faults.base, text, guard), start=2):
        left = faults.assign(slot).start(Call(b"poke", struct.pack("<QQ", place, 1)))
        assert (left.function, left.vector) == (ERESUME, PAGE_FAULT), hex(place)


def test_canaries_differ_between_slots_and_assignments(holder: Holder) -> None:
    gate = holder.gate
    place = struct.pack("<Q", gate.base + gate.header.td_offset + 2 * gate.header.td_stride + 0x28)
    first = holder.call(b"peek", place)[1]
    gate.release(holder)
    second = gate.assign(2, 2).call(b"peek", place)[1]
    other = struct.pack("<Q", gate.base + gate.header.td_offset + 3 * gate.header.td_stride + 0x28)
    third = gate.assign(3).call(b"peek", other)[1]
    assert len({first, second, third, bytes(8)}) == 4
