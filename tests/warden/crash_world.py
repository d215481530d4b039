"""An enclave that can be put back, its warden, an observer, and a twin in which clients are killed."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import warden_wire as wire
from elftools.elf.elffile import ELFFile
from warden_harness import Client, Enclave, Result, Slot, Warden

from teemate._native import lib
from teemate.vault import Entry, Vault

VICTIM, OBSERVER, OTHER = 2, 3, 4
GENERATION = 1
SEALS = 1 | 2 | 4  # SEAL, SHRINK, GROW
_HOLDER = (1 << 62) - 1
"""Of a mutex's word, without its flags (native/sdk/lock.c)."""
_STALE = 16 + 3 * 8 + 36 * 8 + 36 * 16 * 8
"""Of `stale` in struct heap (native/sdk/heap.h)."""
DONE: int = lib.TEEMATE_CALL_DONE

STATS = ("size", "used", "blocks", "free_blocks", "largest_free", "owned")


class State(NamedTuple):
    """All that can be seen of the enclave from outside, when nobody is inside."""

    used: int
    blocks: int
    owned: int
    entries: tuple[tuple[bytes, bytes, int], ...]
    balance: bytes


class _Caller:
    """What teemate.vault wants of a slot."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def call(
        self, name: str, payload: bytes = b"", timeout: float | None = None, *, max_reply: int = 65536
    ) -> bytes:
        return _done(name, self._slot.call(name, payload, capacity=max_reply))


def _done(name: str, result: Result) -> bytes:
    """Return what a call replied that has to succeed."""
    assert (result.outcome, result.status) == (DONE, 0), (name, result.outcome, result.status, result.vector)
    return result.out


class Memory:
    """A sim enclave's memfd, mapped."""

    def __init__(self, fd: int) -> None:
        self.size = os.fstat(fd).st_size
        self._map = mmap.mmap(fd, self.size)
        self.view = memoryview(self._map)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)

    def close(self) -> None:
        """Unmap."""
        del self._anchor
        self.view.release()
        self._map.close()


