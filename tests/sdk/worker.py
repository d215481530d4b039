"""A process of its own that maps an enclave from inherited descriptors and makes calls in one slot."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

from teemate._native import ffi, lib

PTRACE_TRACEME = 0
CONTROL = 16
UNWIND = 17
EENTER = 2
PAUSED = 1


def await_tracer() -> None:
    """Stop until the parent, which traces us from now on, lets us go on."""
    assert ctypes.CDLL(None, use_errno=True).ptrace(PTRACE_TRACEME, 0, None, None) == 0
    os.kill(os.getpid(), signal.SIGSTOP)


def open_enclave(order: dict[str, Any]) -> tuple[Any, int]:
    """Map the enclave: its handle, and a negative errno when that failed."""
    diag = ffi.new("struct teemate_diag *")
    segments = ffi.new("struct teemate_segment[]", len(order["segments"]))
    for place, (offset, size, prot, kind) in zip(segments, order["segments"], strict=True):
        place.offset, place.size, place.prot, place.type = offset, size, prot, kind
    handle = ffi.new("struct teemate_enclave **")
    error = lib.teemate_open(
        order["backend"], order["fd"], order["base"], order["size"], segments, len(segments), handle, diag
    )
    error = error or lib.teemate_map(handle[0], diag)
    error = error or lib.teemate_map_arena(handle[0], order["arena"], diag)
    if error:
        print(ffi.string(diag.text).decode(), file=sys.stderr)
    return handle[0], error


def make_calls(enclave: Any, order: dict[str, Any]) -> int:
    """Make the calls, and print one line for each: status, output in hexadecimal."""
    args = ffi.new("struct teemate_slot_args *")
    args.index, args.tcs_offset, args.generation = order["slot"], order["tcs"], order["generation"]
    ffi.memmove(args.key, bytes.fromhex(order["key"]), 16)
    ffi.memmove(args.bind, bytes.fromhex(order["bind"]), 88)
    slot = ffi.new("struct teemate_slot **")
    error = lib.teemate_slot_open(enclave, args, slot, ffi.NULL)
    out = ffi.new("uint8_t[]", 65536)
    call = ffi.new("struct teemate_call *")
    for _ in range(order["repeat"]):
        for number, (name, payload) in enumerate(order["calls"]):
            if number == order.get("traced"):
                await_tracer()
            data = bytes.fromhex(payload)
            error = error or lib.teemate_slot_call(
                slot[0], name.encode(), len(name), data, len(data), out, 65536, 0, call
            )
            while not error and call.outcome == lib.TEEMATE_CALL_PAUSED:
                error = lib.teemate_slot_resume(slot[0], 0, call)
            if error or call.outcome != lib.TEEMATE_CALL_DONE:
                print(f"error {error}, outcome {call.outcome}", file=sys.stderr)
                return 1
            print(call.status, bytes(ffi.buffer(out, call.out_length)).hex())
    return 0


def control(enclave: Any, order: dict[str, Any]) -> int:
    """Make one control ECALL, as a warden does, or undo a generation of a slot; print how it ended."""
    assert not lib.teemate_map_tcs(enclave, order["tcs"], ffi.NULL)
    request = ffi.new("uint8_t[]", bytes.fromhex(order["control"]) or b"\0")
    regs = ffi.new("struct teemate_regs *")
    run = ffi.new("struct sgx_enclave_run *")
    if "unwind" in order:
        regs.rdi, regs.rsi = UNWIND, order["unwind"]
    else:
        regs.rdi, regs.rsi = CONTROL, int(ffi.cast("uintptr_t", request))
    key = bytes.fromhex(order["key"])
    regs.r12, regs.r13 = (int.from_bytes(part, "little") for part in (key[:8], key[8:]))
    if "traced" in order:
        await_tracer()
    function = EENTER
    while (outcome := lib.teemate_enter(enclave, order["tcs"], regs, function, 0, run)) == PAUSED:
        function = run.function
    print(regs.rsi if outcome == 0 else outcome)
    return 0


def main() -> int:
    """Read the order from stdin and do it.

    Before the call whose number is "traced" the process stops for its parent, which traces it.
    """
    order: dict[str, Any] = json.load(sys.stdin)
    enclave, error = open_enclave(order)
    if error:
        return 1
    return control(enclave, order) if "control" in order else make_calls(enclave, order)


if __name__ == "__main__":
    sys.exit(main())
