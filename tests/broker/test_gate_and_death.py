"""What stolen and forged keys open (nothing), and what becomes of slots whose holders die in them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from backends import BACKEND, NUMBER, PATIENCE
from images import Images
from processes import wait_for_cpu
from raw_client import RawClient
from running_broker import RunningBroker

from teemate._native import ffi, lib

Connect = Callable[..., RawClient]

TM_E_STATE = -5
TM_E_MAC = -4

CLIENT = """
import os, sys
import teemate
socket, how = sys.argv[1:]

def park(data):
    print("parked", flush=True)
    sys.stdin.read()
    return b""

with teemate.connect(socket) as broker, broker.attach("faults", slots=1) as enclave:
    with enclave.slot() as slot:
        slot.call("echo", b"warm")
        print("ready", flush=True)
        if how == "loop":
            slot.call("loop")
        elif how == "deaf":  # nothing of the library's takes the call back
            from teemate._native import ffi, lib
            call = ffi.new("struct teemate_call *")
            with slot._busy:  # as in any call: else the slot is closed where this one is paused
                error = lib.teemate_slot_call(slot._handle, b"loop", 4, b"", 0, ffi.NULL, 0, 0, call)
                while not error and call.outcome == lib.TEEMATE_CALL_PAUSED:
                    error = lib.teemate_slot_resume(slot._handle, 0, call)
            print("ended" if error or call.outcome != lib.TEEMATE_CALL_DONE else "done", flush=True)
            sys.stdin.read()
        elif how == "park":
            slot.call("ocall", ocalls={"echo": park})
        else:
            sys.stdin.read()
"""


@pytest.fixture
def faults_broker(broker: Callable[..., RunningBroker], images: Images) -> RunningBroker:
    """A broker with the faults image, for root."""
    return broker(f"""