class World:
    """An enclave in which everything can be put back, and the twin of it in which a client is stepped."""

    def __init__(self, sgxs: Path, sigstruct: Path, library: ctypes.CDLL) -> None:
        self.library = library
        self.enclave = Enclave(sgxs, sigstruct)
        self.warden = Warden()
        self.layout = _Layout.of(self._start())
        self._heap = _symbol(sgxs.with_suffix(".elf"), "heap")
        self.client = Client(self.enclave)
        self.keys = {slot: os.urandom(16) for slot in (VICTIM, OBSERVER, OTHER)}
        for slot, key in self.keys.items():
            self.control(wire.ARM, slot, generation=GENERATION, key=key)
        self.observe_anew()
        self.memory = Memory(self.enclave.fd)
        self.twin_fd = os.memfd_create("twin", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.twin_fd, self.memory.size)
        fcntl.fcntl(self.twin_fd, fcntl.F_ADD_SEALS, SEALS)
        self.twin = Memory(self.twin_fd)
        self.arena = os.memfd_create("arena", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.arena, 4096)
        fcntl.fcntl(self.arena, fcntl.F_ADD_SEALS, SEALS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.memory.close()
        self.twin.close()
        os.close(self.twin_fd)
        os.close(self.arena)
        self.observer.close()
        self.client.close()
        self.warden.kill()
        self.enclave.close()

    def _start(self) -> wire.WardenReply:
        reply = self.warden.start(self.enclave)
        assert (reply.status, reply.text) == (0, b"")
        return reply

    def renew_warden(self) -> None:
        """Let another warden take over."""
        self.warden.kill()
        self.warden = Warden()
        self._start()

    def control(self, op: int, slot: int, **arguments: Any) -> None:
        """Make a control ECALL that has to succeed."""
        reply = self.warden.control(self.enclave, op, slot=slot, **arguments)
        assert (reply.status, reply.entered) == (0, 1), (op, slot, reply.status, reply.text)

    # ---- memory --------------------------------------------------------------------------

    def save(self) -> ctypes.Array[ctypes.c_char]:
        """Return a copy of the enclave."""
        return ctypes.create_string_buffer(bytes(self.memory.view), self.memory.size)

    def put_back(self, saved: ctypes.Array[ctypes.c_char]) -> None:
        """Make enclave and twin what they were."""
        for memory in (self.memory, self.twin):
            self.library.copy_pages(memory.address, ctypes.addressof(saved), memory.size)

    def take_over(self) -> None:
        """Make the enclave what the twin is now."""
        self.library.copy_pages(self.memory.address, self.twin.address, self.memory.size)

    def ranges(self, *slots: int) -> Any:
        """Return what a repair reads: all but stacks and saved registers of these slots."""
        layout, pieces, at = self.layout, [], 0
        frames = layout.nssa * layout.ssa_frame_size
        holes = [(layout.stack_offset + slot * layout.stack_stride, layout.stack_size) for slot in slots]
        holes += [(layout.ssa_offset + slot * frames, frames) for slot in slots]
        for offset, size in sorted(holes):
            pieces.append((at, offset - at))
            at = offset + size
        pieces.append((at, layout.size - at))
        return (ctypes.c_uint64 * (2 * len(pieces)))(*(n for piece in pieces for n in piece))

    def heap_is_locked(self) -> bool:
        """Does somebody have the heap's lock in the twin?"""
        return bool(int.from_bytes(self.twin.view[self._heap : self._heap + 8], "little") & _HOLDER)

    def heap_is_to_be_searched(self) -> bool:
        """Are there blocks in the twin that were given up, and nobody has the lock to look for them?"""
        place = self._heap + _STALE
        return any(self.twin.view[place : place + 8]) and not self.heap_is_locked()

    # ---- what the tests do ------------------------------------------------------------------

    def clear_and_repair(self, slot: int) -> None:
        """Do for the slot what the broker has its warden do when a client has died, up to RESET."""
        self.control(wire.CLEAR, slot, generation=GENERATION)
        reply = self.warden.repair(slot, GENERATION, dead=True)
        assert (reply.status, reply.entered) == (0, 1), reply.text

    def bury_and_repair(self, slot: int) -> None:
        """All of it: the slot could be armed now."""
        self.clear_and_repair(slot)
        self.control(wire.RESET, slot)

    def observe_anew(self) -> None:
        """Let the observer begin again: its last call may have ended inside."""
        self.observer = self.client.slot(index=OBSERVER, generation=GENERATION, key=self.keys[OBSERVER])
        self.vault = Vault(_Caller(self.observer))

    def look(self) -> State:
        """Return all that an observer can see; changing things shows that nothing is held any more."""
        self.vault.put(b"probe", b"probe")
        assert self.vault.delete(b"probe")
        stats = dict(zip(STATS, memoryview(self._observe("heap_check")).cast("Q"), strict=True))
        entries: list[tuple[bytes, bytes, int]] = []
        for listed in self.vault.list():
            entry: Entry | None = self.vault.get(listed.key)
            assert entry is not None
            entries.append((listed.key, bytes(entry.value), entry.version))
        return State(
            stats["used"], stats["blocks"], stats["owned"], tuple(sorted(entries)), self._observe("balance")
        )

    def _observe(self, name: str) -> bytes:
        return _done(name, self.observer.call(name))


def _symbol(elf: Path, name: str) -> int:
    """Return the offset of a symbol of the enclave."""
    with elf.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        return int(table.get_symbol_by_name(name)[0]["st_value"])


def populate(world: World) -> None:
    """Some values, so that there is something to go wrong."""
    for key in (b"one", b"two", b"three"):
        world.vault.put(key, b"old value of " + key)


class _Layout(NamedTuple):
    """The part of struct tm_image_header that says where things are."""

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

    @classmethod
    def of(cls, reply: wire.WardenReply) -> Self:
        """What SET_KEY has brought."""
        return cls(*struct.unpack_from("<II8Q", bytes(reply.result.data), 24))
