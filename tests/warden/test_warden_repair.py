"""A warden brings its own TCSs back, whatever happened to the last one."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable

import pytest
import warden_wire as wire
from backends import sim_only
from warden_harness import Client, Enclave, Warden

KEY = bytes(range(1, 17))
SLOT = 2


def usable(warden: Warden, enclave: Enclave, generation: int = 1) -> None:
    """Check that both warden TCSs are as new and that a client slot can be armed and used."""
    for tcs in (0, 1):
        probe = warden.probe(tcs)
        assert (probe.entered, probe.status, probe.result.cssa) == (1, 0, 0)
    armed = warden.control(enclave, wire.ARM, slot=SLOT, generation=generation, key=KEY)
    assert (armed.entered, armed.status) == (1, 0)
    client = Client(enclave)
    slot = client.slot(index=SLOT, generation=generation, key=KEY)
    assert slot.call("echo", b"works").out == b"works"
    slot.close()
    client.close()


def test_a_hundred_hanging_control_ecalls_leave_the_enclave_usable(
    make_warden: Callable[[], Warden], enclave: Enclave
) -> None:
    repaired = 0
    for _ in range(100):
        warden = make_warden()
        reply = warden.start(enclave)
        assert (reply.status, reply.text) == (0, b"")
        repaired += reply.repaired
        warden.send_author(enclave, "hang")
        enclave.await_hang(warden)
        warden.kill()
    warden = make_warden()
    assert warden.start(enclave).status == 0
    assert repaired >= 99, "each but the first found what the one before had left"
    usable(warden, enclave)


def test_a_repair_can_be_killed_at_any_point_and_done_again(
    make_warden: Callable[[], Warden], enclave: Enclave
) -> None:
    for turn in range(20):
        warden = make_warden()
        reply = warden.start(enclave)
        assert (reply.status, reply.text) == (0, b"")
        warden.send_author(enclave, "hang")
        enclave.await_hang(warden)
        warden.kill()
        for part in range(3):
            warden = make_warden()
            warden.send_start(enclave)
            warden.answers_within((turn * 3 + part) * 0.0003)
            warden.kill()
    warden = make_warden()
    assert warden.start(enclave).status == 0
    usable(warden, enclave)


def test_a_crash_in_a_control_ecall_is_told_and_the_next_request_works(
    started: Warden, enclave: Enclave
) -> None:
    for _ in range(20):
        reply = started.author(enclave, "crash")
        assert (reply.entered, reply.status, reply.vector) == (0, -errno.EFAULT, 6 + 1)
        assert reply.result.exitinfo & 0xFF == 6
        assert 0 < reply.result.rip < enclave.size
        assert started.author(enclave, "echo").status == 0
    usable(started, enclave)


def test_a_hang_with_a_lock_leaves_the_lock_to_others(
    make_warden: Callable[[], Warden], enclave: Enclave
) -> None:
    first = make_warden()
    assert first.start(enclave).status == 0
    first.send_author(enclave, "hang_with_lock")
    enclave.await_hang(first)
    first.kill()
    second = make_warden()
    assert second.start(enclave).status == 0
    assert second.control(enclave, wire.ARM, slot=SLOT, generation=1, key=KEY).status == 0
    client = Client(enclave)
    slot = client.slot(index=SLOT, generation=1, key=KEY)
    owner_dead = -9
    assert slot.call("take").status in (0, owner_dead)
    assert slot.call("take").status == 0
    slot.close()
    client.close()


def test_a_hang_in_the_middle_of_reset_is_done_again(
    make_warden: Callable[[], Warden], enclave: Enclave
) -> None:
    first = make_warden()
    assert first.start(enclave).status == 0
    usable(first, enclave)
    assert first.author(enclave, "hang_next_reset").status == 0
    assert first.control(enclave, wire.CLEAR, slot=SLOT, generation=1).status == 0
    first.send(first.control_request(enclave, wire.RESET, slot=SLOT))
    enclave.await_hang(first)
    first.kill()
    second = make_warden()
    assert second.start(enclave).status == 0
    too_early = second.control(enclave, wire.ARM, slot=SLOT, generation=2, key=KEY)
    assert too_early.status == -5
    assert second.control(enclave, wire.RESET, slot=SLOT).status == 0
    usable(second, enclave, generation=2)


def test_a_start_that_hung_is_done_again(
    make_warden: Callable[[], Warden], make_enclave: Callable[..., Enclave]
) -> None:
    enclave = make_enclave(defines=("HANG_AT_START",))
    first = make_warden()
    first.send_start(enclave)
    enclave.await_hang(first)
    first.kill()
    second = make_warden()
    reply = second.start(enclave)
    assert (reply.status, reply.text) == (0, b"")
    usable(second, enclave)


FULL = 3  # NSSA of the test's image


@sim_only("a processor keeps the state of a TCS where nobody can write it")
@pytest.mark.parametrize("busy", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=lambda b: f"busy={b}")
@pytest.mark.parametrize(
    "cssa",
    [(1, 0), (0, 1), (1, 1), (2, 1), (FULL, 0), (0, FULL), (FULL, 1), (1, FULL), (FULL - 1, 0)],
    ids=str,
)
def test_both_tcss_come_back_from_wherever_they_stood(
    make_warden: Callable[[], Warden], enclave: Enclave, cssa: tuple[int, int], busy: tuple[int, int]
) -> None:
    first = make_warden()
    assert first.start(enclave).status == 0
    first.kill()
    holder = 1 << 23  # which no process is: PID_MAX_LIMIT is half of it
    frames = 0
    for tcs in (0, 1):
        assert enclave.nssa(tcs) == FULL
        # Nobody runs in a TCS that cannot be entered.
        running = busy[tcs] if cssa[tcs] < FULL else 0
        enclave.set_tcs_word(tcs, holder << 32 | cssa[tcs] << 8 | running)
        frames += cssa[tcs] + running
    second = make_warden()
    reply = second.start(enclave)
    assert (reply.status, reply.text) == (0, b"")
    assert reply.repaired == frames
    usable(second, enclave)


@sim_only("a processor keeps the state of a TCS where nobody can write it")
def test_two_tcss_without_a_free_frame_are_told_and_nothing_crashes(
    make_warden: Callable[[], Warden], enclave: Enclave
) -> None:
    first = make_warden()
    assert first.start(enclave).status == 0
    first.kill()
    for tcs in (0, 1):
        enclave.set_tcs_word(tcs, enclave.nssa(tcs) << 8)
    second = make_warden()
    reply = second.start(enclave)
    assert reply.status == -errno.EBUSY
    assert b"cannot" in reply.text or b"does not" in reply.text
    assert second.ping().status == 0


@sim_only("a processor keeps the state of a TCS where nobody can write it")
def test_start_waits_no_longer_than_its_patience_for_a_holder_that_lives(
    make_warden: Callable[[], Warden], enclave: Enclave, started: Warden
) -> None:
    started.kill()
    alive = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
    try:
        enclave.set_tcs_word(0, alive.pid << 32 | 1)
        reply = make_warden().start(enclave)
        assert (reply.status, reply.repaired) == (0, 1)
    finally:
        alive.communicate()
