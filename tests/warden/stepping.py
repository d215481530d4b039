"""Killing a client at chosen instructions inside an enclave, and looking at what a repair makes of it.

A client in a process of its own is stepped through one call by the processor's trap flag.  What it
would leave behind if it were killed at that instruction is the enclave's memory as it is then: the sim
keeps all that processes share in one memfd.  So at each instruction the memory is copied to a second
enclave, at the same address, where a warden repairs the slot and an observer compares all that it can
see with what it saw before the call and after it.  That this is what a killed process leaves is seen by
killing some: see Stepper.leave_dead().
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import warden_wire as wire
from backends import NUMBER
from crash_world import GENERATION, VICTIM, State, World

HERE = Path(__file__).resolve().parent
WORKER = HERE.parent / "sdk" / "worker.py"

MANY = 5
"""So many wrong states are enough to see that something is wrong."""
_ANY = 1 << 40


def build_stepping(folder: Path) -> ctypes.CDLL:
    """Compile stepping.c."""
    library = folder / "stepping.so"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*command, str(HERE / "stepping.c")], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.step_run_to.argtypes = [ctypes.c_int, ctypes.c_uint64]
    loaded.step_until_store.argtypes = [
        *(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p),
    ]
    loaded.copy_pages.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    return loaded


@dataclass(frozen=True)
class Outcome:
    """What one operation's instructions came to."""

    instructions: int
    examined: int
    killed: int
    wrong: list[str]
    done_from: int | None
    """The first instruction after which the operation counts as done; None when both states are one."""


Calls = list[tuple[str, bytes]]


