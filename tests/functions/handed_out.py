"""One slot that is handed out again and again, with functions that are ready in it or not."""

from __future__ import annotations

import struct

import modules as wasm
from function_enclaves import ERESUME, OK, Gate, Holder, functions_of, owner
from gate import ARM, LANDED, PROBE, REINIT, REWRITE

from teemate.functions import Functions
from teemate.functions import _wire as wire

ALICE, BOB, CAROL = 1001, 1002, 1003
HELLO = wasm.printing(b"hello")


def invoked(holder: Holder, name: str) -> tuple[bytes, bool]:
    """What a function wrote, and whether its module was ready."""
    status, reply = holder.call(b"invoke", wire.invoke(name, b"", (), None, None), wire.room_for(1 << 20))
    assert status == OK
    text, length, warm = struct.unpack_from("<3I", reply, 32)
    return reply[48 + text : 48 + text + length], bool(warm)


class Slots:
    """Hands one slot out again and again, as a broker does; CAROL, who has nothing there, looks on."""

    def __init__(self, gate: Gate, slot: int = 2, onlooker: int = 5) -> None:
        self.gate = gate
        self.slot = slot
        self.generation = 0
        self.holder: Holder | None = None
        self.carol = owner(gate, onlooker, CAROL)

    def free(self, *, waited_for: bool = False) -> None:
        """Take it back from whoever has it, and arm it again."""
        if self.holder is not None:
            self.gate.release(self.holder)
        self.generation += 1
        self.key = bytes([self.generation % 255 + 1]) * 16
        fields = {"generation": self.generation, "argument": int(waited_for), "key": self.key}
        assert self.gate.control(ARM, self.slot, **fields).status == OK

    def take(self, uid: int) -> Holder:
        """Its next holder."""
        self.holder = Holder(self.gate, self.slot, self.key, self.generation, uid)
        assert self.holder.bind().status == OK
        return self.holder

    def next(self, uid: int) -> Holder:
        """Both."""
        self.free()
        return self.take(uid)

    def starts(self, uid: int, *functions: str, times: int = 2) -> list[bool]:
        """Each function so often, by a new holder each time; whether it was ready."""
        return [invoked(self.next(uid), name)[1] for _ in range(times) for name in functions]

    @property
    def ready(self) -> int:
        """Bytes that are ready in free slots."""
        return self.carol.usage().heap_ready


def deploy(slots: Slots, uid: int, name: str, module: bytes = HELLO, **options: object) -> Functions:
    functions = functions_of(slots.next(uid))
    functions.deploy(name, module, **options)  # type: ignore[arg-type]
    return functions


def large(size: int, functions: int = 100) -> bytes:
    """A module of about so many bytes, which does not become smaller by being compiled."""
    step = wasm.i32(8) + wasm.i32(1) + wasm.I32_STORE
    code = step * (size // functions // len(step))
    return wasm.command(wasm.write(1, 0, 1), functions=[code] * functions)


def repair_warden(gate: Gate, broken: int) -> None:
    """As its successor does, through the other TCS."""
    frames = gate.control(PROBE, tcs=broken).cssa
    assert gate.control(REWRITE, broken, argument=frames, tcs=1 - broken).status == OK
    for _ in range(frames):
        assert gate.enter(broken, bytes(16), function=ERESUME).outcome == LANDED
    assert gate.control(REINIT, broken, tcs=1 - broken).status == OK
