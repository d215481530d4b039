"""Let another process resume the warden's own entry into a client's slot, at an interrupt of the warden's.

Run by test_unwind.py in a process of its own, with TEEMATE_TICK and with tests/ on its path.  Prints how
many entries were stolen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from backends import NUMBER
from gate import CLEAR, ECALL, ERESUME, LANDED, OK, PAUSED, UNWIND, UNWOUND, Call, Gate
from images import BuiltImage
from processes import DEADLINE

from teemate._native import ffi, lib

SLOT, GENERATION = 2, 1


def tcs_place(gate: Gate, fd: int) -> int:
    """Where the sim keeps the TCS's word (native/lib/sim.h)."""
    table = gate.size + 4096
    for place in range(table, table + 4096 * 64, 64):
        if int.from_bytes(os.pread(fd, 8, place + 8), "little") == gate.tcs(SLOT):
            return place
    raise LookupError(SLOT)


def start_thief(gate: Gate, fd: int) -> subprocess.Popen[str]:
    """Start the other process."""
    segments = ffi.new("struct teemate_segment[]", 128)
    count = lib.teemate_enclave_segments(gate.native, segments, 128)
    order = {
        "backend": NUMBER,
        "fd": fd,
        "base": gate.base,
        "size": gate.size,
        "segments": [[s.offset, s.size, s.prot, s.type] for s in segments[0:count]],
        "tcs": gate.tcs(SLOT),
    }
    thief = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("thief.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(fd,),
    )  # fmt: skip
    assert thief.stdin is not None
    print(json.dumps(order), file=thief.stdin, flush=True)
    assert thief.stdout is not None
    assert thief.stdout.readline() == "ready\n"
    return thief


def main() -> None:
    """Arguments: image, SIGSTRUCT, how many thefts."""
    sgxs, sigstruct, thefts = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    image = BuiltImage(
        name="faults", sgxs=sgxs, sigstruct=sigstruct, elf=sgxs.with_suffix(".elf"), mrenclave=b"", slots=8
    )
    stolen = 0
    with Gate(image) as gate:
        fd: int = lib.teemate_enclave_fd(gate.native)
        holder = gate.assign(SLOT, GENERATION)
        loop = Call(b"loop")
        left = gate.enter(SLOT, holder.key, ECALL, loop.address, pause_after_ns=1, finish=False)
        assert left.outcome == PAUSED
        assert gate.control(CLEAR, SLOT, generation=GENERATION).status == OK
        # Many frames take long to rewrite: long enough to be interrupted in.
        frames = gate.header.nssa - 2
        os.pwrite(fd, (frames << 8).to_bytes(8, "little"), tcs_place(gate, fd))
        thief = start_thief(gate, fd)
        assert thief.stdin is not None
        assert thief.stdout is not None
        # A quick machine with nothing else to do is seldom interrupted in an entry: once in a second or two.
        end = time.monotonic() + DEADLINE
        while stolen < thefts and time.monotonic() < end:
            left = gate.enter(SLOT, gate.key, UNWIND, GENERATION, pause_after_ns=1, finish=False)
            if left.outcome != PAUSED or left.function != ERESUME:
                assert (left.outcome, left.rdi, left.status) == (LANDED, UNWOUND, frames)
                continue
            print("steal", file=thief.stdin, flush=True)
            outcome, _, rdi, cssa, _, done, own_stack = map(int, thief.stdout.readline().split())
            assert (outcome, rdi, cssa, done, own_stack) == (LANDED, UNWOUND, frames, 1, 1)
            # What is left for the warden to resume is a frame that its entry has rewritten.
            after = gate.enter(SLOT, bytes(16), function=ERESUME)
            assert (after.outcome, after.rdi) == (LANDED, 0)
            os.pwrite(fd, (frames << 8).to_bytes(8, "little"), tcs_place(gate, fd))
            stolen += 1
        thief.kill()
        thief.communicate()
    print(stolen)


if __name__ == "__main__":
    main()
