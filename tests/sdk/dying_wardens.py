"""Let a warden die at random instructions of its control ECALLs, and its successor do them again.

Run by test_deaths.py in a process of its own, with TEEMATE_TICK: it decides when threads that are
inside are interrupted, and with tests/ on its path.  Prints how many deaths there were.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gate import (
    ARM,
    ARMED,
    CLEAR,
    CONTROL,
    ERESUME,
    FREE,
    LANDED,
    OK,
    PAUSED,
    PROBE,
    REINIT,
    RESET,
    REWRITE,
    SET_KEY,
    Gate,
    Holder,
    address,
)
from images import BuiltImage

from teemate._native import ffi

ROUNDS = 5000
ATTEMPTS = 6
"""An operation that was done before its warden could die is done again, which must change nothing."""


class Wardens:
    """A warden, and after it the next."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.deaths = 0

    def die_in(self, request: bytes, tcs: int) -> bool:
        """Do a control ECALL, but be killed at the first interrupt; whether that came in time."""
        raw = ffi.new("uint8_t[]", request)
        left = self.gate.enter(tcs, self.gate.key, CONTROL, address(raw), pause_after_ns=1, finish=False)
        if left.outcome != PAUSED or left.function != ERESUME:
            return False
        self.deaths += 1
        return True

    def repair(self, broken: int) -> None:
        other = 1 - broken
        frames = self.gate.control(PROBE, tcs=broken).cssa
        assert self.gate.control(REWRITE, broken, argument=frames, tcs=other).status == OK
        for _ in range(frames):
            assert self.gate.enter(broken, bytes(16), function=ERESUME).outcome == LANDED
        assert self.gate.control(PROBE, tcs=broken).cssa == 0
        assert self.gate.control(REINIT, broken, tcs=other).status == OK

    def do(self, op: int, slot: int, round_: int, **fields: int | bytes) -> None:
        """Die in it perhaps, repair, then do it as the next warden does."""
        tcs = round_ % 2
        for _ in range(ATTEMPTS):
            if self.die_in(bytes(self.gate.request(op, slot, **fields)), tcs):  # type: ignore[arg-type]
                self.repair(tcs)
                break
        result = self.gate.control(op, slot, tcs=tcs, **fields)
        assert result.status == OK, (op, round_, result)


def start(image: BuiltImage, wardens: list[int]) -> Gate:
    """Be killed in SET_KEY, and start the enclave all the same."""
    gate = Gate(image, start=False)
    first = Wardens(gate)
    died = first.die_in(bytes(gate.request(SET_KEY)), 0)
    if died:
        assert gate.control(SET_KEY, tcs=1).status == OK
        first.repair(0)
    assert gate.control(SET_KEY).status == OK
    wardens.append(int(died))
    return gate


def main() -> None:
    """Arguments: image, SIGSTRUCT, and how many deaths are enough."""
    sgxs, sigstruct, enough = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    image = BuiltImage(
        name="faults", sgxs=sgxs, sigstruct=sigstruct, elf=sgxs.with_suffix(".elf"), mrenclave=b"", slots=8
    )
    starts: list[int] = []
    for _ in range(6):
        with start(image, starts):
            pass
    with start(image, starts) as gate:
        wardens = Wardens(gate)
        for round_ in range(ROUNDS):
            if wardens.deaths >= enough:
                break
            generation, key = round_ + 1, os.urandom(16)
            wardens.do(ARM, 2, round_, generation=generation, key=key)
            assert gate.control(PROBE, tcs=2).word == generation << 8 | ARMED
            holder = Holder(gate, 2, key, generation, 1000)
            assert holder.bind().status == OK
            assert holder.call(b"search") == (OK, bytes(24))
            assert holder.call(b"plant") == (OK, b"")
            wardens.do(CLEAR, 2, round_, generation=generation)
            assert gate.control(PROBE, tcs=2).word == generation << 8 | FREE
            wardens.do(RESET, 2, round_)
        print(sum(starts), wardens.deaths)


if __name__ == "__main__":
    main()
