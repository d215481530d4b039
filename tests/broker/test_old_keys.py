"""Revoked clients that ignore everything: what their old keys open, and what they do to who comes next.

What the counts show: on the sim that the gate's code refuses; on Linux's driver also that the processor
and the vDSO bring those entries to it.  ``--full`` counts as far as the product's figures say.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from old_keys import ATTACK, PLACES, hostile
from processes import wait_for_cpu
from raw_client import RawClient
from running_broker import RunningBroker
from test_gate_and_death import until

Connect = Callable[..., RawClient]


@pytest.fixture
def attempts(request: pytest.FixtureRequest) -> int:
    """Entries that each attacker tries."""
    return 100_000 if request.config.getoption("--full") else 2_000


@pytest.fixture
def calls(request: pytest.FixtureRequest) -> int:
    """Calls of the slots' next holder."""
    return 10_000 if request.config.getoption("--full") else 200


def test_no_old_key_opens_anything_from_the_moment_revoke_returns(
    faults_broker: RunningBroker,
    connect: Connect,
    attempts: int,
    record_property: Callable[[str, object], None],
) -> None:
    admin = connect(faults_broker)
    with hostile(faults_broker.socket) as attacker:
        board = attacker.board
        board.wait_for(200)
        board.wait_for_entries()  # these keys do open the gate
        ok = admin.ok("revoke", grant=attacker.grant, grace=0)
        returned = {place: board.counts(place) for place in PLACES}
        assert (ok["leaked"], ok["quarantined"]) == (len(PLACES), 0)
        # One entry of each may have been under way, and be written down only now.
        board.wait_for(1)
        settled = {place: board.counts(place) for place in PLACES}
        board.wait_for(attempts)
        after = {place: board.counts(place) for place in PLACES}
    for place in PLACES:
        entered = after[place].entries - settled[place].entries
        tried = after[place].attempts - settled[place].attempts
        record_property(f"{place}: attempts after revoke", tried)
        record_property(f"{place}: entries after revoke", entered)
        print(f"{place}: {tried} attempts after revoke had returned, {entered} entered")
        assert settled[place].entries <= returned[place].entries + 1
        assert (entered, tried >= attempts) == (0, True)


NEXT_HOLDER = """
import random, struct, sys
import teemate
socket, calls, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chosen = random.Random(seed)
wrong = 0
with teemate.connect(socket) as broker, broker.attach("faults", slots=1, wait=60) as enclave:
    print(enclave._unopened[0].slot, flush=True)
    with enclave.slot() as slot:
        last = struct.unpack("<Q", slot.call("count", struct.pack("<Q", 0)))[0]
        for number in range(calls):
            more = chosen.randrange(300, 3000)
            got = struct.unpack("<Q", slot.call("count", struct.pack("<Q", more)))[0]
            wrong += got != last + more
            last = got
            text = chosen.randbytes(chosen.randrange(200))
            wrong += slot.call("echo", text) != text
    print(wrong, flush=True)
"""


def test_the_next_holder_of_a_slot_is_not_hurt_by_old_keys_and_gets_right_answers_when_interrupted(
    faults_broker: RunningBroker, connect: Connect, attempts: int, calls: int
) -> None:
    admin = connect(faults_broker)
    with hostile(faults_broker.socket) as attacker:
        board = attacker.board
        board.wait_for_entries()
        admin.ok("revoke", grant=attacker.grant, grace=0)
        board.rest()  # a slot in which others are all the time would not be repaired
        attacker.acknowledge()  # a lie: all three have the slots mapped
        until(admin, withheld=0)
        before = {place: board.counts(place) for place in PLACES}
        total = admin.ok("enclaves")["enclaves"][0]["slots"]["total"]
        # All slots have a new key now, and these are somebody's.
        grant = admin.ok("attach", enclave="faults", slots=total, wait=20)
        board.order(ATTACK)
        board.wait_for(attempts)
        for place in PLACES:
            entered = board.counts(place).entries - before[place].entries
            print(f"{place}: {attempts} attempts at slots with their next key, {entered} entered")
            assert entered == 0
        board.rest()
        admin.ok("slots.release", grant=grant["grant"], slots=attacker.slots, clean=True)
        seed = random.randrange(1 << 30)
        done = subprocess.run(
            [sys.executable, "-c", NEXT_HOLDER, faults_broker.socket, str(calls), str(seed)],
            env={**os.environ, "TEEMATE_TICK": "20us-200us"},
            capture_output=True,
            text=True,
            check=True,
        )
        _, wrong = map(int, done.stdout.split())
        print(f"{2 * calls} calls of the next holder, interrupted at random, {wrong} wrong (seed {seed})")
        assert wrong == 0


STOPPED = """
import struct, sys, threading
import teemate
from teemate._native import ffi, lib
socket, how = sys.argv[1:]
word = ffi.new("uint64_t *")
answered = threading.Event()
broker = teemate.connect(socket)
broker._connection.listen = lambda: None  # it hears of no revocation
enclave = broker.attach("faults")
slot = enclave._take(10, None)
slot.call("empty")
call = ffi.new("struct teemate_call *")

def run():
    name, argument = b"ocall", b"x"
    if how == "running":
        name, argument = b"spin_with_secret", struct.pack("<Q", int(ffi.cast("uintptr_t", word)))
    out = ffi.new("uint8_t[4096]")
    error = lib.teemate_slot_call(slot._handle, name, len(name), argument, len(argument), out, 4096, 0, call)
    while not error and call.outcome in (lib.TEEMATE_CALL_PAUSED, lib.TEEMATE_CALL_OCALL):
        if call.outcome == lib.TEEMATE_CALL_PAUSED:
            error = lib.teemate_slot_resume(slot._handle, 0, call)
        else:
            print("inside", flush=True)
            answered.wait()
            error = lib.teemate_slot_answer(slot._handle, 0, b"x", 1, 0, call)
    print("completed" if not error and call.outcome == lib.TEEMATE_CALL_DONE else "ended", flush=True)

thread = threading.Thread(target=run)
thread.start()
if how == "running":
    print("inside", flush=True)
sys.stdin.readline()
word[0] = 1
answered.set()
thread.join()
import os
os._exit(0)
"""


@pytest.mark.parametrize("revoked", [True, False], ids=["revoked", "control"])
@pytest.mark.parametrize("how", ["running", "parked"])
def test_a_call_that_is_stopped_and_continued_after_the_revocation_never_completes(
    faults_broker: RunningBroker, connect: Connect, how: str, revoked: bool
) -> None:
    admin = connect(faults_broker)
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, faults_broker.socket, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stdout.readline() == b"inside\n"
        if how == "running":
            wait_for_cpu(client.pid)
        client.send_signal(signal.SIGSTOP)
        if revoked:
            ok = admin.ok("revoke", enclave="faults", grace=0)
            assert (ok["leaked"], ok["quarantined"]) == (1, 0)
        client.send_signal(signal.SIGCONT)
        client.stdin.write(b"go on\n")
        client.stdin.flush()
        assert client.stdout.readline() == (b"ended\n" if revoked else b"completed\n")
    assert until(admin, used=0, withheld=0)["quarantined"] == 0
