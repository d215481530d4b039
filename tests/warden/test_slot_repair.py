"""A client's slot comes back whatever its holder left in it: by death, and by revocation while it lives."""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import warden_wire as wire
from backends import BACKEND, sim_only
from warden_harness import Client, Enclave, Warden

from teemate._native import ffi, lib

SLOT, OTHER = 2, 3
KEY = bytes(range(1, 17))
OTHER_KEY = bytes(range(101, 117))
OWNER_DEAD = -9
REFUSED = -5  # TM_E_STATE
NSSA = 3  # of the test's image

# How a holder stands in its slot: the call, its input, and what the holder says then.
PARKED = ("ask", b"?", "parked")
PAUSED = ("spin", b"", "paused")
LOCKED = ("hold", b"", "paused")
CLEAN = ("echo", b"x", "done")
STATES = {"clean": CLEAN, "parked": PARKED, "interrupted": PAUSED, "with a lock": LOCKED}


class Holder:
    """Another process that holds the slot."""

    def __init__(self, enclave: Enclave, state: tuple[str, bytes, str], generation: int = 1) -> None:
        self.enclave = enclave
        order = {
            "fd": enclave.fd,
            "arena": enclave.arena,
            "base": enclave.base,
            "size": enclave.size,
            "segments": [[s.offset, s.size, s.prot, s.type] for s in enclave.segments],
            "tcs": enclave.tcs,
            "control_key": enclave.control_key.hex(),
            "slot": SLOT,
            "generation": generation,
            "key": KEY.hex(),
            "call": state[0],
            "data": state[1].hex(),
            "how": state[2],
        }
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent)])
        self.process = subprocess.Popen(
            [sys.executable, str(here / "holder.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            pass_fds=(enclave.fd, enclave.arena), env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        self.say(json.dumps(order))

    def say(self, line: str) -> None:
        """Tell it something."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """Return what it says next; "" when it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> str:
        """Let it go on with its call, and return how that ended."""
        self.say("on")
        return self.hear()

    def kill(self) -> None:
        """SIGKILL, and reap it."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@contextmanager
def holding(enclave: Enclave, state: tuple[str, bytes, str], generation: int = 1) -> Iterator[Holder]:
    """A holder that stands in its slot as `state` says."""
    holder = Holder(enclave, state, generation)
    try:
        assert holder.hear() == state[2]
        yield holder
    finally:
        holder.kill()


@contextmanager
def running(enclave: Enclave) -> Iterator[Holder]:
    """A holder whose thread runs inside, without an end."""
    holder = Holder(enclave, ("spin", b"", "running"))
    try:
        while not enclave.hangs():
            assert holder.process.poll() is None
        yield holder
    finally:
        holder.kill()


def arm(warden: Warden, enclave: Enclave, generation: int = 1, *, slot: int = SLOT, key: bytes = KEY) -> None:
    reply = warden.control(enclave, wire.ARM, slot=slot, generation=generation, key=key)
    assert (reply.entered, reply.status) == (1, 0)


def clear(warden: Warden, enclave: Enclave, generation: int = 1) -> None:
    assert warden.control(enclave, wire.CLEAR, slot=SLOT, generation=generation).status == 0


def works_as_new(warden: Warden, enclave: Enclave, generation: int = 2) -> None:
    """RESET, then the next holder; a lock that was held is owner-dead, once."""
    assert warden.control(enclave, wire.RESET, slot=SLOT).status == 0
    probe = warden.probe(SLOT).result
    assert (probe.cssa, probe.word) == (0, (generation - 1) << 8 | wire.FREE)
    arm(warden, enclave, generation)
    client = Client(enclave)
    slot = client.slot(index=SLOT, generation=generation, key=KEY)
    assert slot.call("echo", b"works").out == b"works"
    assert slot.call("take").status in (0, OWNER_DEAD)
    assert slot.call("take").status == 0
    slot.close()
    client.close()


@pytest.mark.parametrize("name", STATES)
def test_a_slot_comes_back_from_the_death_of_its_holder(started: Warden, enclave: Enclave, name: str) -> None:
    arm(started, enclave)
    with holding(enclave, STATES[name]):
        pass
    clear(started, enclave)
    reply = started.repair(SLOT, 1, dead=True)
    assert (reply.entered, reply.status, reply.text) == (1, 0, b"")
    inside = name in ("interrupted", "with a lock")
    assert (reply.result.cssa, reply.repaired) == ((1, 1) if inside else (0, 0))
    works_as_new(started, enclave)


@pytest.mark.parametrize("name", STATES)
def test_a_slot_comes_back_from_a_holder_that_lives_and_hears_of_it(
    started: Warden, enclave: Enclave, name: str
) -> None:
    arm(started, enclave)
    with holding(enclave, STATES[name]) as holder:
        clear(started, enclave)
        reply = started.repair(SLOT, 1, dead=False)
        assert (reply.entered, reply.status, reply.text) == (1, 0, b"")
        if name != "clean":
            assert holder.go_on() == "revoked"
        works_as_new(started, enclave)


def test_a_thread_that_dies_while_it_runs_inside_leaves_a_slot_that_comes_back(
    started: Warden, enclave: Enclave
) -> None:
    arm(started, enclave)
    with running(enclave):
        pass
    clear(started, enclave)
    reply = started.repair(SLOT, 1, dead=True)
    assert (reply.status, reply.result.cssa, reply.repaired) == (0, 1, 1)
    assert reply.result.word == 1 << 8 | wire.INSIDE | 0x80
    works_as_new(started, enclave)


def test_a_slot_in_which_a_living_thread_runs_is_busy_until_an_interrupt_or_its_end(
    started: Warden, enclave: Enclave
) -> None:
    arm(started, enclave)
    with running(enclave) as holder:
        clear(started, enclave)
        for _ in range(5000):
            reply = started.repair(SLOT, 1, dead=False)
            if reply.status == 0:
                break
            assert (reply.entered, reply.status) == (0, -errno.EBUSY)
        if reply.status == 0:  # it was met at its AEP
            assert holder.hear() == "revoked"
    reply = started.repair(SLOT, 1, dead=True)
    assert (reply.entered, reply.status) == (1, 0)
    works_as_new(started, enclave)


def test_threads_that_run_inside_are_met_at_their_interrupts_again_and_again(
    started: Warden, enclave: Enclave
) -> None:
    """On hardware they are resumed at once, so the warden's own entries are, too, now and then."""
    client = Client(enclave)
    requests = frames = 0
    rounds = 3 if BACKEND == "sim" else 30
    for generation in range(1, rounds + 1):
        arm(started, enclave, generation)
        slot = client.slot(index=SLOT, generation=generation, key=KEY)
        thread = threading.Thread(target=slot.call, args=("spin",))
        thread.start()
        while not enclave.hangs():
            assert thread.is_alive()
        clear(started, enclave, generation)
        while True:
            requests += 1
            reply = started.repair(SLOT, generation, dead=False)
            if reply.status == 0:
                break
            assert (reply.entered, reply.status) == (0, -errno.EBUSY)
        frames += reply.repaired
        thread.join()
        assert slot.last.outcome == lib.TEEMATE_CALL_REVOKED
        slot.close()
        assert started.control(enclave, wire.RESET, slot=SLOT).status == 0
    client.close()
    print(f"{rounds} threads met in {requests} requests; the warden's children resumed {frames} frames")


def test_a_holder_that_is_stopped_inside_is_interrupted_on_hardware_and_busy_on_the_sim(
    started: Warden, enclave: Enclave
) -> None:
    arm(started, enclave)
    with running(enclave) as holder:
        holder.process.send_signal(signal.SIGSTOP)
        os.waitpid(holder.process.pid, os.WUNTRACED)
        clear(started, enclave)
        reply = started.repair(SLOT, 1, dead=False)
        if BACKEND == "sgx":
            assert (reply.entered, reply.status, reply.result.cssa) == (1, 0, 1)
            works_as_new(started, enclave)
            # Whoever waits at its AEP has no right to a slot that is another's; here nobody else has it.
            clear(started, enclave, 2)
            holder.process.send_signal(signal.SIGCONT)
            assert holder.hear() == "revoked"
        else:
            # The sim has no interrupt for it: the TCS stays busy, as if its processor had stopped.
            assert reply.status in (0, -errno.EBUSY)


def test_only_a_slot_whose_key_was_taken_away_is_repaired(started: Warden, enclave: Enclave) -> None:
    arm(started, enclave)
    with holding(enclave, LOCKED) as holder:
        for generation in (1, 2):
            reply = started.repair(SLOT, generation, dead=False)
            assert (reply.entered, reply.status) == (1, REFUSED)
        client = Client(enclave)
        arm(started, enclave, slot=OTHER, key=OTHER_KEY)
        slot = client.slot(index=OTHER, generation=1, key=OTHER_KEY)
        assert slot.call("release").status == 0
        assert holder.go_on() == "done", "its call goes on as if nobody had looked"
        slot.close()
        client.close()
    clear(started, enclave)
    assert started.repair(SLOT, 2, dead=False).status == REFUSED
    assert started.repair(SLOT, 1, dead=False).status == 0


def test_a_slot_is_not_reset_before_it_was_repaired(started: Warden, enclave: Enclave) -> None:
    arm(started, enclave)
    with holding(enclave, PAUSED):
        clear(started, enclave)
        assert started.control(enclave, wire.RESET, slot=SLOT).status == REFUSED
        assert started.control(enclave, wire.ARM, slot=SLOT, generation=2, key=KEY).status == REFUSED


def test_repair_refuses_slots_that_are_none_or_the_wardens(started: Warden, enclave: Enclave) -> None:
    for slot in (0, 1, len(enclave.tcs), 1 << 63, (1 << 64) - 1):
        assert started.repair(slot, 1, dead=True).status == -errno.EINVAL
    assert started.repair(SLOT, 0, dead=True).status == -errno.EINVAL
    assert started.ping().status == 0


def test_a_repair_tells_what_had_interrupted_the_slot(started: Warden, enclave: Enclave) -> None:
    arm(started, enclave)
    with holding(enclave, ("divide", b"", "fault")):
        clear(started, enclave)
        reply = started.repair(SLOT, 1, dead=False)
    assert (reply.status, reply.result.cssa) == (0, 1)
    assert reply.result.exitinfo == 0 | 3 << 8 | 1 << 31  # #DE, hardware, valid
    assert 0 < reply.result.rip < enclave.size
    works_as_new(started, enclave)


def die_at_the_gate(enclave: Enclave) -> None:
    """Knock without a key, again and again, and be killed: inside, which costs the slot a frame.

    Where the sim shows who is inside, the one who knocks is stopped until it is; else it is by luck.
    """
    knocks = mmap.mmap(-1, 8)
    pid = os.fork()
    if pid == 0:
        try:
            client = Client(enclave)
            assert lib.teemate_map_tcs(client.handle, enclave.tcs[SLOT], ffi.NULL) == 0
            regs, run = ffi.new("struct teemate_regs *"), ffi.new("struct sgx_enclave_run *")
            for count in itertools.count(1):
                lib.teemate_enter(client.handle, enclave.tcs[SLOT], regs, 2, 0, run)
                knocks[:] = count.to_bytes(8, "little")
        finally:
            os._exit(1)
    while True:
        before = knocks[:]
        while knocks[:] == before:
            os.sched_yield()
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        word = enclave.tcs_word(SLOT) if BACKEND == "sim" else 1
        if word & 1:
            break
        os.kill(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if BACKEND == "sim":  # a processor does so by itself
        enclave.set_tcs_word(SLOT, (word & 0xFFFF00) + 0x100)


def test_a_slot_in_which_somebody_died_until_no_frame_was_left_comes_back(
    started: Warden, enclave: Enclave
) -> None:
    arm(started, enclave)
    with holding(enclave, PAUSED):
        pass
    deaths = 0
    while started.probe(SLOT).status == 0:
        die_at_the_gate(enclave)
        deaths += 1
        assert deaths < (NSSA if BACKEND == "sim" else 5000)
    print(f"{deaths} deaths at the gate, {NSSA - 1} of them inside")
    clear(started, enclave)
    reply = started.repair(SLOT, 1, dead=False)
    assert (reply.entered, reply.status) == (0, -errno.EBUSY), "of a living holder nobody could tell"
    reply = started.repair(SLOT, 1, dead=True)
    assert (reply.entered, reply.status, reply.text) == (1, 0, b"")
    assert reply.repaired == reply.result.cssa == NSSA
    works_as_new(started, enclave)


@sim_only("a processor keeps the state of a TCS where nobody can write it")
@pytest.mark.parametrize("frames", [1, NSSA - 1, NSSA])
@pytest.mark.parametrize("busy", [0, 1])
def test_a_dead_holder_s_slot_comes_back_from_any_number_of_frames(
    started: Warden, enclave: Enclave, frames: int, busy: int
) -> None:
    arm(started, enclave)
    with holding(enclave, PAUSED) as holder:
        pid = holder.process.pid
    clear(started, enclave)
    running = busy if frames < NSSA else 0  # nobody runs in a TCS that cannot be entered
    enclave.set_tcs_word(SLOT, pid << 32 | frames << 8 | running)
    reply = started.repair(SLOT, 1, dead=True)
    assert (reply.entered, reply.status, reply.text) == (1, 0, b"")
    assert reply.repaired == reply.result.cssa == frames + running
    works_as_new(started, enclave)


@sim_only("a processor keeps the state of a TCS where nobody can write it")
def test_a_living_holder_s_slot_without_a_free_frame_is_busy(started: Warden, enclave: Enclave) -> None:
    arm(started, enclave)
    clear(started, enclave)
    enclave.set_tcs_word(SLOT, NSSA << 8)
    reply = started.repair(SLOT, 1, dead=False)
    assert (reply.entered, reply.status) == (0, -errno.EBUSY)
    assert b"no SSA frame" in reply.text
    assert started.repair(SLOT, 1, dead=True).status == 0
    works_as_new(started, enclave)


@contextmanager
def another_process() -> Iterator[int]:
    """The number of one that lives meanwhile."""
    process = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
    try:
        yield process.pid
    finally:
        process.communicate()


@sim_only("on a processor whoever gets no time is not inside")
def test_a_call_waits_for_who_is_in_its_slot_and_gets_no_time_and_not_for_ever(
    started: Warden, enclave: Enclave, client: Client
) -> None:
    """So the warden is when it looks at the slot on a busy host; who stays is a thief."""
    arm(started, enclave)
    slot = client.slot(index=SLOT, generation=1, key=KEY)
    assert slot.call("echo", b"before").out == b"before"
    with another_process() as pid:
        enclave.set_tcs_word(SLOT, pid << 32 | 1)
        assert slot.begin("echo", b"after") == 0
        for _ in range(3):
            assert slot.last.outcome == lib.TEEMATE_CALL_PAUSED
            assert lib.teemate_slot_resume(slot.handle, 0, slot.last) == 0
        enclave.set_tcs_word(SLOT, 0)
        assert slot.finish().out == b"after"
        enclave.set_tcs_word(SLOT, pid << 32 | 1)
        result = slot.call("echo")
    assert (result.outcome, result.vector, result.function) == (lib.TEEMATE_CALL_FAULT, 13, 2)
    enclave.set_tcs_word(SLOT, 0)


def sleeps(thread: threading.Thread) -> int:
    """How often it has waited of its own will; large when it has ended."""
    try:
        status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    except OSError:
        return 1 << 30
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


@sim_only("on a processor whoever gets no time is not inside")
def test_a_call_that_was_undone_by_a_warden_that_gets_no_time_is_revoked_and_not_stolen(
    started: Warden, enclave: Enclave, client: Client
) -> None:
    arm(started, enclave)
    slot = client.slot(index=SLOT, generation=1, key=KEY)
    slot.stand("spin", enclave.hangs)
    clear(started, enclave)
    interrupted = enclave.tcs_word(SLOT)
    with another_process() as pid:
        enclave.set_tcs_word(SLOT, interrupted & 0xFFFFFFFF | pid << 32 | 1)
        thread = threading.Thread(target=slot.finish)
        thread.start()
        before = sleeps(thread)
        while sleeps(thread) < before + 20:
            os.sched_yield()
        enclave.set_tcs_word(SLOT, interrupted)
    reply = started.repair(SLOT, 1, dead=False)
    assert (reply.entered, reply.status) == (1, 0)
    thread.join()
    assert slot.last.outcome == lib.TEEMATE_CALL_REVOKED
    assert started.control(enclave, wire.RESET, slot=SLOT).status == 0


@pytest.mark.parametrize("dead", [True, False], ids=["dead", "alive"])
def test_a_warden_that_is_killed_in_a_repair_leaves_it_to_the_next(
    make_warden: Callable[[], Warden], enclave: Enclave, dead: bool
) -> None:
    turns = 12 if BACKEND == "sim" else 4
    killed, delay = 0, 0.001
    warden = make_warden()
    assert warden.start(enclave).status == 0
    for turn in range(turns):
        generation = turn + 1
        arm(warden, enclave, generation)
        with holding(enclave, LOCKED if turn % 2 else PAUSED, generation) as holder:
            if dead:
                holder.kill()
            clear(warden, enclave, generation)
            for _ in range(3):
                warden.send(warden.repair_request(SLOT, generation, dead=dead))
                # Sooner when it was ready before, later when it was not: about as long as a repair takes.
                ready = warden.answers_within(delay)
                warden.kill()
                killed += not ready
                delay *= 0.6 if ready else 1.3
                warden = make_warden()
                reply = warden.start(enclave)
                assert (reply.status, reply.text) == (0, b"")
            reply = warden.repair(SLOT, generation, dead=dead)
            assert (reply.entered, reply.status, reply.text) == (1, 0, b"")
            if not dead:
                assert holder.go_on() == "revoked"
        assert warden.control(enclave, wire.RESET, slot=SLOT).status == 0
    assert killed >= turns // 2
    arm(warden, enclave, turns + 1)
    clear(warden, enclave, turns + 1)
    works_as_new(warden, enclave, turns + 2)
