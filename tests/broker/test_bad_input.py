"""What a client can send to hurt the broker: it gets a typed error, and nobody else notices."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import cbor2
import pytest
from images import Images
from raw_client import RawClient
from running_broker import RunningBroker

from teemate import wire

Connect = Callable[..., RawClient]


@pytest.fixture
def witness(vault_broker: RunningBroker, connect: Connect) -> RawClient:
    """A client with a grant, whom nothing of what follows may touch."""
    client = connect(vault_broker, name="witness")
    client.ok("attach", enclave="vault", slots=2)
    return client


def still_served(vault_broker: RunningBroker, witness: RawClient, connect: Connect) -> None:
    """The witness has what it had, and a newcomer gets in."""
    witness.ok("ping")
    holders = {
        info["name"]: [grant["slots"] for grant in info["grants"]]
        for info in witness.ok("clients")["clients"]
    }
    assert holders["witness"] == [[2, 3]]
    newcomer = connect(vault_broker, name="newcomer")
    grant = newcomer.ok("attach", enclave="vault")["grant"]
    newcomer.ok("detach", grant=grant, clean=True)


GARBAGE = {
    "text": b"hello, world",
    "zeros": bytes(100),
    "truncated": wire.encode({"id": 1, "op": "ping", "args": {"a": [1, 2, 3]}})[:-2],
    "no-map": cbor2.dumps([1, 2, 3]),
    "tag": cbor2.dumps({"id": 1, "op": "ping", "args": {"when": cbor2.CBORTag(0, "2020-01-01T00:00:00Z")}}),
    "bignum": cbor2.dumps({"id": 2**70, "op": "ping"}),
    "indefinite": b"\xbf\x62id\x01\x62op\x64ping\xff",
    "bomb-of-arrays": b"\xa1\x61a" + b"\x81" * 60000 + b"\x00",
    "bomb-of-counts": b"\xa1\x61a" + b"\x9b\x00\x00\x00\xff\xff\xff\xff\xff" * 7000,
    "bomb-of-shared-values": b"\xa1\x61a\xd8\x1c\x81\xd8\x1d\x00",
    "duplicate-keys": b"\xa2\x62id\x01\x62id\x02",
    "behind-it": wire.encode({"id": 1, "op": "ping"}) + b"\x00",
    "no-id": wire.encode({"op": "ping"}),
    "negative-id": wire.encode({"id": -1, "op": "ping"}),
    "true-as-id": wire.encode({"id": True, "op": "ping"}),
    "no-op": wire.encode({"id": 1}),
    "op-is-a-number": wire.encode({"id": 1, "op": 7}),
    "args-are-a-list": wire.encode({"id": 1, "op": "ping", "args": [1]}),
    "65537-bytes": bytes(65537),
}


def test_what_is_no_message_gets_a_protocol_error_and_the_end_of_its_connection(
    vault_broker: RunningBroker, witness: RawClient, connect: Connect
) -> None:
    for greeted in (False, True):
        for data in GARBAGE.values():
            client = connect(vault_broker, hello=greeted)
            client.sock.send(data)
            client.breaks_protocol()
    still_served(vault_broker, witness, connect)
    reasons = [record for record in vault_broker.log() if record["event"] == "client broke the protocol"]
    assert len(reasons) == 2 * len(GARBAGE)
    assert all(record["reason"] and record["pid"] == os.getpid() for record in reasons)


def test_a_message_of_the_largest_size_is_answered(vault_broker: RunningBroker, connect: Connect) -> None:
    client = connect(vault_broker)
    empty = wire.encode({"id": 7, "op": "ping", "args": {"pad": b""}})
    data = wire.encode({"id": 7, "op": "ping", "args": {"pad": bytes(65536 - len(empty) - 2)}})
    assert len(data) == 65536
    client.sock.send(data)
    assert client.reply(7) == {"id": 7, "ok": {}}


def test_the_largest_packet_that_the_kernel_lets_through_only_ends_its_connection(
    vault_broker: RunningBroker, witness: RawClient, connect: Connect
) -> None:
    client = connect(vault_broker)
    client.sock.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_SNDBUFFORCE", 32), 1 << 30)
    size = 1 << 28
    while True:
        try:
            client.sock.send(bytes(size))
            break
        except OSError:  # EMSGSIZE, or no memory for so much at once
            size //= 2
    assert size > 1 << 17
    client.breaks_protocol()
    still_served(vault_broker, witness, connect)


def test_ten_thousand_requests_without_reading_replies_fill_only_the_asker_s_own_buffers(
    vault_broker: RunningBroker, witness: RawClient, connect: Connect
) -> None:
    client = connect(vault_broker)
    client.sock.setblocking(False)
    sent = 0
    while sent < 10_000:
        try:
            wire.send(client.sock, wire.encode({"id": sent, "op": "enclaves"}))
        except BlockingIOError:
            break
        sent += 1
    still_served(vault_broker, witness, connect)
    assert sent < 10_000, "the kernel took everything: then nothing was pushed back"
    # Nothing is lost either: who reads at last gets every reply, in order, and may go on.
    client.sock.setblocking(True)
    client.sock.settimeout(30)
    for number in range(sent):
        assert client.reply(number)["ok"]["enclaves"]
    client.ok("ping")


def test_descriptors_that_nobody_asked_for_are_closed_and_end_the_connection(
    vault_broker: RunningBroker, witness: RawClient, connect: Connect
) -> None:
    client = connect(vault_broker)
    before = len(os.listdir(f"/proc/{vault_broker.pid}/fd"))
    for count in (1, 2, 4, 5, 200):
        with open("/dev/null", "rb") as null:
            wire.send(client.sock, wire.encode({"id": 1, "op": "ping"}), [null.fileno()] * count)
        client.breaks_protocol()
        client.close()
        while witness.ok("stats")["stats"]["disposal"]["files"]:  # a thread closes them
            pass
        client = connect(vault_broker)
    while witness.ok("stats")["stats"]["clients"] > 2:
        pass
    assert len(os.listdir(f"/proc/{vault_broker.pid}/fd")) <= before
    still_served(vault_broker, witness, connect)


def test_create_without_its_image_or_with_two_ends_the_connection(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    for count in (0, 2):
        client = connect(vault_broker)
        with open("/dev/null", "rb") as null:
            client.post("create", (null.fileno(),) * count, name="x", sigstruct=bytes(1808))
        assert str(count) in client.breaks_protocol()["message"]


def test_the_first_message_is_hello(vault_broker: RunningBroker, connect: Connect) -> None:
    client = connect(vault_broker, hello=False)
    client.send({"id": 1, "op": "ping"})
    assert "hello" in client.breaks_protocol()["message"]


def test_another_version_is_unsupported_and_hello_is_said_once(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    client = connect(vault_broker, hello=False)
    assert client.fails("hello", "unsupported", version=2)["detail"] == {"version": 1}
    client.ok("hello", version=1)
    client.fails("hello", "protocol-error", version=1)
    client.ok("ping")


def test_unknown_operations_are_unsupported_and_unknown_keys_are_ignored(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    client = connect(vault_broker)
    client.fails("teleport", "unsupported")
    client.fails("x" * 60000, "unsupported")
    client.send({"id": 99, "op": "ping", "colour": "blue", "args": {"n": 1}})
    assert client.reply(99) == {"id": 99, "ok": {}}


WRONG_ARGUMENTS: list[tuple[str, dict[str, object], str]] = [
    ("attach", {}, "enclave"),
    ("attach", {"enclave": 5}, "enclave"),
    ("attach", {"enclave": ""}, "enclave"),
    ("attach", {"enclave": "x" * 65}, "enclave"),
    ("attach", {"enclave": "a\x00b"}, "enclave"),
    ("attach", {"enclave": "vault", "slots": -1}, "slots"),
    ("attach", {"enclave": "vault", "slots": 65536}, "slots"),
    ("attach", {"enclave": "vault", "slots": True}, "slots"),
    ("attach", {"enclave": "vault", "slots": 1.0}, "slots"),
    ("attach", {"enclave": "vault", "wait": -1}, "wait"),
    ("attach", {"enclave": "vault", "wait": float("inf")}, "wait"),
    ("attach", {"enclave": "vault", "wait": float("nan")}, "wait"),
    ("attach", {"enclave": "vault", "wait": "soon"}, "wait"),
    ("attach", {"enclave": "vault", "wait": None}, "wait"),
    ("slots.acquire", {"grant": "1"}, "grant"),
    ("slots.release", {"grant": 1, "slots": []}, "slots"),
    ("slots.release", {"grant": 1, "slots": [2, 2]}, "slots"),
    ("slots.release", {"grant": 1, "slots": [4096]}, "slots"),
    ("slots.release", {"grant": 1, "slots": [2], "clean": 1}, "clean"),
    ("detach", {"grant": 2**53}, "grant"),
    ("revoke", {"client": -5}, "client"),
    ("clients", {"after": "x"}, "after"),
    ("clients", {"activity": 1}, "activity"),
    ("holders", {"enclave": "vault", "calls": "yes"}, "calls"),
]


def test_arguments_of_the_wrong_type_are_named_and_the_connection_lives_on(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    client = connect(vault_broker)
    for op, args, argument in WRONG_ARGUMENTS:
        error = client.fails(op, "protocol-error", **args)
        assert error["detail"] == {"operation": op, "argument": argument}
    client.ok("ping")


def test_revoke_wants_exactly_one_target(vault_broker: RunningBroker, connect: Connect) -> None:
    client = connect(vault_broker)
    client.fails("revoke", "protocol-error")
    client.fails("revoke", "protocol-error", grant=1, client=1)


def test_another_client_s_grant_and_slots_are_not_there(
    vault_broker: RunningBroker, witness: RawClient, connect: Connect
) -> None:
    thief = connect(vault_broker)
    mine = thief.ok("attach", enclave="vault")["grant"]
    (theirs,) = witness.ok("clients")["clients"][0]["grants"]
    thief.fails("slots.acquire", "not-found", grant=theirs["grant"])
    thief.fails("slots.release", "not-found", grant=theirs["grant"], slots=[2], clean=True)
    thief.fails("detach", "not-found", grant=theirs["grant"], clean=True)
    thief.fails("slots.release", "not-found", grant=mine, slots=[2], clean=True)
    thief.fails("slots.release", "not-found", grant=mine, slots=[0], clean=True)
    thief.fails("slots.release", "not-found", grant=mine, slots=[4000], clean=True)
    still_served(vault_broker, witness, connect)


def test_an_empty_packet_is_the_end(vault_broker: RunningBroker, connect: Connect) -> None:
    client = connect(vault_broker)
    client.sock.send(b"")
    assert client.receive() is None


# ---- images ------------------------------------------------------------------------

CREATE = """
[[create]]
uid = 0
"""


def test_images_that_are_no_files_or_end_early_are_image_errors(
    broker: Callable[..., RunningBroker],
    vault_policy: Callable[..., str],
    connect: Connect,
    images: Images,
    tmp_path: Path,
) -> None:
    running = broker(vault_policy(more=CREATE))
    client = connect(running)
    sigstruct = images.vault.sigstruct.read_bytes()
    image = images.vault.sgxs.read_bytes()

    def refused(fd: int, signature: bytes = sigstruct) -> str:
        try:
            error = client.fails("create", "image-error", (fd,), name="second", sigstruct=signature)
        finally:
            os.close(fd)
        assert error["detail"]["step"]
        message: str = error["message"]
        return message

    reading, writing = os.pipe()
    os.close(writing)
    assert "pipe" in refused(reading)
    assert "directory" in refused(os.open(tmp_path, os.O_RDONLY))
    assert "device" in refused(os.open("/dev/zero", os.O_RDONLY))
    for cut in (0, 10, 63, len(image) // 2, len(image) - 1):
        short = tmp_path / "short.sgxs"
        short.write_bytes(image[:cut])
        refused(os.open(short, os.O_RDONLY))
    refused(os.open(images.vault.sgxs, os.O_PATH))
    refused(os.open(images.vault.sgxs, os.O_RDONLY), bytes(1808))
    flipped = bytearray(sigstruct)
    flipped[600] ^= 1
    assert "signature" in refused(os.open(images.vault.sgxs, os.O_RDONLY), bytes(flipped)).lower()
    refused(os.open(images.faults.sgxs, os.O_RDONLY))
    assert [info["name"] for info in client.ok("enclaves")["enclaves"]] == ["vault"]
    assert client.ok("stats")["stats"]["addresses"]["ranges"] == 1
