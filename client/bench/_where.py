"""What a program was doing: read from its registers and its enclave's memory while it is stopped.

``ptrace(PTRACE_SEIZE)`` and PTRACE_INTERRUPT stop a thread wherever it is, also inside of the sim's enclave
where signals are blocked; the program notices nothing and does not run on before it is killed.  Only the
main thread enters.  On hardware nobody sees inside: a thread that the kernel has interrupted there stands at
the AEP, in the vDSO.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import signal
import struct
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, final

from elftools.elf.elffile import ELFFile

from teemate.errors import InternalError, Unsupported
from teemate.image import inspect
from teemate.image.elf import Symbols

__all__ = ["INSIDE", "MET", "Observer", "State"]

_SEIZE, _INTERRUPT, _GETREGS, _CONT, _POKEUSER = 0x4206, 0x4207, 12, 7, 6
_DEBUG_REGISTERS = 848  # offsetof(struct user, u_debugreg)
_DR7, _EXECUTE_DR0 = _DEBUG_REGISTERS + 7 * 8, 1
_WALL = 0x40000000
_LOOK_PAUSE = 0.0001
_REGISTERS = struct.Struct("<27Q")  # struct user_regs_struct
_RAX, _RDI, _ORIG_RAX, _RIP = 10, 14, 15, 16
_FUTEX = 202
_ENCLU, _ERESUME = b"\x0f\x01\xd7", 3
_TD_WORD = 0x30  # native/sdk/thread.h
_SLOT_STATE = 0x7F
_INSIDE_WORD, _PARKED_WORD = 2, 3


class State(enum.StrEnum):
    """Where a program was at its death."""

    OUTSIDE = "outside"
    GATE = "gate"
    """On the way in: before the ECALL's function runs."""
    EXIT = "exit"
    """On the way out: the ECALL's function is over."""
    HEAP = "heap"
    """In the allocator or one of its redo records."""
    LOCK = "lock held"
    OCALL = "ocall"
    """The slot is parked."""
    INTERRUPTED = "interrupted"
    """Out by an AEX: the slot has CSSA 1 or more."""
    INSIDE = "inside"
    """Anywhere else in the enclave, or on hardware anywhere in it."""


INSIDE = frozenset(State) - {State.OUTSIDE}
MET: dict[str, frozenset[State]] = {
    "sim": frozenset(State) - {State.INTERRUPTED},  # that takes a call of 5 ms and more
    "sgx": frozenset({State.OUTSIDE, State.INSIDE}),
}
"""What programs can be told to be doing, again and again, by backend."""
_WAY_IN = {"tm_gate_client", "ecall", "bind_identity", "range_outside"}
_HEAP_FILES = {"heap.c", "owned.c", "txn.c"}
_PLACES = {
    State.GATE: "tm_entry",
    State.EXIT: "tm_gate_leave",
    State.HEAP: "tm_alloc",
    State.LOCK: "tm_unlock",
    State.INSIDE: "tm_lock",
}
"""Where a program is sure to come by in that state."""


