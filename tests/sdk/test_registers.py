"""What is left in the registers after an exit: the gate's scrubbing, seen by a user handler."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest
from backends import BACKEND
from gate import ECALL, EEXIT, OK, Call, Holder

from teemate._native import ffi, lib


class _Registers(ctypes.Structure):
    _fields_ = (
        ("rbx", ctypes.c_uint64),
        ("r9_to_r15", ctypes.c_uint64 * 7),
        ("fxsave", ctypes.c_uint8 * 512),
        ("rsi", ctypes.c_uint64),
    )


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("registers") / "registers.so"
    source = Path(__file__).with_name("registers.S")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def left_registers(holder: Holder, handler: ctypes.CDLL, call: Call, key: bytes) -> _Registers:
    """Enter once with a user handler and return what it saw."""
    run = ffi.new("struct sgx_enclave_run *")
    run.user_handler = ctypes.cast(handler.keep_registers, ctypes.c_void_p).value
    seen = _Registers.in_dll(handler, "left_registers")
    ctypes.memset(ctypes.byref(seen), 0xFF, ctypes.sizeof(seen))
    if BACKEND == "sgx":
        outcome = enter_by_vdso(holder, handler, call, key, run)
    else:
        regs = ffi.new("struct teemate_regs *")
        regs.rdi, regs.rsi = ECALL, call.address
        regs.r12, regs.r13 = (int.from_bytes(key[part : part + 8], "little") for part in (0, 8))
        outcome = lib.teemate_enter(holder.gate.native, holder.gate.tcs(holder.slot), regs, 2, 0, run)
    assert (outcome, run.function, ctypes.c_int64(seen.rsi).value) == (0, EEXIT, OK)
    return seen


def enter_by_vdso(holder: Holder, handler: ctypes.CDLL, call: Call, key: bytes, run: Any) -> int:
    """Enter without the library, whose own function is called before the handler and has registers in use."""
    run.tcs = holder.gate.base + holder.gate.tcs(holder.slot)
    vdso = ctypes.CDLL("linux-vdso.so.1").__vdso_sgx_enter_enclave
    handler.enter_by.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_char_p, ctypes.c_uint64]
    function = ctypes.cast(vdso, ctypes.c_void_p)
    result: int = handler.enter_by(function, int(ffi.cast("uintptr_t", run)), call.address, key, ECALL)
    return result


@pytest.mark.parametrize("name", [b"plant", b"empty", b"random"])
def test_an_exit_leaves_nothing_in_the_registers(holder: Holder, handler: ctypes.CDLL, name: bytes) -> None:
    seen = left_registers(holder, handler, Call(name), holder.key)
    r9, r10, r11, _, r13, r14, r15 = seen.r9_to_r15  # R12 is the caller's again by now
    assert (r9, r10, r11, r13, r14, r15) == (0,) * 6
    # An FXSAVE area (SDM volume 1, 10.5.1): x87 registers, each with 6 reserved bytes that not every
    # processor writes, and XMM0 to XMM15.
    x87 = [bytes(seen.fxsave[at : at + 10]) for at in range(32, 160, 16)]
    assert x87 == [bytes(10)] * 8
    assert bytes(seen.fxsave[160:416]) == bytes(256)
