"""An SDK enclave entered register by register, with this process as its warden.

What tests/sdk needs below the client library: any key, any selector, any struct tm_call, and control
ECALLs with MACs that are made here (struct formats: native/include/teemate_abi.h).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from backends import NUMBER
from images import BuiltImage

from teemate._native import ffi, lib

ECALL, OCALL_RETURN, BIND, CONTROL, UNWIND = 0, 1, 2, 16, 17
EXIT_DONE, EXIT_OCALL, UNWOUND, INTERRUPTED = 0, 1, 2, 3
LEFT, PAUSED, LANDED = 0, 1, 2
EENTER, ERESUME, EEXIT = 2, 3, 4
FREE, ARMED, INSIDE, PARKED, CLEARED = 0, 1, 2, 3, 0x80

OK, ARGUMENT, UNKNOWN, UNBOUND, MAC, STATE = 0, -1, -2, -3, -4, -5
E_INTERRUPTED = -13
SPACE, NOTREADY = -7, -11

SET_KEY, ARM, CLEAR, PROBE, RESET, SSA, REWRITE, REINIT, TIME, AUTHOR, REPORT = range(1, 12)

RUN_NS = 1_000_000
"""What it takes at most to come to where a call loops."""

_HEADER = struct.Struct("<QIIIIIIQQQQQQQQQQQQ")
_CONTROL = struct.Struct("<IIQQQ16sQQ32s256s")
_RESULT = struct.Struct("<8Q448s")
_IDENTITY = struct.Struct("<32sIIQ")
_RESULT_OFFSET = 56


class Header(NamedTuple):
    """struct tm_image_header."""

    magic: int
    abi_version: int
    flags: int
    io_slots: int
    client_slots: int
    nssa: int
    ssa_frame_size: int
    size: int
    tcs_offset: int
    td_offset: int
    td_stride: int
    stack_offset: int
    stack_stride: int
    stack_size: int
    ssa_offset: int
    heap_offset: int
    heap_size: int
    rela_offset: int
    rela_count: int


class Left(NamedTuple):
    """How an entry ended: `landed`, a fault (`vector`), or EEXIT with these registers."""

    outcome: int
    function: int
    vector: int
    address: int
    rdi: int
    status: int
    length: int
    nonce: int
    r9: int

    @property
    def landed(self) -> bool:
        """The gate refused: arrived at the landing page."""
        return self.outcome == LANDED


class Result(NamedTuple):
    """struct tm_control_result, with the status before it."""

    status: int
    cssa: int
    word: int
    calls: int
    exitinfo: int
    rip: int
    maddr: int
    abi_version: int
    data: bytes

    @property
    def state(self) -> int:
        """Of the slot word, with the cleared bit."""
        return self.word & 0xFF

    @property
    def generation(self) -> int:
        """Of the slot word."""
        return self.word >> 8


def signed(value: int) -> int:
    """Read a register as a signed number."""
    return value - (1 << 64) if value >> 63 else value


def words(key: bytes) -> tuple[int, int]:
    """Split a key into what R12 and R13 carry."""
    first, second = struct.unpack("<QQ", key)
    return int(first), int(second)


@dataclass
class Call:
    """A struct tm_call whose fields can be spoilt before it is used; keeps its buffers alive."""

    name: bytes = b"empty"
    payload: bytes = b""
    capacity: int = 4096
    bind: bytes | None = None
    changes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._name = ffi.new("uint8_t[]", self.name or b"\0")
        self._in = ffi.new("uint8_t[]", self.payload or b"\0")
        self._out = ffi.new("uint8_t[]", max(self.capacity, 1))
        self.ocall = ffi.new("uint8_t[]", 8192)
        self._bind = ffi.new("uint8_t[]", self.bind) if self.bind else None
        fields = {
            "name": address(self._name),
            "name_len": len(self.name),
            "in": address(self._in),
            "in_len": len(self.payload),
            "out": address(self._out),
            "out_cap": self.capacity,
            "ocall_buf": address(self.ocall),
            "ocall_cap": 8192,
            "bind": address(self._bind) if self.bind else 0,
            "reserved": 0,
        } | self.changes
        self._call = ffi.new("uint8_t[]", struct.pack("<10Q", *fields.values()))

    @property
    def address(self) -> int:
        """Of the structure."""
        return address(self._call)

    def output(self, length: int) -> bytes:
        """Return the first bytes of the output."""
        return bytes(ffi.buffer(self._out, length))


def address(data: Any) -> int:
    """Address of a cffi object."""
    return int(ffi.cast("uintptr_t", data))


class Gate:
    """Created and mapped, and nothing else done to it unless `start` is asked for."""

    def __init__(self, image: BuiltImage, *, start: bool = True) -> None:
        handle = ffi.new("struct teemate_enclave **")
        diag = ffi.new("struct teemate_diag *")
        fd = os.open(image.sgxs, os.O_RDONLY)
        try:
            error = lib.teemate_create(NUMBER, 0, 0, fd, image.sigstruct.read_bytes(), handle, diag)
        finally:
            os.close(fd)
        assert not error, ffi.string(diag.text)
        self.native = handle[0]
        info = ffi.new("struct teemate_enclave_info *")
        assert not lib.teemate_enclave_describe(self.native, info)
        assert not lib.teemate_map(self.native, diag), ffi.string(diag.text)
        self.arena = lib.teemate_arena_create()
        assert self.arena >= 0
        assert not lib.teemate_map_arena(self.native, self.arena, diag), ffi.string(diag.text)
        self.base, self.size = int(info.base), int(info.size)
        self.header = Header(*_HEADER.unpack(bytes(ffi.buffer(info.header, 128))))
        self.slots = 2 + self.header.io_slots + self.header.client_slots
        for slot in range(self.slots):
            assert not lib.teemate_map_tcs(self.native, self.tcs(slot), diag), ffi.string(diag.text)
        self.key = os.urandom(16)
        self.sequence = 0
        if start:
            assert self.control(SET_KEY).status == OK

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        lib.teemate_close(self.native)
        os.close(self.arena)

    def tcs(self, slot: int) -> int:
        """Offset of a slot's TCS."""
        return self.header.tcs_offset + slot * 4096

    @property
    def mac_key(self) -> bytes:
        """What MACs are made with."""
        return hmac.digest(self.key, b"teemate mac key".ljust(16, b"\0"), "sha256")

    def enter(
        self,
        slot: int,
        key: bytes,
        rdi: int = 0,
        rsi: int = 0,
        rdx: int = 0,
        r8: int = 0,
        *,
        function: int = EENTER,
        pause_after_ns: int = 0,
        finish: bool = True,
    ) -> Left:
        """Enter and, unless told not to, resume until the thread has left by itself."""
        regs = ffi.new("struct teemate_regs *")
        run = ffi.new("struct sgx_enclave_run *")
        regs.rdi, regs.rsi, regs.rdx, regs.r8 = rdi, rsi, rdx & ((1 << 64) - 1), r8
        regs.r12, regs.r13 = words(key)
        while True:
            outcome = lib.teemate_enter(self.native, self.tcs(slot), regs, function, pause_after_ns, run)
            if outcome != PAUSED or not finish:
                break
            # Paused before EENTER had begun: the same again, with the key that was wiped.
            if run.function == EENTER:
                regs.r12, regs.r13 = words(key)
            else:
                function = ERESUME
        assert outcome >= 0, os.strerror(-outcome)
        return Left(
            outcome,
            run.function,
            run.exception_vector,
            run.exception_addr,
            regs.rdi,
            signed(regs.rsi),
            regs.rdx,
            regs.r8,
            regs.r9,
        )

    def interrupt(self, slot: int, key: bytes, rdi: int = 0, rsi: int = 0, *, function: int = EENTER) -> Left:
        """Enter, and stay out at an interrupt once the thread has run for a while.

        It may have lost its processor as soon as it was in: so what counts is its own time.
        """
        begin = time.thread_time_ns()
        while True:
            left = self.enter(slot, key, rdi, rsi, function=function, pause_after_ns=RUN_NS, finish=False)
            if left.outcome != PAUSED or time.thread_time_ns() - begin > RUN_NS:
                return left
            function = left.function

    # ---- as the warden -----------------------------------------------------------------

    def request(
        self,
        op: int,
        slot: int = 0,
        *,
        generation: int = 0,
        argument: int = 0,
        key: bytes = bytes(16),
        data: bytes = b"",
        sequence: int | None = None,
        result: int = 0,
    ) -> bytearray:
        """Make a struct tm_control with its MAC."""
        if sequence is None:
            self.sequence += 1
            sequence = self.sequence
        text = bytearray(
            _CONTROL.pack(op, 0, slot, generation, argument, key, sequence, result, bytes(32), data)
        )
        covered = b"teemate control".ljust(16, b"\0") + bytes(text[:_RESULT_OFFSET]) + bytes(text[96:])
        text[64:96] = hmac.digest(self.mac_key, covered, "sha256")
        return text

    def send(self, request: bytes | bytearray, *, tcs: int = 0, key: bytes | None = None) -> Result | Left:
        """Do a control ECALL with these bytes (but where the result goes): Left unless it answered."""
        raw = ffi.new("uint8_t[]", bytes(request))
        room = ffi.new("uint8_t[]", _RESULT.size)
        ffi.memmove(raw + _RESULT_OFFSET, struct.pack("<Q", address(room)), 8)
        left = self.enter(tcs, self.key if key is None else key, CONTROL, address(raw))
        if left.landed or left.function != EEXIT:
            return left
        cssa, word, calls, exitinfo, rip, maddr, version, length, data = _RESULT.unpack(
            bytes(ffi.buffer(room))
        )
        return Result(left.status, cssa, word, calls, exitinfo, rip, maddr, version, data[:length])

    def control(self, op: int, slot: int = 0, *, tcs: int = 0, **fields: Any) -> Result:
        """Do a control ECALL as it should be."""
        result = self.send(self.request(op, slot, **fields), tcs=tcs)
        assert isinstance(result, Result), result
        return result

    def author(self, name: bytes, data: bytes = b"", *, tcs: int = 0) -> Result:
        """Call a TM_CONTROL() of the image by name."""
        return self.control(AUTHOR, tcs=tcs, data=name.ljust(64, b"\0") + data)

    def binding(self, slot: int, generation: int, *, uid: int = 1000, grant: int = 7) -> bytes:
        """Make a struct tm_bind with its MAC."""
        principal = hashlib.sha256(f"uid={uid}".encode()).digest()
        identity = _IDENTITY.pack(principal, uid, uid, grant)
        label = b"teemate bind".ljust(16, b"\0")
        text = label + struct.pack("<QQ", slot, generation) + identity
        return struct.pack("<Q", generation) + identity + hmac.digest(self.mac_key, text, "sha256")

    def assign(self, slot: int, generation: int = 1, *, uid: int = 1000) -> Holder:
        """Arm the slot with a fresh key and bind an identity to it."""
        key = os.urandom(16)
        result = self.control(ARM, slot, generation=generation, key=key)
        assert result.status == OK, result
        holder = Holder(self, slot, key, generation, uid)
        assert holder.bind().status == OK
        return holder

    def release(self, holder: Holder) -> None:
        """Take the slot back: CLEAR, PROBE through its own TCS, RESET."""
        assert self.control(CLEAR, holder.slot, generation=holder.generation).status == OK
        probe = self.control(PROBE, holder.slot, tcs=holder.slot)
        assert (probe.status, probe.cssa, probe.state) == (OK, 0, FREE)
        assert self.control(RESET, holder.slot).status == OK

    def worker(self, holder: Holder, calls: Sequence[tuple[str, bytes]], *, repeat: int = 1) -> Worker:
        """Let another process do `calls` in the slot of `holder`, `repeat` times over."""
        segments = ffi.new("struct teemate_segment[]", 128)
        count = lib.teemate_enclave_segments(self.native, segments, 128)
        fd = lib.teemate_enclave_fd(self.native)
        order = {
            "backend": NUMBER,
            "fd": fd,
            "arena": self.arena,
            "base": self.base,
            "size": self.size,
            "segments": [[s.offset, s.size, s.prot, s.type] for s in segments[0:count]],
            "slot": holder.slot,
            "tcs": self.tcs(holder.slot),
            "generation": holder.generation,
            "key": holder.key.hex(),
            "bind": self.binding(holder.slot, holder.generation, uid=holder.uid).hex(),
            "calls": [[name, payload.hex()] for name, payload in calls],
            "repeat": repeat,
        }
        return Worker(order, (fd, self.arena))


