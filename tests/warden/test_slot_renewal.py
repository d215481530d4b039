"""One request brings a slot that was given back to its next key, or stops where there is more to it."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import warden_wire as wire
from backends import sim_only
from test_slot_repair import CLEAN, KEY, LOCKED, OTHER_KEY, PARKED, PAUSED, SLOT, arm, holding, running
from warden_harness import Client, Enclave, Warden

from teemate._native import lib

ARGUMENT, UNKNOWN_MAC, STATE = -1, -4, -5
FREE_OF_1 = 1 << 8 | wire.FREE


def steps(reply: wire.WardenReply) -> tuple[int, int, int]:
    """Which step the reply is about, whether the enclave answered it, and how."""
    return reply.step, reply.entered, reply.status


RENEWED = (wire.STEP_ARM, 1, 0)


def opens(client: Client, generation: int, key: bytes) -> bool:
    """Whether the gate lets somebody with that key in."""
    slot = client.slot(index=SLOT, generation=generation, key=key)
    try:
        return slot.call("echo", b"?").outcome == lib.TEEMATE_CALL_DONE
    finally:
        slot.close()


@pytest.mark.parametrize("dead", [False, True])
def test_a_clean_slot_gets_its_next_key_by_one_request(
    started: Warden, enclave: Enclave, client: Client, dead: bool
) -> None:
    arm(started, enclave)
    with holding(enclave, CLEAN) as holder:
        if dead:
            holder.kill()
        assert steps(started.renew(enclave, SLOT, 1, OTHER_KEY, dead=dead)) == RENEWED
        assert not opens(client, 1, KEY)
        assert opens(client, 2, OTHER_KEY)


def test_a_renewal_whose_reply_was_lost_can_be_made_again(
    started: Warden, enclave: Enclave, client: Client, make_warden: Callable[[], Warden]
) -> None:
    arm(started, enclave)
    assert steps(started.renew(enclave, SLOT, 1, OTHER_KEY, dead=True)) == RENEWED
    started.kill()
    warden = make_warden()
    assert warden.start(enclave).status == 0
    assert steps(warden.renew(enclave, SLOT, 1, OTHER_KEY, dead=True)) == RENEWED
    assert opens(client, 2, OTHER_KEY)


def test_a_slot_that_has_another_next_key_keeps_it(started: Warden, enclave: Enclave, client: Client) -> None:
    arm(started, enclave)
    assert steps(started.renew(enclave, SLOT, 1, OTHER_KEY, dead=True)) == RENEWED
    assert steps(started.renew(enclave, SLOT, 1, KEY, dead=True)) == (wire.STEP_ARM, 1, STATE)
    assert opens(client, 2, OTHER_KEY)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize(
    ("state", "cssa", "word"),
    [(PARKED, 0, wire.PARKED), (PAUSED, 1, wire.INSIDE), (LOCKED, 1, wire.INSIDE)],
    ids=["parked", "interrupted", "with a lock"],
)
def test_what_had_to_be_undone_is_told_before_the_slot_is_reset(
    started: Warden, enclave: Enclave, state: tuple[str, bytes, str], cssa: int, word: int, dead: bool
) -> None:
    arm(started, enclave)
    with holding(enclave, state) as holder:
        if dead:
            holder.kill()
        reply = started.renew(enclave, SLOT, 1, OTHER_KEY, dead=dead)
        assert steps(reply) == (wire.STEP_REPAIR, 1, 0)
        assert reply.result.word & 0x7F == word
        assert reply.result.cssa >= cssa
        assert started.probe(SLOT).result.word == FREE_OF_1, "it was armed"
        refused = started.control(enclave, wire.ARM, slot=SLOT, generation=2, key=OTHER_KEY)
        assert refused.status == STATE, "it was reset"
        assert started.control(enclave, wire.RESET, slot=SLOT).status == 0
        arm(started, enclave, 2, key=OTHER_KEY)


def test_a_slot_in_which_a_thread_runs_is_not_renewed_and_loses_its_key(
    started: Warden, enclave: Enclave
) -> None:
    arm(started, enclave)
    with running(enclave):
        reply = started.renew(enclave, SLOT, 1, OTHER_KEY, dead=False)
        # Met at an interrupt it is undone.
        assert steps(reply) in {(wire.STEP_REPAIR, 0, -errno.EBUSY), (wire.STEP_REPAIR, 1, 0)}
        again = started.control(enclave, wire.CLEAR, slot=SLOT, generation=1)
        assert again.result.word in {1 << 8 | 0x80 | wire.INSIDE, FREE_OF_1}


@sim_only("a processor keeps the state of a TCS where nobody can write it")
def test_a_slot_that_stays_busy_is_told_so(started: Warden, enclave: Enclave) -> None:
    arm(started, enclave)
    enclave.set_tcs_word(SLOT, 1)
    reply = started.renew(enclave, SLOT, 1, OTHER_KEY, dead=False)
    assert steps(reply) == (wire.STEP_REPAIR, 0, -errno.EBUSY)
    assert started.control(enclave, wire.CLEAR, slot=SLOT, generation=1).result.word == FREE_OF_1


@pytest.mark.parametrize("generation", [2, 7])
def test_a_slot_of_another_generation_is_left_alone(
    started: Warden, enclave: Enclave, client: Client, generation: int
) -> None:
    arm(started, enclave)
    assert steps(started.renew(enclave, SLOT, generation, OTHER_KEY, dead=True)) == (
        wire.STEP_CLEAR,
        1,
        STATE,
    )
    assert opens(client, 1, KEY)


@pytest.mark.parametrize("part", ["clear", "reset", "arm"])
def test_a_step_with_a_forged_mac_ends_the_renewal_before_it_does_anything(
    started: Warden, enclave: Enclave, client: Client, part: str
) -> None:
    arm(started, enclave)
    request = started.renew_request(enclave, SLOT, 1, OTHER_KEY, dead=True)
    getattr(request.body.renew, part).mac[0] ^= 1
    step = {"clear": wire.STEP_CLEAR, "reset": wire.STEP_RESET, "arm": wire.STEP_ARM}[part]
    assert steps(started.ask(request)) == (step, 1, UNKNOWN_MAC)
    assert opens(client, 1, KEY) is (part == "clear")
    assert steps(started.renew(enclave, SLOT, 1, OTHER_KEY, dead=True)) == RENEWED
    assert opens(client, 2, OTHER_KEY)


@pytest.mark.parametrize(("generation", "key"), [(2, bytes(16)), (0, OTHER_KEY), (1 << 40, OTHER_KEY)])
def test_a_key_that_cannot_be_one_leaves_the_slot_free(
    started: Warden, enclave: Enclave, generation: int, key: bytes
) -> None:
    arm(started, enclave)
    request = started.renew_request(enclave, SLOT, 1, key, dead=True, armed=generation)
    assert steps(started.ask(request)) == (wire.STEP_ARM, 1, ARGUMENT)
    assert started.probe(SLOT).result.word == FREE_OF_1


def test_a_renewal_that_hangs_in_the_reset_is_done_by_the_next_warden(
    started: Warden, enclave: Enclave, client: Client, make_warden: Callable[[], Warden]
) -> None:
    arm(started, enclave)
    assert started.author(enclave, "hang_next_reset").status == 0
    started.send(started.renew_request(enclave, SLOT, 1, OTHER_KEY, dead=True))
    enclave.await_hang(started)
    started.kill()
    assert not opens(client, 1, KEY)
    warden = make_warden()
    assert warden.start(enclave).status == 0
    assert steps(warden.renew(enclave, SLOT, 1, OTHER_KEY, dead=True)) == RENEWED
    assert opens(client, 2, OTHER_KEY)


@pytest.mark.parametrize("part", ["clear", "reset", "arm"])
@pytest.mark.parametrize("change", ["op", "slot"])
def test_a_renewal_of_other_requests_or_several_slots_is_refused(
    started: Warden, enclave: Enclave, client: Client, part: str, change: str
) -> None:
    arm(started, enclave)
    request = started.renew_request(enclave, SLOT, 1, OTHER_KEY, dead=True)
    control = getattr(request.body.renew, part)
    setattr(control, change, wire.AUTHOR if change == "op" else SLOT + 1)
    wire.sign(enclave.control_key, control)
    assert steps(started.ask(request)) == (0, 0, -errno.EINVAL)
    assert opens(client, 1, KEY)


@pytest.mark.parametrize("slot", [0, 1, 1 << 40])
def test_a_slot_that_is_no_clients_is_not_renewed(started: Warden, enclave: Enclave, slot: int) -> None:
    reply = started.renew(enclave, slot, 1, OTHER_KEY, dead=True)
    assert steps(reply) == (wire.STEP_CLEAR, 1, ARGUMENT)
