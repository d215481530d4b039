"""A broker for one warden, as small as it can be: it speaks over a socketpair and keeps deadlines."""

from __future__ import annotations

import array
import ctypes
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import warden_wire as wire
from backends import NUMBER, PATIENCE

from teemate._native import ffi, lib

HANGS_WORD = 4096 - 4
"""Offset in the arena of what an enclave says that hangs (enclave.c)."""


def warden_program() -> Path:
    """Where the package keeps its warden."""
    return Path(str(files("teemate") / "libexec" / "teemate-warden"))


def check(result: int, diag: Any = None) -> int:
    """Raise OSError for a negative errno of libteemate."""
    if result < 0:
        text = ffi.string(diag.text).decode() if diag is not None else ""
        raise OSError(-result, f"{os.strerror(-result)}: {text}")
    return result


def hangs(arena: int) -> bool:
    """Whether somebody has come to where the enclave with this arena hangs since this was last asked."""
    if os.pread(arena, 4, HANGS_WORD) == bytes(4):
        return False
    os.pwrite(arena, bytes(4), HANGS_WORD)
    return True


class Enclave:
    """An enclave that the test built, as the broker holds it: never mapped, never entered."""

    def __init__(self, sgxs: Path, sigstruct: Path) -> None:
        diag = ffi.new("struct teemate_diag *")
        pointer = ffi.new("struct teemate_enclave **")
        with sgxs.open("rb") as file:
            signature = ffi.new("uint8_t[]", sigstruct.read_bytes())
            check(lib.teemate_create(NUMBER, 0, 0, file.fileno(), signature, pointer, diag), diag)
        self.handle = pointer[0]
        self.arena = check(lib.teemate_arena_create())
        info = ffi.new("struct teemate_enclave_info *")
        check(lib.teemate_enclave_describe(self.handle, info))
        self.base: int = info.base
        self.size: int = info.size
        count = lib.teemate_enclave_segments(self.handle, ffi.NULL, 0)
        self.segments = ffi.new("struct teemate_segment[]", count)
        lib.teemate_enclave_segments(self.handle, self.segments, count)
        tcs_count = lib.teemate_enclave_tcs(self.handle, ffi.NULL, 0)
        offsets = ffi.new("uint64_t[]", tcs_count)
        lib.teemate_enclave_tcs(self.handle, offsets, tcs_count)
        self.tcs = list(offsets)
        self.fd: int = lib.teemate_enclave_fd(self.handle)
        self.control_key = os.urandom(16)
        self._sequence = 0

    def close(self) -> None:
        """Give the enclave up."""
        lib.teemate_close(self.handle)
        os.close(self.arena)

    def await_hang(self, warden: Warden) -> None:
        """Return when `warden` hangs in tests/warden/enclave.c, which says so in the arena's last word."""
        while not self.hangs():
            assert not warden.answers_within(0.001)

    def hangs(self) -> bool:
        """Whether somebody has come to where it hangs since this was last asked."""
        return hangs(self.arena)

    def sequence(self) -> int:
        """Return the number of the next request with a MAC."""
        self._sequence = max(self._sequence + 1, time.monotonic_ns())
        return self._sequence

    # What a processor keeps of a TCS, at its place in the sim's file (native/lib/sim.h).
    def tcs_place(self, slot: int) -> int:
        table = self.size + 4096
        for place in range(table, table + 4096 * 64, 64):
            if int.from_bytes(os.pread(self.fd, 8, place + 8), "little") == self.tcs[slot]:
                return place
        raise LookupError(slot)

    def tcs_word(self, slot: int) -> int:
        """Return busy | CSSA << 8 | holder << 32."""
        return int.from_bytes(os.pread(self.fd, 8, self.tcs_place(slot)), "little")

    def set_tcs_word(self, slot: int, word: int) -> None:
        """Leave a TCS as somebody who died in it."""
        os.pwrite(self.fd, word.to_bytes(8, "little"), self.tcs_place(slot))

    def nssa(self, slot: int) -> int:
        """Return how many SSA frames the TCS has."""
        return int.from_bytes(os.pread(self.fd, 4, self.tcs_place(slot) + 56), "little")


