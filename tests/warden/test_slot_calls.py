"""Calls through a slot, in a private enclave: the C library by itself."""

from __future__ import annotations

import errno
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from backends import NUMBER
from images import Images
from warden_harness import Slot

from teemate._native import ffi, lib
from teemate.vault import Vault

SPACE, BUSY, UNKNOWN, OCALL_FAILED, ARGUMENT = -7, -8, -2, -10, -1


def test_an_ecall_by_name_gives_its_output(private: Any) -> None:
    slot = private.slot()
    result = slot.call("echo", b"hello")
    assert (result.outcome, result.status, result.out) == (lib.TEEMATE_CALL_DONE, 0, b"hello")
    assert slot.call("status", b"\x2a").status == 42
    assert slot.call("no_such").status == UNKNOWN
    assert slot.call("echo", b"still works").out == b"still works"
    assert slot.close() == 1


def test_all_slots_of_a_private_enclave_are_armed(private: Any) -> None:
    slots = [private.slot(n) for n in range(3)]
    assert [slot.call("echo", b"%d" % n).out for n, slot in enumerate(slots)] == [b"0", b"1", b"2"]
    assert [slot.close() for slot in slots] == [1, 1, 1]
    args = ffi.new("struct teemate_slot_args *")
    assert lib.teemate_private_slot(private.handle, 3, args) == -errno.ENOENT


