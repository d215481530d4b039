"""Another process that maps the enclave and resumes whatever was interrupted on a TCS (test_unwind.py).

Reads one line of JSON; for each line that follows it does one ERESUME and says how that ended.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from teemate._native import ffi, lib

ERESUME = 3


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
    print("ready", flush=True)
    regs = ffi.new("struct teemate_regs *")
    run = ffi.new("struct sgx_enclave_run *")
    while sys.stdin.readline():
        outcome = lib.TEEMATE_PAUSED
        while outcome == lib.TEEMATE_PAUSED:
            outcome = lib.teemate_enter(handle[0], order["tcs"], regs, ERESUME, 0, run)
        print(outcome, run.function, regs.rdi, regs.rsi, regs.rdx, regs.r8, flush=True)


if __name__ == "__main__":
    main()
