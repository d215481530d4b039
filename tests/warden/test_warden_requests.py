"""What a warden answers, and what it refuses."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable

import pytest
import warden_wire as wire
from backends import sim_only
from processes import wait_until
from warden_harness import Client, Enclave, Warden

from teemate._native import lib

KEY = bytes(range(1, 17))
SLOT = 2
STATE = -5
"""TM_E_STATE"""


def arm(warden: Warden, enclave: Enclave, *, generation: int = 1, key: bytes = KEY) -> None:
    """Arm the first client slot."""
    reply = warden.control(enclave, wire.ARM, slot=SLOT, generation=generation, key=key)
    assert (reply.entered, reply.status) == (1, 0)


def test_start_brings_the_image_header(started: Warden, enclave: Enclave) -> None:
    reply = started.control(enclave, wire.SET_KEY)
    assert (reply.entered, reply.status) == (1, 0)
    magic, version, flags = struct.unpack_from("<QII", bytes(reply.result.data))
    assert (magic, version, flags & 1) == (0x3145544D45455400, 1, 1)
    assert started.descriptors().count("/dev/null") == 2
    assert len([text for text in started.descriptors() if text.startswith("socket:")]) == 1


def test_ping_is_answered_before_start(make_warden: Callable[[], Warden]) -> None:
    assert make_warden().ping().status == 0


@pytest.mark.parametrize("op", [wire.CONTROL, wire.PROBE, wire.REPAIR, wire.RENEW])
def test_nothing_else_is_answered_before_start(make_warden: Callable[[], Warden], op: int) -> None:
    assert make_warden().ask(wire.WardenRequest(op=op)).status == -errno.ENOTCONN


def test_a_second_start_is_refused(started: Warden, enclave: Enclave) -> None:
    before = started.descriptors()
    assert started.start(enclave).status == -errno.EALREADY
    assert started.descriptors() == before
    assert started.ping().status == 0


def test_another_control_key_is_refused(
    started: Warden, make_warden: Callable[[], Warden], enclave: Enclave
) -> None:
    started.kill()
    ours = enclave.control_key
    enclave.control_key = os.urandom(16)
    reply = make_warden().start(enclave)
    assert (reply.status, reply.entered) == (-errno.EACCES, 0)
    enclave.control_key = ours
    assert make_warden().start(enclave).status == 0


def test_an_unknown_operation_is_refused(started: Warden) -> None:
    assert started.ask(wire.WardenRequest(op=99)).status == -errno.EOPNOTSUPP


@pytest.mark.parametrize(
    "message",
    [
        b"x",
        bytes(ctypes.sizeof(wire.WardenRequest)),
        bytes(wire.WardenRequest(version=wire.PROTOCOL_VERSION + 1, op=wire.PING)),
        bytes(wire.WardenRequest(version=wire.PROTOCOL_VERSION, op=wire.PING))[:-1],
        bytes(wire.WardenRequest(version=wire.PROTOCOL_VERSION, op=wire.PING)) + b"\0",
        os.urandom(60000),
    ],
    ids=["short", "zeros", "version", "one byte short", "one byte long", "noise"],
)
def test_a_message_that_is_no_request_is_refused(started: Warden, message: bytes) -> None:
    before = started.descriptors()
    started.send_raw(message, fds=(0, 0))
    assert started.receive().status == -errno.EBADMSG
    assert started.ping().status == 0
    assert started.descriptors() == before


def test_descriptors_that_nobody_wants_are_closed(started: Warden) -> None:
    before = started.descriptors()
    request = wire.WardenRequest(version=wire.PROTOCOL_VERSION, op=wire.PING)
    started.send_raw(bytes(request), fds=(0,))
    assert started.receive().status == -errno.EINVAL
    started.send_raw(bytes(request), fds=(0,) * 7)
    assert started.receive().status == -errno.EBADMSG
    started.send_raw(bytes(request), fds=(0,) * 100)
    assert started.receive().status == -errno.EBADMSG
    assert started.descriptors() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"segment_count": 0},
        {"segment_count": wire.SEGMENTS + 1},
        {"segment_count": 0xFFFFFFFF},
        {"backend": 77},
        {"backend": 0},
        {"size": 4096 * 3},
        {"size": 1 << 63},
        {"base": 0x1000},
        {"base": 0xFFFFFFFFFFFFF000},
    ],
    ids=str,
)
def test_a_start_that_describes_no_enclave_is_refused(
    make_warden: Callable[[], Warden], enclave: Enclave, changes: dict[str, int]
) -> None:
    warden = make_warden()
    reply = warden.start(enclave, **changes)
    assert reply.status < 0
    assert reply.text
    assert warden.ping().status == 0


def test_start_without_its_descriptors_is_refused(make_warden: Callable[[], Warden]) -> None:
    assert make_warden().ask(wire.WardenRequest(op=wire.START)).status == -errno.EINVAL


def test_a_slot_lives_from_arm_to_reset(started: Warden, enclave: Enclave, client: Client) -> None:
    arm(started, enclave)
    slot = client.slot(index=SLOT, generation=1, key=KEY)
    result = slot.call("echo", b"hello")
    assert (result.status, result.out) == (0, b"hello")
    assert slot.close() == 1
    cleared = started.control(enclave, wire.CLEAR, slot=SLOT, generation=1)
    assert (cleared.status, cleared.result.word) == (0, 1 << 8 | wire.FREE)
    assert cleared.result.calls == 1
    probe = started.probe(SLOT)
    assert (probe.entered, probe.status, probe.result.cssa) == (1, 0, 0)
    assert started.control(enclave, wire.RESET, slot=SLOT).status == 0
    other = bytes(range(100, 116))
    arm(started, enclave, generation=2, key=other)
    stale = client.slot(index=SLOT, generation=1, key=KEY)
    assert stale.call("echo").outcome == lib.TEEMATE_CALL_REVOKED
    stale.close()
    assert client.slot(index=SLOT, generation=2, key=other).call("echo", b"again").out == b"again"


def test_the_identity_is_the_one_that_the_broker_bound(
    started: Warden, enclave: Enclave, client: Client
) -> None:
    arm(started, enclave)
    slot = client.slot(index=SLOT, generation=1, key=KEY, principal="uid=1234")
    out = slot.call("whoami").out
    bound = wire.Identity.from_buffer_copy(
        wire.bind(enclave.control_key, slot=SLOT, generation=1, principal="uid=1234", uid=0), 8
    )
    assert bytes(bound) in out


def test_a_forged_mac_is_refused(started: Warden, enclave: Enclave) -> None:
    request = started.control_request(enclave, wire.ARM, slot=SLOT, generation=1, key=KEY)
    request.body.control.key[0] ^= 1
    reply = started.ask(request)
    assert (reply.entered, reply.status) == (1, -4)


def test_a_replayed_control_request_is_refused(started: Warden, enclave: Enclave) -> None:
    request = started.control_request(enclave, wire.ARM, slot=SLOT, generation=1, key=KEY)
    assert started.ask(request).status == 0
    assert started.control(enclave, wire.CLEAR, slot=SLOT, generation=1).status == 0
    assert started.ask(request).status < 0
    assert started.probe(SLOT).result.word == 1 << 8 | wire.FREE


def test_probe_refuses_slots_that_are_not_there(started: Warden, enclave: Enclave) -> None:
    for slot in (len(enclave.tcs), 1 << 63, (1 << 64) - 1):
        assert started.probe(slot).status == -errno.EINVAL


@sim_only("a processor keeps the state of a TCS where nobody can write it")
def test_a_slot_that_a_thread_runs_in_is_seen_by_its_probe(started: Warden, enclave: Enclave) -> None:
    arm(started, enclave)
    enclave.set_tcs_word(SLOT, 1)
    busy = started.probe(SLOT)
    assert (busy.entered, busy.status, busy.vector) == (0, -errno.EBUSY, 13 + 1)


def test_an_interrupted_slot_is_seen_by_its_probe(started: Warden, enclave: Enclave, client: Client) -> None:
    arm(started, enclave)
    slot = client.slot(index=SLOT, generation=1, key=KEY)
    slot.stand("spin", enclave.hangs)
    slot.abandon()
    assert slot.begin("empty") == -errno.ESTALE
    assert slot.close() == 0
    probe = started.probe(SLOT)
    assert (probe.status, probe.result.cssa, probe.result.word & 0x7F) == (0, 1, wire.INSIDE)


def test_a_parked_slot_is_seen_by_its_probe(started: Warden, enclave: Enclave, client: Client) -> None:
    arm(started, enclave)
    slot = client.slot(index=SLOT, generation=1, key=KEY)
    assert slot.begin("ask", b"?") == 0
    slot.go_on()
    assert slot.last.outcome == lib.TEEMATE_CALL_OCALL
    slot.abandon()
    assert slot.close() == 0
    probe = started.probe(SLOT)
    assert (probe.status, probe.result.cssa, probe.result.word & 0x7F) == (0, 0, wire.PARKED)


def test_author_control_gets_and_gives_data(started: Warden, enclave: Enclave) -> None:
    reply = started.author(enclave, "echo", b"data")
    assert (reply.status, reply.result.length) == (0, 192)
    assert bytes(reply.result.data)[:5] == b"data\0"
    assert started.author(enclave, "no such thing").status == -2


def test_the_warden_tells_the_time_while_nobody_asks(
    make_enclave: Callable[..., Enclave], make_warden: Callable[[], Warden]
) -> None:
    enclave = make_enclave(time=True)
    warden = make_warden()
    assert warden.start(enclave).status == 0
    arm(warden, enclave)
    client = Client(enclave)
    slot = client.slot(index=SLOT, generation=1, key=KEY)
    while int.from_bytes(slot.call("clock").out, "little") == 0:
        pass
    # The broker's next number is still larger than the warden's.
    assert warden.control(enclave, wire.CLEAR, slot=SLOT, generation=1).status == 0
    slot.close()
    client.close()


def test_the_clock_goes_on_when_the_last_request_was_refused(
    make_enclave: Callable[..., Enclave], make_warden: Callable[[], Warden]
) -> None:
    enclave = make_enclave(time=True)
    warden = make_warden()
    assert warden.start(enclave).status == 0
    arm(warden, enclave)
    client = Client(enclave)
    slot = client.slot(index=SLOT, generation=1, key=KEY)
    # Its number is used up, and those that the warden tells the time with have to be larger.
    refused = warden.control(enclave, wire.CLEAR, slot=SLOT, generation=7)
    assert (refused.entered, refused.status) == (1, STATE)
    stood = slot.call("clock").out
    wait_until(lambda: slot.call("clock").out != stood, "the clock has gone on")
    slot.close()
    client.close()


def test_the_end_of_the_socketpair_ends_the_warden(started: Warden) -> None:
    assert started.close() == 0


def test_the_end_of_the_socketpair_ends_a_warden_that_hangs(started: Warden, enclave: Enclave) -> None:
    started.send_author(enclave, "hang")
    enclave.await_hang(started)
    assert started.close() == 0


def test_half_a_shutdown_ends_the_warden_too(started: Warden) -> None:
    started.socket.shutdown(socket.SHUT_RDWR)
    assert started.process.wait(timeout=60) == 0