[administrators]
uids = [0]
[[enclave]]
name = "faults"
image = "{images.faults.sgxs}"
sigstruct = "{images.faults.sigstruct}"
[[enclave.attach]]
uid = 0
""")


class Holder:
    """A client program that stands in the enclave in a chosen way."""

    def __init__(self, broker: RunningBroker, how: str, tick: str | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, broker.socket, how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it ends with whatever its call raises
            env={**os.environ, "TEEMATE_TICK": tick} if tick else None,
        )
        self.expect("ready")
        if how == "park":
            self.expect("parked")
        if how in ("loop", "deaf"):
            # The loop is all that it still spends time on: seeing it run means that it is inside.
            wait_for_cpu(self.process.pid)

    def expect(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == word.encode() + b"\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@contextmanager
def holder(broker: RunningBroker, how: str, tick: str | None = None) -> Iterator[Holder]:
    found = Holder(broker, how, tick)
    try:
        yield found
    finally:
        found.kill()


def slot_counts(admin: RawClient) -> dict[str, int]:
    counts: dict[str, int] = admin.ok("enclaves")["enclaves"][0]["slots"]
    return counts


def until(admin: RawClient, **expected: int) -> dict[str, int]:
    """Ask until the slots are so; each turn is a round trip."""
    while True:
        counts = slot_counts(admin)
        if all(counts[key] == value for key, value in expected.items()):
            return counts


@pytest.mark.parametrize(
    ("how", "left"), [("loop", "interrupted (CSSA 1, inside)"), ("park", "parked in an OCALL")]
)
def test_a_slot_whose_holder_dies_in_it_is_repaired_and_what_it_left_is_told(
    faults_broker: RunningBroker, connect: Connect, how: str, left: str
) -> None:
    admin = connect(faults_broker)
    with holder(faults_broker, how):
        assert slot_counts(admin)["used"] == 1
    total = slot_counts(admin)["total"]
    admin.ok("attach", enclave="faults", slots=total, wait=20)
    assert slot_counts(admin)["quarantined"] == 0
    (record,) = [record for record in faults_broker.log() if record["event"] == "slot repaired"]
    assert left in str(record["left"])
    (enclave,) = admin.ok("stats")["stats"]["enclaves"]
    assert enclave["repaired"] == 1


def test_a_slot_whose_holder_dies_outside_is_free_again(
    faults_broker: RunningBroker, connect: Connect
) -> None:
    admin = connect(faults_broker)
    with holder(faults_broker, "idle"):
        total = slot_counts(admin)["total"]
    admin.ok("attach", enclave="faults", slots=total, wait=20)
    assert slot_counts(admin)["quarantined"] == 0


def test_a_slot_that_is_revoked_while_its_holder_is_stopped_inside_comes_back_with_the_holders_end(
    faults_broker: RunningBroker, connect: Connect
) -> None:
    admin = connect(faults_broker)
    # Ticks are rare, lest it be stopped at one.
    with holder(faults_broker, "loop", "1000000us-1000000us") as inside:
        inside.process.send_signal(signal.SIGSTOP)
        os.waitpid(inside.process.pid, os.WUNTRACED)
        ok = admin.ok("revoke", enclave="faults", grace=0)
        # A processor leaves the enclave to stop a thread; on the sim it stands still inside.
        busy = int(BACKEND == "sim")
        assert ok == {"grants": 1, "cleared": 0, "quarantined": 0, "leaked": 1, "busy": busy}
        assert slot_counts(admin)["withheld"] == 1
    counts = until(admin, used=0, withheld=0)
    assert (counts["quarantined"], counts["free"]) == (0, counts["total"])


def test_a_revoked_call_that_loops_without_end_is_repaired_under_its_holder(
    faults_broker: RunningBroker, connect: Connect
) -> None:
    admin = connect(faults_broker)
    # On a busy host the sim's ticks, of the processor's time, are much rarer than interrupts.
    with holder(faults_broker, "deaf", "20us-200us") as inside:
        ok = admin.ok("revoke", enclave="faults", grace=0)
        # Its library acknowledges when the call has left, which may be before this is counted.
        assert (ok["leaked"] + ok["cleared"], ok["quarantined"]) == (1, 0)
        inside.expect("ended")
    assert until(admin, used=0, withheld=0)["quarantined"] == 0


@pytest.mark.parametrize("how", ["loop", "park"])
def test_a_client_that_hears_of_a_revocation_gives_its_call_up_and_the_slot_is_as_new(
    faults_broker: RunningBroker, connect: Connect, how: str
) -> None:
    admin = connect(faults_broker)
    with holder(faults_broker, how) as inside:
        # Half of it a call has to end by itself.
        number = admin.post("revoke", enclave="faults", grace=6 * PATIENCE)
        if how == "park":  # its OCALL handler comes back in its own time
            assert inside.process.stdin is not None
            inside.process.stdin.close()
        ok = admin.reply(number)["ok"]
        assert ok == {"grants": 1, "cleared": 1, "quarantined": 0, "leaked": 0, "busy": 0}


class Attacker:
    """Maps the enclave from a raw attach and enters slots with whatever key it likes."""

    def __init__(self, client: RawClient) -> None:
        self.ok = client.ok("attach", enclave="faults", slots=1)
        info = self.ok["enclave"]
        segments = ffi.new("struct teemate_segment[]", [tuple(s) for s in self.ok["segments"]])
        handle = ffi.new("struct teemate_enclave **")
        fd, arena = (os.dup(fd) for fd in client.fds[-2:])
        error = lib.teemate_open(
            NUMBER, fd, info["base"], info["size"], segments, len(segments), handle, ffi.NULL
        )
        assert error == 0
        self.enclave = handle[0]
        assert lib.teemate_map(self.enclave, ffi.NULL) == 0
        assert lib.teemate_map_arena(self.enclave, arena, ffi.NULL) == 0
        os.close(arena)

    def call(self, slot: dict[str, Any]) -> tuple[int, int]:
        """Outcome and status of an ECALL through `slot` with what it says."""
        args = ffi.new("struct teemate_slot_args *")
        args.index, args.tcs_offset, args.generation = slot["slot"], slot["tcs"], slot["generation"]
        ffi.memmove(args.key, slot["key"], 16)
        ffi.memmove(args.bind, slot["bind"], 88)
        handle = ffi.new("struct teemate_slot **")
        assert lib.teemate_slot_open(self.enclave, args, handle, ffi.NULL) == 0
        call = ffi.new("struct teemate_call *")
        assert lib.teemate_slot_call(handle[0], b"empty", 5, b"", 0, ffi.NULL, 0, 0, call) == 0
        while call.outcome == lib.TEEMATE_CALL_PAUSED:
            assert lib.teemate_slot_resume(handle[0], 0, call) == 0
        lib.teemate_slot_close(handle[0])
        return call.outcome, call.status

    def close(self) -> None:
        lib.teemate_close(self.enclave)


@pytest.fixture
def attacker(faults_broker: RunningBroker, connect: Connect) -> Iterator[tuple[RawClient, Attacker]]:
    client = connect(faults_broker)
    attacker = Attacker(client)
    yield client, attacker
    attacker.close()


DONE, REVOKED = lib.TEEMATE_CALL_DONE, lib.TEEMATE_CALL_REVOKED


def test_a_forged_key_opens_no_slot_neither_one_s_own_nor_another_s(
    attacker: tuple[RawClient, Attacker], faults_broker: RunningBroker, connect: Connect
) -> None:
    _, thief = attacker
    (mine,) = thief.ok["slots"]
    (theirs,) = connect(faults_broker).ok("attach", enclave="faults", slots=1)["slots"]
    for bit in (0, 63, 64, 127):
        key = bytearray(mine["key"])
        key[bit // 8] ^= 1 << bit % 8
        assert thief.call(mine | {"key": bytes(key)})[0] == REVOKED
    assert thief.call(theirs | {"key": mine["key"]})[0] == REVOKED
    assert thief.call(theirs | {"key": bytes(16)})[0] == REVOKED
    assert thief.call(mine | {"slot": 0, "tcs": mine["tcs"] - 4096 * mine["slot"]})[0] == REVOKED
    assert thief.call(mine) == (DONE, 0)


def test_a_forged_identity_is_not_bound(attacker: tuple[RawClient, Attacker]) -> None:
    _, thief = attacker
    (mine,) = thief.ok["slots"]
    bind = bytearray(mine["bind"])
    bind[40] ^= 1  # uid
    assert thief.call(mine | {"bind": bytes(bind)}) == (DONE, TM_E_MAC)
    assert thief.call(mine | {"bind": bytes(88)}) == (DONE, TM_E_STATE)
    assert thief.call(mine) == (DONE, 0)


def test_a_key_of_an_earlier_assignment_opens_nothing(
    attacker: tuple[RawClient, Attacker], faults_broker: RunningBroker, connect: Connect
) -> None:
    client, thief = attacker
    (old,) = thief.ok["slots"]
    assert thief.call(old) == (DONE, 0)
    client.ok("slots.release", grant=thief.ok["grant"], slots=[old["slot"]], clean=True)
    other = connect(faults_broker)
    total = slot_counts(other)["total"]
    new = {s["slot"]: s for s in other.ok("attach", enclave="faults", slots=total, wait=20)["slots"]}
    assert thief.call(old)[0] == REVOKED
    assert thief.call(new[old["slot"]] | {"key": old["key"]})[0] == REVOKED
    assert thief.call(new[old["slot"]]) == (DONE, 0), "the guard of this test: with the key it opens"


def test_a_revoked_key_opens_nothing(
    attacker: tuple[RawClient, Attacker], faults_broker: RunningBroker, connect: Connect
) -> None:
    _, thief = attacker
    (mine,) = thief.ok["slots"]
    connect(faults_broker).ok("revoke", grant=thief.ok["grant"], grace=0)
    assert thief.call(mine)[0] == REVOKED
