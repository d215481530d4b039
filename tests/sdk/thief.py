"""Another process that maps the enclave and resumes whatever was interrupted on a TCS (test_unwind.py).

Reads one line of JSON; for each line that follows it does one ERESUME and says how that ended, and whether it
came to the landing page on its own stack: there a signal would put its frame.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import struct
import sys
from typing import Any

from teemate._native import ffi, lib

ERESUME = 3
PAGE = 4096


def watch_the_landing(address: int) -> ctypes.c_uint64:
    """Have the landing page leave RSP in what is returned before it goes on as ever."""
    rsp = ctypes.c_uint64()
    goes_to = ctypes.string_at(address + 6, 8)  # native/lib/landing.c
    code = bytes.fromhex("f30f1efa 4889e0 48a3")  # endbr64; mov %rsp, %rax; movabs %rax, (...)
    code += struct.pack("<Q", ctypes.addressof(rsp))
    code += bytes.fromhex("48b8") + goes_to + bytes.fromhex("ffe0")  # movabs $..., %rax; jmp *%rax
    mprotect = ctypes.CDLL(None).mprotect
    place = ctypes.c_void_p(address)
    assert mprotect(place, PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    ctypes.memmove(address, code, len(code))
    assert mprotect(place, PAGE, mmap.PROT_READ | mmap.PROT_EXEC) == 0
    return rsp


def stack() -> range:
    """Where the main thread's stack is, and has been."""
    with open("/proc/self/maps") as maps:
        (line,) = [line for line in maps if line.rstrip().endswith("[stack]")]
    first, end = (int(part, 16) for part in line.split()[0].split("-"))
    return range(first, end)


def main() -> None:
    """Map, then steal when told to."""
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    segments = ffi.new("struct teemate_segment[]", len(order["segments"]))
    for place, (offset, size, prot, kind) in zip(segments, order["segments"], strict=True):
        place.offset, place.size, place.prot, place.type = offset, size, prot, kind
    handle = ffi.new("struct teemate_enclave **")
    error = lib.teemate_open(
        order["backend"], order["fd"], order["base"], order["size"], segments, len(segments), handle, ffi.NULL
    )
    error = error or lib.teemate_map(handle[0], ffi.NULL)
    error = error or lib.teemate_map_tcs(handle[0], order["tcs"], ffi.NULL)
    assert error == 0
    rsp = watch_the_landing(order["base"] + order["size"])
    print("ready", flush=True)
    regs = ffi.new("struct teemate_regs *")
    run = ffi.new("struct sgx_enclave_run *")
    while sys.stdin.readline():
        outcome = lib.TEEMATE_PAUSED
        while outcome == lib.TEEMATE_PAUSED:
            outcome = lib.teemate_enter(handle[0], order["tcs"], regs, ERESUME, 0, run)
        own = int(rsp.value in stack())
        print(outcome, run.function, regs.rdi, regs.rsi, regs.rdx, regs.r8, own, flush=True)


if __name__ == "__main__":
    main()