class VaultCaller:
    """What teemate.vault.Vault wants of a slot."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def call(
        self, name: str, payload: bytes = b"", timeout: float | None = None, *, max_reply: int = 65536
    ) -> bytes:
        result = self._slot.call(name, payload, capacity=max_reply)
        assert (result.outcome, result.status) == (lib.TEEMATE_CALL_DONE, 0), (name, result.status)
        return result.out


def test_the_vault_puts_and_gets_by_name(make_private: Callable[..., Any], images: Images) -> None:
    private = make_private(image=(images.vault.sgxs, images.vault.sigstruct))
    one, two = (Vault(VaultCaller(private.slot(n))) for n in range(2))
    one.put(b"key", b"value")
    entry = two.get(b"key")
    assert entry is not None
    assert entry.value == b"value"
    two.put(b"key", b"another", ttl_ms=3_600_000)
    again = one.get(b"key")
    assert again is not None
    assert again.value == b"another"


def test_an_output_that_does_not_fit_tells_how_much_it_needs(private: Any) -> None:
    slot = private.slot()
    result = slot.call("echo", b"x" * 1000, capacity=10)
    assert (result.status, result.length) == (SPACE, 1000)
    assert slot.call("echo", b"x" * 1000, capacity=1000).out == b"x" * 1000
    assert slot.close() == 1


def test_an_ocall_goes_to_the_caller_and_back(private: Any) -> None:
    slot = private.slot()
    asked: list[tuple[bytes, bytes]] = []

    def answer(name: bytes, data: bytes) -> bytes:
        asked.append((name, data))
        return b"forty-two"

    assert slot.call("ask", b"what is it?", handler=answer).out == b"forty-two"
    assert asked == [(b"question", b"what is it?")]
    assert slot.close() == 1


def test_a_refused_ocall_is_told_to_the_enclave(private: Any) -> None:
    slot = private.slot()
    assert slot.call("ask", b"?", handler=lambda name, data: None).status == OCALL_FAILED
    assert slot.call("echo", b"fine").out == b"fine"
    assert slot.close() == 1


def test_a_slot_with_an_ocall_outstanding_takes_nothing_but_its_answer(private: Any) -> None:
    slot = private.slot()
    assert slot.begin("ask", b"?") == 0
    slot.go_on()
    assert slot.last.outcome == lib.TEEMATE_CALL_OCALL
    call = ffi.new("struct teemate_call *")
    assert lib.teemate_slot_resume(slot.handle, 0, call) == -errno.EINVAL
    assert lib.teemate_slot_call(slot.handle, b"empty", 5, ffi.NULL, 0, ffi.NULL, 0, 0, call) == -errno.EBUSY
    big = (1 << 20) + 1
    assert lib.teemate_slot_answer(slot.handle, 0, ffi.new("char[]", big), big, 0, call) == -errno.EINVAL
    assert slot.finish(lambda name, data: b"ok").out == b"ok"


def test_an_abandoned_ocall_leaves_the_slot_interrupted(private: Any) -> None:
    slot = private.slot()
    assert slot.begin("ask", b"?") == 0
    slot.go_on()
    slot.abandon()
    assert slot.begin("empty") == -errno.ESTALE
    assert slot.close() == 0


def test_a_spinning_call_is_paused_resumed_and_abandoned(private: Any) -> None:
    slot = private.slot()
    assert slot.begin("spin", pause_ns=1) == 0
    assert slot.last.outcome == lib.TEEMATE_CALL_PAUSED
    for _ in range(3):
        assert lib.teemate_slot_resume(slot.handle, 1, slot.last) == 0
        assert slot.last.outcome == lib.TEEMATE_CALL_PAUSED
    assert slot.begin("empty") == -errno.EBUSY
    slot.abandon()
    assert slot.begin("empty") == -errno.ESTALE
    assert slot.close() == 0
    assert private.slot(1).call("empty").status == 0


def test_a_fault_is_told_with_its_vector_and_ends_the_slot(private: Any) -> None:
    slot = private.slot()
    result = slot.call("divide")
    assert (result.outcome, result.vector) == (lib.TEEMATE_CALL_FAULT, 0)
    assert slot.begin("empty") == -errno.ESTALE
    assert slot.close() == 0
    assert private.slot(1).call("empty").status == 0


def test_a_wait_for_a_lock_comes_back_to_the_caller(private: Any) -> None:
    holder, waiter, third = (private.slot(n) for n in range(3))
    holder.stand("hold", private.hangs)
    assert waiter.begin("take") == 0
    assert waiter.last.outcome == lib.TEEMATE_CALL_PAUSED
    for _ in range(3):
        assert lib.teemate_slot_resume(waiter.handle, 0, waiter.last) == 0
        assert waiter.last.outcome == lib.TEEMATE_CALL_PAUSED
    assert third.call("release").status == 0
    assert holder.finish().status == 0
    assert waiter.finish().status == 0
    assert [slot.close() for slot in (holder, waiter, third)] == [1, 1, 1]


@pytest.fixture
def alarms() -> Iterator[list[int]]:
    """Signals that Python's handler has seen."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    yield seen
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_signal_pauses_a_spinning_call(private: Any, alarms: list[int]) -> None:
    slot = private.slot()
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)  # again and again: one may come before the call
    assert slot.begin("spin") == 0
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert slot.last.outcome == lib.TEEMATE_CALL_PAUSED
    assert set(alarms) == {signal.SIGALRM}
    slot.abandon()
    assert slot.close() == 0


def test_a_signal_pauses_a_wait_for_a_lock(private: Any, alarms: list[int]) -> None:
    holder, waiter, third = (private.slot(n) for n in range(3))
    holder.stand("hold", private.hangs)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    assert waiter.begin("take") == 0
    while not alarms:
        assert waiter.last.outcome == lib.TEEMATE_CALL_PAUSED
        assert lib.teemate_slot_resume(waiter.handle, 0, waiter.last) == 0
    assert third.call("release").status == 0
    assert (holder.finish().status, waiter.finish().status) == (0, 0)


def test_pauses_do_not_use_up_the_patience_of_a_wait_for_a_lock(private: Any) -> None:
    holder, waiter, third = (private.slot(n) for n in range(3))
    holder.stand("hold", private.hangs)
    assert waiter.begin("take", pause_ns=1) == 0
    for _ in range(200):
        assert waiter.last.outcome == lib.TEEMATE_CALL_PAUSED
        assert lib.teemate_slot_resume(waiter.handle, 1, waiter.last) == 0
    assert third.call("release").status == 0
    assert (holder.finish().status, waiter.finish().status) == (0, 0)


