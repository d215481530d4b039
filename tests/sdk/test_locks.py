"""Mutexes and condition variables between processes that share one enclave."""

from __future__ import annotations

import struct

from gate import ECALL, ERESUME, EXIT_OCALL, OCALL_RETURN, OK, PAUSED, Call, Gate, Left

from teemate._native import ffi

BUSY = -8
WAIT = 1


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


def test_processes_that_add_under_a_lock_lose_nothing(faults: Gate) -> None:
    workers = [faults.worker(faults.assign(2 + n), [("count", number(50))], repeat=40) for n in range(3)]
    for worker in workers:
        assert {status for status, _ in worker.replies()} == {OK}
    total = faults.assign(5).call(b"count", number(0))[1]
    assert int.from_bytes(total, "little") == 3 * 40 * 50


def test_a_nested_lock_is_waited_for_without_leaving(faults: Gate) -> None:
    calls = [("count_nested", number(20)), ("count", number(20))]
    workers = [faults.worker(faults.assign(2 + n), calls, repeat=10) for n in range(2)]
    for worker in workers:
        assert {status for status, _ in worker.replies()} == {OK}
    total = faults.assign(5).call(b"count", number(0))[1]
    assert int.from_bytes(total, "little") == 2 * 10 * 40


def test_a_waiter_is_woken_when_the_condition_comes_true(faults: Gate) -> None:
    waiter = faults.worker(faults.assign(2), [("await", number(10))])
    raiser = faults.worker(faults.assign(3), [("raise", number(1))], repeat=10)
    assert {status for status, _ in raiser.replies()} == {OK}
    assert waiter.replies() == [(OK, number(10))]


def hold(gate: Gate) -> Call:
    """Leave slot 2 interrupted with the lock in its hands."""
    holder = gate.assign(2)
    call = Call(b"loop_locked")
    left = gate.interrupt(2, holder.key, ECALL, call.address)
    assert left.outcome == PAUSED
    return call


def answer_waits(gate: Gate, slot: int, key: bytes, call: Call) -> tuple[Left, int]:
    """Return from every WAIT at once, as a host may: how the call ended, and how often it waited."""
    left = gate.enter(slot, key, ECALL, call.address)
    waits = 0
    while left.rdi == EXIT_OCALL:
        assert left.status == WAIT
        waits += 1
        left = gate.enter(slot, key, OCALL_RETURN, left.nonce, 0, 0)
    return left, waits


def test_a_waiter_past_its_patience_is_told_who_holds_the_lock(faults: Gate) -> None:
    spinning = hold(faults)
    waiter = faults.assign(3)
    assert waiter.call(b"patience", number(7)) == (OK, b"")
    call = Call(b"count", number(1))
    left, waits = answer_waits(faults, 3, waiter.key, call)
    assert (left.status, waits) == (BUSY, 7)
    slot, _, generation = struct.unpack("<IIQ", call.output(left.length))
    assert (slot, generation) == (2, 1)
    del spinning


def test_a_wait_is_bounded_and_names_a_word_of_the_arena(faults: Gate) -> None:
    spinning = hold(faults)
    waiter = faults.assign(3)
    call = Call(b"count", number(1))
    left = faults.enter(3, waiter.key, ECALL, call.address)
    assert (left.rdi, left.status, left.length) == (EXIT_OCALL, WAIT, 16)
    index, _, timeout = struct.unpack("<IIQ", bytes(ffi.buffer(call.ocall, 16)))
    assert index < 1024
    assert 0 < timeout <= 100_000_000
    del spinning


def test_a_control_ecall_does_not_wait_for_a_clients_lock(faults: Gate) -> None:
    spinning = hold(faults)
    assert faults.author(b"lock").status == BUSY
    del spinning


def test_an_interrupted_holder_that_is_resumed_goes_on(faults: Gate) -> None:
    holder = faults.assign(2)
    call = Call(b"loop_locked")
    left = faults.interrupt(2, holder.key, ECALL, call.address)
    for _ in range(3):
        assert left.outcome == PAUSED
        left = faults.interrupt(2, holder.key, function=ERESUME)
    assert left.outcome == PAUSED
