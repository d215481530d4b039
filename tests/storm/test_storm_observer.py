"""What the storm says that a program was doing when it killed it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from backends import BACKEND
from images import Images
from processes import wait_for_cpu

from teemate.bench._where import Observer, State

PROGRAM = """
import sys, teemate
image, sigstruct, what = sys.argv[1:]
with teemate.create_enclave(image, sigstruct, backend="sim") as enclave, enclave.slot() as slot:
    def tell():
        print(enclave.base, slot.index, flush=True)
    def parked(request):
        tell()
        sys.stdin.read()
        return b""
    if what == "outside":
        tell()
        sys.stdin.read()
    elif what == "ocall":
        slot.call("ocall", b"x", ocalls={"echo": parked})
    elif what == "busy":
        tell()
        while True:
            slot.call("echo", b"x")
    else:
        tell()
        slot.call(what)
"""

pytestmark = pytest.mark.skipif(BACKEND != "sim", reason="nobody sees inside an enclave of the driver")


@pytest.fixture(scope="module")
def observer(images: Images) -> Observer:
    return Observer(images.faults.sgxs, images.faults.elf)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("what", "states"),
    [
        ("outside", {State.OUTSIDE}),
        ("ocall", {State.OCALL}),
        ("loop", {State.INSIDE, State.INTERRUPTED}),
        ("loop_locked", {State.LOCK, State.INTERRUPTED}),
    ],
)
def test_the_state_is_told_and_the_process_is_dead(
    images: Images, observer: Observer, started: list[subprocess.Popen[str]], what: str, states: set[State]
) -> None:
    image = images.faults
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(image.sgxs), str(image.sigstruct), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    assert process.stdout is not None
    base, slot = map(int, process.stdout.readline().split())
    if what.startswith("loop"):
        wait_until_inside(observer, process.pid, base, slot)
        wait_for_cpu(process.pid)  # and has come to where it loops
    assert observer.kill(process.pid, base, slot) in states
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


@pytest.mark.parametrize("wanted", [State.GATE, State.EXIT, State.OUTSIDE])
def test_a_program_runs_on_to_where_it_is_wanted(
    images: Images, observer: Observer, started: list[subprocess.Popen[str]], wanted: State
) -> None:
    image = images.faults
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(image.sgxs), str(image.sigstruct), "busy"],
        stdout=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    assert process.stdout is not None
    base, slot = map(int, process.stdout.readline().split())
    assert observer.kill_at(process.pid, base, slot, wanted, patience=60.0) is wanted


def test_a_program_that_never_comes_there_is_killed_where_it_is(
    images: Images, observer: Observer, started: list[subprocess.Popen[str]]
) -> None:
    image = images.faults
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(image.sgxs), str(image.sigstruct), "outside"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    assert process.stdout is not None
    base, slot = map(int, process.stdout.readline().split())
    assert observer.kill_at(process.pid, base, slot, State.GATE, patience=0.05) is State.OUTSIDE
    assert observer.kill_at(process.pid, base, slot, State.GATE, patience=0.05) is None


def test_a_process_that_has_ended_is_not_counted(
    observer: Observer, started: list[subprocess.Popen[str]]
) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], text=True)
    started.append(process)
    process.wait()
    assert observer.kill(process.pid, 1 << 46, 2) is None


def wait_until_inside(observer: Observer, pid: int, base: int, slot: int) -> None:
    """The slot's word says so once the gate has let the call in."""
    word = base + observer._td_offset + slot * observer._td_stride + 0x30
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        while True:
            memory.seek(word)
            if memory.read(1) == b"\x02":
                return