def test_whoever_scribbles_over_the_arena_gives_no_lock_away(private: Any) -> None:
    info = ffi.new("struct teemate_enclave_info *")
    assert lib.teemate_enclave_describe(private.handle, info) == 0
    arena = ffi.cast("uint8_t *", info.base + info.size + 4096)
    holder, waiter, third = (private.slot(n) for n in range(3))
    holder.stand("hold", private.hangs)
    assert waiter.begin("take", pause_ns=1) == 0
    for _ in range(20):
        ffi.memmove(arena, os.urandom(4096), 4096)
        if waiter.last.outcome == lib.TEEMATE_CALL_PAUSED:
            assert lib.teemate_slot_resume(waiter.handle, 1, waiter.last) == 0
    # False wakes use up patience, never the lock.
    patience_is_over = waiter.last.outcome == lib.TEEMATE_CALL_DONE
    if patience_is_over:
        assert waiter.last.status == BUSY
    assert third.call("release").status == 0
    assert holder.finish().status == 0
    assert waiter.finish().status == (BUSY if patience_is_over else 0)


def test_two_threads_in_one_slot_get_busy_and_nothing_crashes(private: Any) -> None:
    slot = private.slot()
    other = private.slot(1)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(slot.call("hold")))
    thread.start()
    while not private.hangs():
        assert thread.is_alive()
    call = ffi.new("struct teemate_call *")
    assert lib.teemate_slot_resume(slot.handle, 0, call) == -errno.EBUSY
    assert lib.teemate_slot_call(slot.handle, b"empty", 5, ffi.NULL, 0, ffi.NULL, 0, 0, call) == -errno.EBUSY
    assert lib.teemate_slot_close(slot.handle) == -errno.EBUSY
    assert other.call("release").status == 0
    thread.join()
    assert results[0].status == 0
    assert slot.call("echo", b"on").out == b"on"


@pytest.mark.parametrize("bad", ["in", "out", "overflow"])
def test_pointers_into_the_enclave_are_refused_inside(private: Any, bad: str) -> None:
    info = ffi.new("struct teemate_enclave_info *")
    assert lib.teemate_enclave_describe(private.handle, info) == 0
    inside = ffi.cast("void *", info.base + 4096)
    outside = ffi.new("uint8_t[64]")
    call = ffi.new("struct teemate_call *")
    slot = private.slot()
    arguments: dict[str, tuple[Any, int, Any, int]] = {
        "in": (inside, 16, outside, 64),
        "out": (outside, 16, inside, 16),
        "overflow": (outside, (1 << 64) - 1, outside, 64),
    }
    source, source_length, target, capacity = arguments[bad]
    assert (
        lib.teemate_slot_call(slot.handle, b"echo", 4, source, source_length, target, capacity, 0, call) == 0
    )
    assert (call.outcome, call.status) == (lib.TEEMATE_CALL_DONE, ARGUMENT)
    assert slot.call("echo", b"fine").out == b"fine"


def test_arguments_that_are_none_are_refused_outside(private: Any) -> None:
    slot = private.slot()
    call = ffi.new("struct teemate_call *")
    null = ffi.NULL
    for name, length in ((null, 1), (b"x", 0), (b"x" * 65, 65)):
        assert lib.teemate_slot_call(slot.handle, name, length, null, 0, null, 0, 0, call) == -errno.EINVAL
    assert lib.teemate_slot_call(slot.handle, b"echo", 4, null, 1, null, 0, 0, call) == -errno.EINVAL
    assert lib.teemate_slot_call(slot.handle, b"echo", 4, null, 0, null, 1, 0, call) == -errno.EINVAL
    assert slot.close() == 1


def test_a_wrong_key_is_refused_for_good(private: Any) -> None:
    args = ffi.new("struct teemate_slot_args *")
    assert lib.teemate_private_slot(private.handle, 0, args) == 0
    args.key[3] ^= 0x10
    slot = Slot(private.handle, args)
    assert slot.call("empty").outcome == lib.TEEMATE_CALL_REVOKED
    assert slot.call("empty").outcome == lib.TEEMATE_CALL_REVOKED
    assert slot.close() == 1
    assert private.slot().call("empty").status == 0


