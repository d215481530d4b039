"""Of an invocation nothing is there for the next, and for the next holder of a slot nothing is ready.

Memory is made zeroes twice: when the heap gives a block out (tests/sdk/test_heap.py, whose control is in
tests/negative), and by the engine, so that it is clean to a function without either.
"""

from __future__ import annotations

import modules as wasm
import pytest
from function_enclaves import OK, Gate, Holder, functions_of, installed, owner, weakened
from images import Images

from teemate.functions import Functions
from teemate.functions import _wire as wire

ALICE, BOB = 1001, 1002
SECRET = 0x5A
WRITES = wasm.command(wasm.i32(1024) + wasm.i32(SECRET) + wasm.i32(1_000_000) + b"\xfc\x0b\x00", pages=16)
"""Fills a megabyte of its memory."""


def reads() -> bytes:
    """A command that writes out all bits that are set anywhere in its memory, which is larger than that."""
    body = wasm.LOOP + wasm.i32(2_000_000) + wasm.i32(2_000_000) + wasm.I32_LOAD8
    body += b"\x20\x00\xa7" + wasm.I32_LOAD8 + b"\x72" + wasm.I32_STORE8
    body += b"\x20\x00" + wasm.i64(1) + b"\x7c\x22\x00" + wasm.i64(1_990_000) + b"\x54\x0d\x00" + wasm.END
    return wasm.command(body + wasm.write(1, 2_000_000, 1, scratch=2_000_100), pages=32, locals_=1)


def found_after(writer: Functions, reader: Functions) -> int:
    """What is found in memory that nobody has written to, after an invocation that did."""
    writer.deploy("writes", WRITES, replace=True)
    reader.deploy("reads", reads(), replace=True)
    found = 0
    for _ in range(2):
        writer.invoke("writes")
        found |= reader.invoke("reads")[0]
    return found


def is_ready(holder: Holder, name: str) -> bool:
    """Invoke the function: was its module ready in the slot?"""
    status, reply = holder.call(b"invoke", wire.invoke(name, b"", (), None, None), wire.room_for(1 << 20))
    assert status == OK
    return reply[40] == 1  # fn_result.warm


def ready_for_the_next_holder(gate: Gate) -> bool:
    first = gate.assign(2, 1, uid=ALICE)
    functions_of(first).deploy("echo", wasm.echo())
    assert [is_ready(first, "echo") for _ in range(2)] == [False, True]
    gate.release(first)
    return is_ready(gate.assign(2, 2, uid=ALICE), "echo")


def test_nothing_of_an_invocation_is_there_for_the_next() -> None:
    with Gate(installed()) as gate:
        alice, bob = owner(gate, 2, ALICE), owner(gate, 3, BOB)
        assert found_after(alice, alice) == 0
        assert found_after(alice, bob) == 0


def test_nothing_is_ready_for_a_slots_next_holder() -> None:
    with Gate(installed()) as gate:
        assert not ready_for_the_next_holder(gate)


def test_a_slot_that_is_not_scrubbed_is_found(
    images: Images, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Gate(weakened(images, tmp_path_factory.mktemp("dirty"), "TM_TEST_NO_SCRUB")) as gate:
        assert ready_for_the_next_holder(gate)