class Warden:
    """A running warden and the broker's end of its socketpair."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # 3 is where a warden looks; the shell puts it there without touching our descriptors.
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", 'exec "$0" 3<&0 0</dev/null', str(warden_program())],
                stdin=theirs.fileno(),
            )
        self._id = 0

    def send_raw(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send bytes, perhaps with descriptors."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([data], rights)

    def receive(self) -> wire.WardenReply:
        """Return the next reply; EOFError when the warden has ended."""
        data = self.socket.recv(4096)
        if not data:
            raise EOFError
        assert len(data) == ctypes.sizeof(wire.WardenReply)
        return wire.WardenReply.from_buffer_copy(data)

    def send(self, request: wire.WardenRequest, fds: tuple[int, ...] = ()) -> int:
        """Send a request and return its id."""
        self._id += 1
        request.version = wire.PROTOCOL_VERSION
        request.id = self._id
        self.send_raw(bytes(request), fds)
        return self._id

    def ask(self, request: wire.WardenRequest, fds: tuple[int, ...] = ()) -> wire.WardenReply:
        """Send a request and return its reply."""
        number = self.send(request, fds)
        reply = self.receive()
        assert reply.id == number
        return reply

    def start(self, enclave: Enclave, **changes: Any) -> wire.WardenReply:
        """START with the enclave's fd and arena."""
        number = self.send_start(enclave, **changes)
        reply = self.receive()
        assert reply.id == number
        return reply

    def send_start(self, enclave: Enclave, **changes: Any) -> int:
        """START that may not come back."""
        request = wire.WardenRequest(op=wire.START)
        start = request.body.start
        start.base = enclave.base
        start.size = enclave.size
        start.backend = NUMBER
        start.segment_count = len(enclave.segments)
        ctypes.memmove(start.control_key, enclave.control_key, 16)
        for i, segment in enumerate(enclave.segments):
            start.segments[i] = wire.WardenSegment(
                offset=segment.offset, size=segment.size, prot=segment.prot, type=segment.type
            )
        for name, value in changes.items():
            setattr(start, name, value)
        return self.send(request, (enclave.fd, enclave.arena))

    def control_request(
        self,
        enclave: Enclave,
        op: int,
        *,
        slot: int = 0,
        generation: int = 0,
        argument: int = 0,
        key: bytes = bytes(16),
        data: bytes = b"",
    ) -> wire.WardenRequest:
        """Build a control ECALL with its MAC."""
        request = wire.WardenRequest(op=wire.CONTROL)
        control = request.body.control
        control.op = op
        control.slot = slot
        control.generation = generation
        control.argument = argument
        control.sequence = enclave.sequence()
        ctypes.memmove(control.key, key, 16)
        ctypes.memmove(control.data, data.ljust(256, b"\0"), 256)
        wire.sign(enclave.control_key, control)
        return request

    def control(self, enclave: Enclave, op: int, **arguments: Any) -> wire.WardenReply:
        """Make a control ECALL."""
        return self.ask(self.control_request(enclave, op, **arguments))

    def author(self, enclave: Enclave, name: str, data: bytes = b"") -> wire.WardenReply:
        """Make a control ECALL of the image's author."""
        return self.control(enclave, wire.AUTHOR, data=name.encode().ljust(64, b"\0") + data)

    def send_author(self, enclave: Enclave, name: str) -> None:
        """Make one that may not come back."""
        self.send(self.control_request(enclave, wire.AUTHOR, data=name.encode().ljust(64, b"\0")))

    def probe(self, slot: int) -> wire.WardenReply:
        """PROBE a slot through its own TCS."""
        request = wire.WardenRequest(op=wire.PROBE)
        request.body.control.slot = slot
        return self.ask(request)

    @staticmethod
    def repair_request(slot: int, generation: int, *, dead: bool) -> wire.WardenRequest:
        """Build a REPAIR."""
        request = wire.WardenRequest(op=wire.REPAIR)
        request.body.repair.slot = slot
        request.body.repair.generation = generation
        request.body.repair.holder_dead = int(dead)
        return request

    def repair(self, slot: int, generation: int, *, dead: bool) -> wire.WardenReply:
        """REPAIR a slot whose key was taken away, with a deadline as the broker's."""
        number = self.send(self.repair_request(slot, generation, dead=dead))
        assert self.answers_within(20 * PATIENCE), "the repair hangs"
        reply = self.receive()
        assert reply.id == number
        return reply

    def renew_request(
        self,
        enclave: Enclave,
        slot: int,
        generation: int,
        key: bytes,
        *,
        dead: bool,
        armed: int | None = None,
    ) -> wire.WardenRequest:
        """Build a RENEW, which arms `generation` + 1 unless `armed` says otherwise."""
        request = wire.WardenRequest(op=wire.RENEW)
        renew = request.body.renew
        next_generation = generation + 1 if armed is None else armed
        for part, op, arguments in (
            (renew.clear, wire.CLEAR, {"generation": generation}),
            (renew.reset, wire.RESET, {}),
            (renew.arm, wire.ARM, {"generation": next_generation, "key": key}),
        ):
            one = self.control_request(enclave, op, slot=slot, **arguments)
            ctypes.memmove(ctypes.addressof(part), ctypes.addressof(one.body.control), ctypes.sizeof(part))
        renew.holder_dead = int(dead)
        return request

    def renew(
        self, enclave: Enclave, slot: int, generation: int, key: bytes, *, dead: bool
    ) -> wire.WardenReply:
        """RENEW a slot, with a deadline as the broker's."""
        number = self.send(self.renew_request(enclave, slot, generation, key, dead=dead))
        assert self.answers_within(20 * PATIENCE), "the renewal hangs"
        reply = self.receive()
        assert reply.id == number
        return reply

    def ping(self) -> wire.WardenReply:
        """PING."""
        return self.ask(wire.WardenRequest(op=wire.PING))

    def answers_within(self, seconds: float) -> bool:
        """Keep a deadline, as the broker does."""
        return bool(select.select([self.socket], [], [], seconds)[0])

    def kill(self) -> None:
        """End a warden that missed its deadline, and reap it."""
        self.process.kill()
        self.process.wait()
        self.socket.close()

    def close(self) -> int:
        """Close the socketpair and return how the warden ended."""
        self.socket.close()
        return int(self.process.wait(timeout=60))

    def descriptors(self) -> list[str]:
        """Return what the warden's descriptors are."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        return sorted(os.readlink(folder / name) for name in os.listdir(folder))


class Client:
    """This process as a client of the enclave: alias mapping and one slot."""

    def __init__(self, enclave: Enclave) -> None:
        diag = ffi.new("struct teemate_diag *")
        pointer = ffi.new("struct teemate_enclave **")
        check(
            lib.teemate_open(
                NUMBER,
                os.dup(enclave.fd),
                enclave.base,
                enclave.size,
                enclave.segments,
                len(enclave.segments),
                pointer,
                diag,
            ),
            diag,
        )
        self.handle = pointer[0]
        self._enclave = enclave
        check(lib.teemate_map(self.handle, diag), diag)
        check(lib.teemate_map_arena(self.handle, enclave.arena, diag), diag)

    def slot(self, *, index: int, generation: int, key: bytes, principal: str = "uid=0") -> Slot:
        """Open a slot that the warden armed."""
        args = ffi.new("struct teemate_slot_args *")
        args.index = index
        args.tcs_offset = self._enclave.tcs[index]
        args.generation = generation
        ffi.memmove(args.key, key, 16)
        text = wire.bind(
            self._enclave.control_key, slot=index, generation=generation, principal=principal, uid=0
        )
        ffi.memmove(args.bind, text, len(text))
        return Slot(self.handle, args)

    def close(self) -> None:
        """Unmap everything."""
        lib.teemate_close(self.handle)


class Result:
    """How a call ended."""

    def __init__(self, call: Any, out: bytes) -> None:
        self.outcome: int = call.outcome
        self.status: int = call.status
        self.length: int = call.out_length
        self.out = out
        self.vector: int = call.run.exception_vector
        self.function: int = call.run.function


Handler = Callable[[bytes, bytes], "bytes | None"]


class Slot:
    """A slot and the calls through it."""

    def __init__(self, enclave: Any, args: Any) -> None:
        diag = ffi.new("struct teemate_diag *")
        pointer = ffi.new("struct teemate_slot **")
        check(lib.teemate_slot_open(enclave, args, pointer, diag), diag)
        self.handle = pointer[0]
        self.last = ffi.new("struct teemate_call *")
        self._kept: tuple[Any, ...] = ()

    def begin(self, name: str, data: bytes = b"", *, capacity: int = 4096, pause_ns: int = 0) -> int:
        """Call and return the result of the C function; `last` tells the rest."""
        text = ffi.new("char[]", name.encode())
        source = ffi.new("uint8_t[]", data or b"\0")
        out = ffi.new("uint8_t[]", max(capacity, 1))
        self._kept = (text, source, out)
        return int(
            lib.teemate_slot_call(
                self.handle, text, len(name), source, len(data), out, capacity, pause_ns, self.last
            )
        )

    def stand(self, name: str, hangs: Callable[[], bool]) -> None:
        """Begin a call that hangs, and leave it paused there: not where it was let in."""
        check(self.begin(name, pause_ns=1))
        while not hangs():
            assert self.last.outcome == lib.TEEMATE_CALL_PAUSED
            check(lib.teemate_slot_resume(self.handle, 1, self.last))
        assert self.last.outcome == lib.TEEMATE_CALL_PAUSED

    def go_on(self) -> None:
        """Resume while the call is paused: on sgx ticks pause it without a reason of ours."""
        while self.last.outcome == lib.TEEMATE_CALL_PAUSED:
            check(lib.teemate_slot_resume(self.handle, 0, self.last))

    def finish(self, handler: Handler | None = None) -> Result:
        """Resume and answer until the call is done."""
        while True:
            if self.last.outcome == lib.TEEMATE_CALL_PAUSED:
                check(lib.teemate_slot_resume(self.handle, 0, self.last))
            elif self.last.outcome == lib.TEEMATE_CALL_OCALL:
                name = bytes(ffi.buffer(self.last.ocall_name, self.last.ocall_name_length))
                data = bytes(ffi.buffer(self.last.ocall_data, self.last.ocall_length))
                answer = handler(name, data) if handler is not None else None
                check(
                    lib.teemate_slot_answer(
                        self.handle,
                        0 if answer is not None else -1,
                        answer or b"",
                        len(answer or b""),
                        0,
                        self.last,
                    )
                )
            else:
                length = min(self.last.out_length, len(self._kept[2]))
                return Result(self.last, bytes(ffi.buffer(self._kept[2], length)))

    def call(
        self, name: str, data: bytes = b"", *, capacity: int = 4096, handler: Handler | None = None
    ) -> Result:
        """Call to the end."""
        check(self.begin(name, data, capacity=capacity))
        return self.finish(handler)

    def abandon(self) -> None:
        """Give the call up."""
        lib.teemate_slot_abandon(self.handle)

    def close(self) -> int:
        """Close; 1 when nothing was left inside."""
        return int(lib.teemate_slot_close(self.handle))