def test_a_forged_identity_is_refused(private: Any) -> None:
    args = ffi.new("struct teemate_slot_args *")
    assert lib.teemate_private_slot(private.handle, 0, args) == 0
    args.bind[10] ^= 1
    slot = Slot(private.handle, args)
    assert slot.call("empty").status == -4
    assert slot.call("empty").status == -4
    assert slot.close() == 1


def test_a_child_of_fork_gets_not_attached_and_the_parent_goes_on(private: Any) -> None:
    slot = private.slot()
    assert slot.call("empty").status == 0
    pid = os.fork()
    if pid == 0:
        call = ffi.new("struct teemate_call *")
        null = ffi.NULL
        refused = [
            lib.teemate_slot_call(slot.handle, b"empty", 5, null, 0, null, 0, 0, call),
            lib.teemate_slot_resume(slot.handle, 0, call),
            lib.teemate_private_slot(private.handle, 1, ffi.new("struct teemate_slot_args *")),
        ]
        closed = lib.teemate_slot_close(slot.handle)
        os._exit(0 if refused == [-errno.ENOTCONN] * 3 and closed == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert slot.call("echo", b"parent").out == b"parent"
    assert slot.close() == 1


def test_the_time_is_told_before_a_call(make_private: Callable[..., Any]) -> None:
    slot = make_private(time=True).slot()
    now = struct.unpack("<Q", slot.call("clock").out)[0]
    assert now > 1_600_000_000 * 10**9


def test_a_print_arrives_at_stderr_without_control_characters(
    private: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    assert private.slot().call("say").status == 0
    assert capfd.readouterr().err == "enclave says ?[31mhello\n"


def test_a_crash_in_a_private_control_ecall_is_repaired(private: Any) -> None:
    control = ffi.new("uint8_t[352]")
    result = ffi.new("uint8_t[512]")
    status = ffi.new("int32_t *")
    for _ in range(10):
        for name, expected in ((b"crash", -errno.EFAULT), (b"echo", 0)):
            ffi.memmove(control, struct.pack("<IIQQQ16sQQ32s64s", 10, 0, 0, 0, 0, b"", 0, 0, b"", name), 160)
            assert lib.teemate_private_control(private.handle, control, result, status) == expected
        assert status[0] == 0
    assert private.slot().call("empty").status == 0


def test_an_image_without_the_sdk_is_entered_raw_and_cannot_be_started(images: Images) -> None:
    diag = ffi.new("struct teemate_diag *")
    pointer = ffi.new("struct teemate_enclave **")
    signature = ffi.new("uint8_t[]", images.bare.sigstruct.read_bytes())
    with images.bare.sgxs.open("rb") as file:
        assert lib.teemate_create(NUMBER, 0, 0, file.fileno(), signature, pointer, diag) == 0
    assert lib.teemate_map(pointer[0], diag) == 0
    assert lib.teemate_private_start(pointer[0], diag) == -errno.ENOTSUP
    assert b"SDK" in ffi.string(diag.text)
    args = ffi.new("struct teemate_slot_args *")
    assert lib.teemate_enclave_tcs(pointer[0], ffi.addressof(args, "tcs_offset"), 1) >= 1
    slot = Slot(pointer[0], args)
    regs = ffi.new("struct teemate_regs *")
    run = ffi.new("struct sgx_enclave_run *")
    eenter, eresume, eexit = 2, 3, 4
    for _ in range(3):
        assert lib.teemate_slot_enter(slot.handle, regs, eenter, 0, run) == lib.TEEMATE_LEFT
        assert run.function == eexit
    assert lib.teemate_slot_enter(slot.handle, regs, 17, 0, run) == -errno.EINVAL
    assert lib.teemate_slot_enter(slot.handle, regs, eresume, 0, run) == lib.TEEMATE_LEFT
    assert (run.function, run.exception_vector) == (eresume, 13)
    assert lib.teemate_slot_enter(slot.handle, regs, eenter, 0, run) == lib.TEEMATE_LEFT
    assert slot.close() == 1
    lib.teemate_close(pointer[0])