@final
class Observer:
    """Knows one image; looks at one process at a time."""

    def __init__(self, image: Path, elf: Path) -> None:
        info = inspect(image)
        if info.header is None:
            raise InternalError(f"{image} is no image of the SDK")
        self._size = info.size
        self._td_offset, self._td_stride = info.header.td_offset, info.header.td_stride
        self._symbols = Symbols(elf)
        self._symbols.at(0)  # reads the file now, not at the first kill
        with elf.open("rb") as file:
            parsed = ELFFile(file)
            self._lock_count = _member_offset(parsed, "thread", "lock_count")
            self._leave = _label(parsed, "tm_gate_leave")
            self._turned_away = _label(parsed, "tm_gate_turned_away")
            self._places = {state: _symbol(parsed, name) for state, name in _PLACES.items()}
        self._libc = ctypes.CDLL(None, use_errno=True)

    def kill(
        self, pid: int, base: int, slot: int, *, aim: Container[State] = frozenset(State), looks: int = 1
    ) -> State | None:
        """SIGKILL the process after a look at its main thread; None when it had ended by itself.

        It may run on until it is in one of the states `aim`, but not for longer than so many looks.
        """
        return self._killed(pid, lambda: self._let_go_on(pid, base, slot, aim, looks))

    def kill_at(self, pid: int, base: int, slot: int, wanted: State, *, patience: float) -> State | None:
        """SIGKILL the process as soon as it is in that state, or `patience` seconds later in whatever state.

        Returns the state that it was in; None when it had ended by itself.
        """
        return self._killed(pid, lambda: self._run_to(pid, base, slot, wanted, patience))

    def _killed(self, pid: int, last_steps: Callable[[], State | None]) -> State | None:
        try:
            self._ptrace(_SEIZE, pid)
        except ProcessLookupError:
            return None
        state = None
        with contextlib.suppress(ProcessLookupError):
            state = last_steps()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        while True:  # what the tracer is told of comes before what the parent is told of
            try:
                _, status = os.waitpid(pid, _WALL)
            except ChildProcessError:
                return None  # the end was told already
            if not os.WIFSTOPPED(status):
                return state

    def _let_go_on(self, pid: int, base: int, slot: int, aim: Container[State], looks: int) -> State | None:
        state = None
        while looks:
            self._ptrace(_INTERRUPT, pid)
            _, status = os.waitpid(pid, _WALL)
            if not os.WIFSTOPPED(status):
                return None
            state = self._look(pid, base, slot)
            looks = 0 if state in aim else looks - 1
            if looks:
                self._go_on(pid, status)
                time.sleep(_LOOK_PAUSE)
        return state

    def _run_to(self, pid: int, base: int, slot: int, wanted: State, patience: float) -> State | None:
        """To a breakpoint of the processor's, since others run the same code; without one by looks."""
        end = time.monotonic() + patience
        self._ptrace(_INTERRUPT, pid)
        looks = False
        while True:
            status = _stopped(pid, end, _LOOK_PAUSE if looks else patience)
            if status is None:  # it runs
                self._ptrace(_INTERRUPT, pid)
                _, status = os.waitpid(pid, _WALL)
            if not os.WIFSTOPPED(status):
                return None
            state = self._look(pid, base, slot)
            if state == wanted or time.monotonic() > end:
                return state
            looks = looks or not self._breakpoint(pid, base, wanted)
            self._go_on(pid, status)

    def _breakpoint(self, pid: int, base: int, wanted: State) -> bool:
        place = self._places.get(wanted)
        if place is None:
            return False
        try:
            self._ptrace(_POKEUSER, pid, _DEBUG_REGISTERS, base + place)
            self._ptrace(_POKEUSER, pid, _DR7, _EXECUTE_DR0)
        except ProcessLookupError:
            raise
        except OSError:  # the machine has none to give
            return False
        return True

    def _go_on(self, pid: int, status: int) -> None:
        # A stop that is no event's is for a signal, which it gets: the sim leaves by one.  SIGTRAP is ours.
        signal_number = 0 if status >> 16 else os.WSTOPSIG(status)
        self._ptrace(_CONT, pid, data=0 if signal_number == signal.SIGTRAP else signal_number)

    def _look(self, pid: int, base: int, slot: int) -> State:
        raw = ctypes.create_string_buffer(_REGISTERS.size)
        self._ptrace(_GETREGS, pid, data=ctypes.addressof(raw))
        registers = _REGISTERS.unpack(raw.raw)
        rip = int(registers[_RIP])
        inside = base <= rip < base + self._size
        td = base + self._td_offset + slot * self._td_stride
        try:
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                word = _word_at(memory, td + _TD_WORD) & _SLOT_STATE
                locks = _word_at(memory, td + self._lock_count)
        except OSError:  # the driver lets nobody read an enclave that is not for debugging
            return self._outside(pid, base, registers)
        if not inside:
            return {_PARKED_WORD: State.OCALL, _INSIDE_WORD: State.INTERRUPTED}.get(word, State.OUTSIDE)
        return self._inside(rip - base, locks)

    def _outside(self, pid: int, base: int, registers: tuple[int, ...]) -> State:
        """What can be told of a processor's enclave: that it was interrupted, or that its OCALL waits."""
        if registers[_ORIG_RAX] == _FUTEX and 0 <= registers[_RDI] - base - self._size < self._size:
            return State.OCALL  # on a word of the arena, right above the enclave
        if registers[_RAX] != _ERESUME:
            return State.OUTSIDE
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(registers[_RIP])
            return State.INSIDE if memory.read(len(_ENCLU)) == _ENCLU else State.OUTSIDE

    def _inside(self, offset: int, locks: int) -> State:
        if self._leave <= offset < self._turned_away:
            return State.EXIT
        place = self._symbols.at(offset)
        if place.function == "tm_gate_ocall":
            return State.OCALL
        if place.function == "tm_entry" or place.function in _WAY_IN:
            return State.GATE
        if place.file is not None and os.path.basename(place.file) in _HEAP_FILES:
            return State.HEAP
        return State.LOCK if locks else State.INSIDE

    def _ptrace(self, request: int, pid: int, address: int = 0, data: int = 0) -> None:
        arguments = (
            ctypes.c_long(request),
            ctypes.c_long(pid),
            ctypes.c_void_p(address),
            ctypes.c_void_p(data),
        )
        if self._libc.ptrace(*arguments) != -1:
            return
        number = ctypes.get_errno()
        if number == errno.EPERM:
            raise Unsupported(
                f"process {pid} may not be traced: the storm looks at what it kills. In a container,"
                " give it CAP_SYS_PTRACE or a seccomp profile that allows ptrace"
            )
        raise OSError(number, os.strerror(number))


def _stopped(pid: int, end: float, limit: float) -> int | None:
    """How the process stopped or ended; None when it runs on until `end`, or for `limit` seconds."""
    end = min(end, time.monotonic() + limit)
    while True:
        found, status = os.waitpid(pid, _WALL | os.WNOHANG)
        if found:
            return status
        if time.monotonic() > end:
            return None
        time.sleep(_LOOK_PAUSE)


def _word_at(memory: Any, address: int) -> int:
    memory.seek(address)
    return int.from_bytes(memory.read(8), "little")


def _symbol(elf: Any, name: str) -> int | None:
    for symbol in elf.get_section_by_name(".symtab").iter_symbols():
        if symbol.name == name:
            return int(symbol["st_value"])
    return None


def _label(elf: Any, name: str) -> int:
    value = _symbol(elf, name)
    if value is None:
        raise InternalError(f"the image's ELF has no {name}: it is of another version")
    return value


def _member_offset(elf: Any, structure: str, member: str) -> int:
    for unit in elf.get_dwarf_info().iter_CUs():
        for entry in unit.iter_DIEs():
            if entry.tag == "DW_TAG_structure_type" and _name(entry) == structure:
                for child in entry.iter_children():
                    if _name(child) == member:
                        return int(child.attributes["DW_AT_data_member_location"].value)
    raise InternalError(f"the image's ELF does not tell where struct {structure} has {member}")


def _name(entry: Any) -> str:
    attribute = entry.attributes.get("DW_AT_name")
    return "" if attribute is None else attribute.value.decode()
