"""A slot that comes back with a call in it holds nothing of that call when the next holder gets it."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, NamedTuple

import pytest
from backends import PATIENCE
from images import Images
from processes import wait_for_cpu
from raw_client import RawClient
from running_broker import RunningBroker

import teemate

CLIENT = """
import struct, sys
import teemate
socket, how = sys.argv[1:]

def park(data):
    print("parked", flush=True)
    sys.stdin.read()

with teemate.connect(socket) as broker, broker.attach("faults", slots=1) as enclave:
    with enclave.slot() as slot:
        print(slot.index, flush=True)
        if how == "parked":
            slot.call("hold_secrets", struct.pack("<Q", 1), ocalls={"echo": park})
        try:
            slot.call("hold_secrets")
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            sys.stdin.read()
"""


class Found(NamedTuple):
    """How often the secret was seen in what belongs to a slot."""

    stack: int
    thread_data: int
    xsave: int
    registers: int


NOTHING = Found(0, 0, 0, 0)
WAIT = 60.0 * PATIENCE
"""Seconds for a repair: in the emulated machine it takes many."""


@pytest.fixture
def running(broker: Callable[..., RunningBroker], images: Images) -> RunningBroker:
    faults = images.build("faults", slots=3)
    return broker(f"""
[administrators]
uids = [0]
[[enclave]]
name = "faults"
image = "{faults.sgxs}"
sigstruct = "{faults.sigstruct}"
revoke_kill = true
wait = {WAIT}
[[enclave.attach]]
uid = 0
""")


class Observer:
    """Another holder of the enclave, who looks at a slot from inside, and can become its next holder."""

    def __init__(self, enclave: teemate.GrantedEnclave) -> None:
        self._enclave = enclave

    def sees(self, index: int) -> Found:
        """Look at a slot from one that this process has."""
        with self._enclave.slot() as slot:
            return _look(slot, index)

    def takes_over(self, index: int) -> Found:
        """Become the slot's next holder, and look at it from there."""
        self._enclave.acquire(2, wait=WAIT)
        with ExitStack() as stack:
            slots = [stack.enter_context(self._enclave.slot()) for _ in range(3)]
            (mine,) = (slot for slot in slots if slot.index == index)
            return _look(mine, index)


def _look(slot: teemate.Slot, index: int) -> Found:
    return Found(*struct.unpack("<4Q", slot.call("search_slot", struct.pack("<Q", index))))


@pytest.fixture
def observer(running: RunningBroker) -> Iterator[Observer]:
    with teemate.connect(running.socket) as connection, connection.attach("faults") as enclave:
        yield Observer(enclave)


def read_line(stream: IO[bytes] | None) -> str:
    assert stream is not None
    return stream.readline().decode().strip()


@contextmanager
def secret_holder(
    running: RunningBroker, observer: Observer, how: str
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A client whose call stands in the enclave with the secret: its process and slot."""
    command = [sys.executable, "-c", CLIENT, running.socket, how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            index = int(read_line(process.stdout))
            if how == "interrupted":
                while observer.sees(index).thread_data < 128:
                    assert process.poll() is None
                wait_for_cpu(process.pid)  # until the secret is in registers too
                process.send_signal(signal.SIGINT)
            assert read_line(process.stdout) == how
            yield process, index
        finally:
            process.kill()


def die(process: subprocess.Popen[bytes], admin: RawClient) -> None:
    process.kill()
    process.wait()


def be_revoked(process: subprocess.Popen[bytes], admin: RawClient) -> None:
    """It does not acknowledge, so the policy has it killed."""
    clients = admin.ok("clients")["clients"]
    (grant,) = (g["grant"] for client in clients if client["pid"] == process.pid for g in client["grants"])
    assert admin.ok("revoke", grant=grant, grace=0)["leaked"] == 0


@pytest.mark.parametrize("how", ["interrupted", "parked"])
@pytest.mark.parametrize("end", [die, be_revoked])
def test_nothing_of_a_call_is_left_in_its_slot_for_the_next_holder(
    running: RunningBroker,
    observer: Observer,
    connect: Callable[..., RawClient],
    how: str,
    end: Callable[[subprocess.Popen[bytes], RawClient], None],
) -> None:
    with secret_holder(running, observer, how) as (process, index):
        planted = observer.sees(index)
        assert planted.stack >= 1024
        assert planted.thread_data >= 128
        if how == "interrupted":  # by an asynchronous exit: others may have had one too, or not
            assert planted.xsave > 0
            assert planted.registers > 0
        end(process, connect(running))
        found = observer.takes_over(index)
    assert found == NOTHING
    assert observer.sees(index) == NOTHING
    (record,) = [record for record in running.log() if record["event"] == "slot repaired"]
    assert how in str(record["left"])
