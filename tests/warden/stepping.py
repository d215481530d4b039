"""Killing a client at chosen instructions inside an enclave, and looking at what a repair makes of it.

A client in a process of its own is stepped through one call by the processor's trap flag.  What it
would leave behind if it were killed at that instruction is the enclave's memory as it is then: the sim
keeps all that processes share in one memfd.  So at each instruction the memory is copied to a second
enclave, at the same address, where a warden repairs the slot and an observer compares all that it can
see with what it saw before the call and after it.  That this is what a killed process leaves is seen by
killing some: see Stepper.kill().
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

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


class Stepper:
    """One operation of a client: some calls before it, then the call in which it dies."""

    def __init__(self, world: World, before: Calls, call: tuple[str, bytes]) -> None:
        self.world = world
        self._before = [("empty", b""), *before]
        self._call = call
        self._start = world.save()
        self._ranges = world.ranges()
        self.wrong: list[str] = []
        self.examined = 0
        self.killed = 0
        self.states = self._both()

    def run(self, *, stride: int = 1, every: bool = False, kills: tuple[int, ...] = ()) -> Outcome:
        """Step through the call.

        With `every`, examine the state at each instruction; else, at those that changed anything that a
        repair reads, each `stride`-th of them: at the others it is as at the one before.
        """
        steps, number = ctypes.c_uint64(0), 0
        done_from: int | None = None
        world, library = self.world, self.world.library
        seen = ctypes.create_string_buffer(world.memory.size)
        with _Child(world, self._start, [*self._before, self._call]) as child:
            inside = 1
            while inside and len(self.wrong) < MANY:
                if number % stride == 0:
                    done = self._examine(steps.value)
                    if done and done_from is None:
                        done_from = steps.value
                    if done is False and done_from is not None:
                        self.wrong.append(f"instruction {steps.value}: undone again")
                number += 1
                library.copy_pages(ctypes.addressof(seen), world.twin.address, world.twin.size)
                inside = library.step_until_store(
                    *(child.pid, world.enclave.base, world.enclave.size),
                    *(world.twin.address, ctypes.addressof(seen), ctypes.addressof(self._ranges)),
                    *(0 if every else len(self._ranges) // 2, 1 if every else _ANY, ctypes.byref(steps)),
                )
                assert inside >= 0, os.strerror(-inside)
        for instruction in kills:
            self.kill(instruction % (steps.value + 1))
        return Outcome(steps.value + 1, self.examined, self.killed, self.wrong, done_from)

    def kill(self, instruction: int) -> None:
        """Kill a client for good at that instruction, and repair what it has left."""
        world, steps = self.world, ctypes.c_uint64(0)
        with _Child(world, self._start, [*self._before, self._call]) as child:
            if instruction:
                world.library.step_until_store(
                    *(child.pid, world.enclave.base, world.enclave.size),
                    *(world.twin.address, None, None, 0, instruction, ctypes.byref(steps)),
                )
            assert steps.value == instruction
            child.kill()
        self.killed += 1
        self._examine(instruction)

    def _both(self) -> tuple[State, State]:
        """Return what is seen when the call has not begun and when it has ended."""
        states = []
        for calls in (self._before, [*self._before, self._call]):
            with _Child(self.world, self._start, calls, traced=False) as child:
                child.finish()
            self.world.take_over()
            self.world.bury_and_repair()
            states.append(self.world.look())
        assert not states[0].owned
        assert not states[1].owned
        return states[0], states[1]

    def _examine(self, instruction: int) -> bool | None:
        """Repair as if the client had been killed now: is the call done, or None when that shows nothing?"""
        self.examined += 1
        try:
            self.world.take_over()
            self.world.bury_and_repair()
            state = self.world.look()
        except AssertionError as error:
            self.wrong.append(f"instruction {instruction}: {error}")
            self.world.observe_anew()
            return None
        before, after = self.states
        if state not in self.states:
            self.wrong.append(f"instruction {instruction}: {state} is neither {before} nor {after}")
        return None if before == after else state == after


class _Child:
    """A client of the twin, in a process of its own (tests/sdk/worker.py)."""

    def __init__(
        self, world: World, start: ctypes.Array[ctypes.c_char], calls: Calls, *, traced: bool = True
    ) -> None:
        world.put_back(start)
        enclave = world.enclave
        order = {
            "backend": NUMBER,
            "fd": world.twin_fd,
            "arena": world.arena,
            "base": enclave.base,
            "size": enclave.size,
            "segments": [[s.offset, s.size, s.prot, s.type] for s in enclave.segments],
            "slot": VICTIM,
            "tcs": enclave.tcs[VICTIM],
            "generation": GENERATION,
            "key": world.keys[VICTIM].hex(),
            "bind": bytes(
                wire.bind(enclave.control_key, slot=VICTIM, generation=GENERATION, principal="uid=0", uid=0)
            ).hex(),
            "calls": [[name, payload.hex()] for name, payload in calls],
            "repeat": 1,
            "traced": len(calls) - 1 if traced else None,
        }
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
        if traced:
            _, status = os.waitpid(self.pid, 0)
            assert os.WIFSTOPPED(status), status
            assert os.WSTOPSIG(status) == signal.SIGSTOP
            error = world.library.step_run_to(self.pid, enclave.base + _entry(world))
            assert error == 0, os.strerror(-error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def finish(self) -> None:
        """Wait for its end; all its calls have to succeed."""
        assert self._process.stdout is not None
        replies = self._process.stdout.readlines()
        assert self._process.wait(timeout=60) == 0
        assert [reply.split()[0] for reply in replies] == ["0"] * len(replies), replies

    def kill(self) -> None:
        """End it now, and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _entry(world: World) -> int:
    """Where the enclave begins: OENTRY of the victim's TCS, at its place in the sim's table."""
    place = world.enclave.tcs_place(VICTIM)
    return int.from_bytes(world.memory.view[place + 32 : place + 40], "little")
