"""How fast this host's time stamp counter counts, which is what the guest reads as its own.

A guest that finds that out by itself compares it with emulated timers while QEMU waits for a processor.  On a
host with other work it was found four times too slow, so that the guest's clock ran four times too
fast and every deadline in there was over before its time.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time

_READ = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
_INTERVAL = 0.1


def frequency() -> int | None:
    """Return kHz, as the counter and CLOCK_MONOTONIC have it, or None where it cannot be read."""
    if platform.machine() != "x86_64":
        return None
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    code.write(_READ)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))

    def now() -> tuple[int, int]:
        """Both at one moment: of some tries that which nothing came between."""
        tries = []
        for _ in range(50):
            before, counter, after = time.monotonic_ns(), read(), time.monotonic_ns()
            tries.append((after - before, (before + after) // 2, counter))
        _, clock, counter = min(tries)
        return clock, counter

    clock, counter = now()
    time.sleep(_INTERVAL)
    later, counted = now()
    return (counted - counter) * 1_000_000 // (later - clock)