class Worker:
    """A fresh interpreter that maps the enclave and calls (worker.py)."""

    def __init__(self, order: dict[str, object], fds: tuple[int, ...]) -> None:
        program = Path(__file__).with_name("worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=fds,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order))
        self._process.stdin.close()

    def replies(self) -> list[tuple[int, bytes]]:
        """Status and output of every call; waits for the process to end."""
        assert self._process.stdout is not None
        with self._process.stdout as out:
            replies = [line.split() for line in out]
        assert self._process.wait(timeout=60) == 0
        return [(int(reply[0]), bytes.fromhex(reply[1] if len(reply) > 1 else "")) for reply in replies]


@dataclass
class Holder:
    """Who has a slot's key."""

    gate: Gate
    slot: int
    key: bytes
    generation: int
    uid: int

    def bind(self, **changes: int) -> Left:
        """Bind the identity by an entry of its own."""
        raw = self.gate.binding(self.slot, self.generation, uid=self.uid, **changes)
        room = ffi.new("uint8_t[]", raw)
        return self.gate.enter(self.slot, self.key, BIND, address(room))

    def start(self, call: Call) -> Left:
        """Enter with a call; returns how the first entry ended."""
        return self.gate.enter(self.slot, self.key, ECALL, call.address)

    def call(self, name: bytes, payload: bytes = b"", capacity: int = 4096) -> tuple[int, bytes]:
        """Do an ECALL without OCALLs: status and output."""
        call = Call(name, payload, capacity)
        left = self.start(call)
        assert (left.outcome, left.function, left.rdi) == (LEFT, EEXIT, EXIT_DONE), left
        return left.status, call.output(min(left.length, capacity))