def walk(
    world: World, child: Child, ranges: Any, visit: Callable[[int], bool], *, every: bool = False
) -> int:
    """Step `child` until it leaves the enclave, or `visit` wants no more; how many instructions that was.

    `visit` is called with the number of the instruction that comes next: with `every` at each one, else
    at the first and where the memory in `ranges` has changed. At the others all is as at the one before.
    """
    steps, inside, library = ctypes.c_uint64(0), 1, world.library
    seen = ctypes.create_string_buffer(world.memory.size)
    while inside and visit(steps.value):
        library.copy_pages(ctypes.addressof(seen), world.twin.address, world.twin.size)
        inside = library.step_until_store(
            *(child.pid, world.enclave.base, world.enclave.size),
            *(world.twin.address, ctypes.addressof(seen), ctypes.addressof(ranges)),
            *(0 if every else len(ranges) // 2, 1 if every else _ANY, ctypes.byref(steps)),
        )
        assert inside >= 0, os.strerror(-inside)
    return steps.value + 1


class Stepper:
    """One operation of a client: some calls before it, then the call in which it dies."""

    def __init__(self, world: World, before: Calls, call: tuple[str, bytes]) -> None:
        self.world = world
        self._before = [("empty", b""), *before]
        self._calls = [*self._before, call]
        self._start = world.save()
        self.wrong: list[str] = []
        self.examined = 0
        self.killed = 0
        self.done_from: int | None = None
        self.states = self._both()

    def run(self, *, every: bool = False, kills: tuple[int, ...] = ()) -> Outcome:
        """Step through the call, and kill in it at so many instructions."""
        with self.client() as child:
            length = walk(self.world, child, self.world.ranges(VICTIM), self._examine, every=every)
        for instruction in kills:
            self.leave_dead(instruction % length)
            self.killed += 1
            self._examine(instruction % length)
        return Outcome(length, self.examined, self.killed, self.wrong, self.done_from)

    def client(self) -> Child:
        """Let a client stop at the first instruction of the call, in the twin as it was before all calls."""
        self.world.put_back(self._start)
        return Child.client(self.world, VICTIM, self._calls)

    def leave_dead(self, instruction: int) -> None:
        """Kill a client for good at that instruction; what it leaves is in the twin."""
        with self.client() as child:
            child.step(instruction)

    def _both(self) -> tuple[State, State]:
        """Return what is seen when the call has not begun and when it has ended."""
        states = []
        for calls in (self._before, self._calls):
            self.world.put_back(self._start)
            with Child.client(self.world, VICTIM, calls, traced=False) as child:
                child.finish()
            self.world.take_over()
            self.world.bury_and_repair(VICTIM)
            states.append(self.world.look())
        assert not states[0].owned
        assert not states[1].owned
        return states[0], states[1]

    def _examine(self, instruction: int) -> bool:
        """Repair as if the client had been killed now; False when there have been enough that are wrong."""
        before, after = self.states
        self.examined += 1
        try:
            self.world.take_over()
            self.world.bury_and_repair(VICTIM)
            state = self.world.look()
        except AssertionError as error:
            self.wrong.append(f"instruction {instruction}: {error}")
            self.world.observe_anew()
        else:
            if state not in self.states:
                self.wrong.append(f"instruction {instruction}: {state} is neither {before} nor {after}")
            elif before != after and state == after and self.done_from is None:
                self.done_from = instruction
            elif self.done_from is not None and state == before and instruction >= self.done_from:
                self.wrong.append(f"instruction {instruction}: undone again")
        return len(self.wrong) < MANY


class Child:
    """A process that works in the twin (tests/sdk/worker.py)."""

    def __init__(self, world: World, order: dict[str, object]) -> None:
        enclave = world.enclave
        order = order | {
            "backend": NUMBER,
            "fd": world.twin_fd,
            "arena": world.arena,
            "base": enclave.base,
            "size": enclave.size,
            "segments": [[s.offset, s.size, s.prot, s.type] for s in enclave.segments],
        }
        self._world = world
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(world.twin_fd, world.arena),
        )
        self.pid = self._process.pid
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order))
        self._process.stdin.close()
        if order.get("traced") is None:
            return
        _, status = os.waitpid(self.pid, 0)
        assert os.WIFSTOPPED(status), status
        assert os.WSTOPSIG(status) == signal.SIGSTOP
        error = world.library.step_run_to(self.pid, enclave.base + _entry(world))
        assert error == 0, os.strerror(-error)

    @classmethod
    def client(cls, world: World, slot: int, calls: Calls, *, traced: bool = True) -> Self:
        """Make calls in a slot; if `traced`, up to the first instruction inside of the last one."""
        key = world.enclave.control_key
        bind = wire.bind(key, slot=slot, generation=GENERATION, principal="uid=0", uid=0)
        order = {
            "slot": slot,
            "tcs": world.enclave.tcs[slot],
            "generation": GENERATION,
            "key": world.keys[slot].hex(),
            "bind": bytes(bind).hex(),
            "calls": [[name, payload.hex()] for name, payload in calls],
            "repeat": 1,
            "traced": len(calls) - 1 if traced else None,
        }
        return cls(world, order)

    @classmethod
    def warden(cls, world: World, op: int, slot: int) -> Self:
        """Come, as the warden does, to the first instruction of a control ECALL."""
        request = world.warden.control_request(world.enclave, op, slot=slot)
        order = {
            "control": bytes(request.body.control).hex(),
            "key": world.enclave.control_key.hex(),
            "tcs": world.enclave.tcs[0],
            "traced": 0,
        }
        return cls(world, order)

    @classmethod
    def unwinding(cls, world: World, slot: int) -> Self:
        """Come, as the warden does, to the first instruction of undoing what was interrupted in a slot."""
        order = {
            "control": "",
            "unwind": GENERATION,
            "key": world.enclave.control_key.hex(),
            "tcs": world.enclave.tcs[slot],
            "traced": 0,
        }
        return cls(world, order)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def step(self, instructions: int) -> None:
        """Execute so many instructions."""
        world, steps = self._world, ctypes.c_uint64(0)
        world.library.step_until_store(
            *(self.pid, world.enclave.base, world.enclave.size),
            *(world.twin.address, None, None, 0, instructions, ctypes.byref(steps)),
        )
        assert steps.value == instructions

    def finish(self) -> None:
        """Wait for its end; all its calls have to succeed."""
        assert self._process.stdout is not None
        replies = self._process.stdout.readlines()
        assert self._process.wait(timeout=60) == 0
        assert [reply.split()[0] for reply in replies] == ["0"] * len(replies), replies


def _entry(world: World) -> int:
    """Where the enclave begins: OENTRY of any TCS, at its place in the sim's table."""
    place = world.enclave.tcs_place(VICTIM)
    return int.from_bytes(world.memory.view[place + 32 : place + 40], "little")
