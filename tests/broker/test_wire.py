"""What the codec lets through, and what it refuses before building anything from it."""

from __future__ import annotations

import array
import gc
import os
import socket
import struct
from pathlib import Path

import cbor2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from teemate import wire
from teemate.errors import ProtocolError

Pair = tuple[socket.socket, socket.socket]


def nested(depth: int) -> bytes:
    return b"\xa1\x61a" + b"\x81" * (depth - 1) + b"\x00"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no item"),
        (b"\x80", "not a map"),
        (b"garbage", "not a map"),
        (b"\xff" * 10, "not a map"),
        (b"\xa1", "more items announced"),
        (b"\xa1\x61a", "the message ends"),
        (b"\xa1\x62ab", "the message ends"),
        (b"\xa1\x62a\x01", "the message ends"),
        (b"\xa1\x61a\x19\x01", "ends inside"),
        (b"\xa1\x61a\x43ab", "ends inside"),
        (b"\xa1\x61a\xc0\x00", "a tag"),
        (b"\xa1\x61a\xc2\x41\x01", "a tag"),
        (b"\xd9\xd9\xf7\xa0", "not a map"),
        (b"\xbf\xff", "indefinite"),
        (b"\xa1\x61a\x5f\x41a\xff", "indefinite"),
        (b"\xa1\x61a\x9f\xff", "indefinite"),
        (b"\xa1\x61a\x1c\x00", "reserved"),
        (b"\xa1\x61a\xf7", "simple value"),
        (b"\xa1\x61a\xf8\x20", "simple value"),
        (b"\xa1\x61a\xff", "simple value"),
        (b"\xa2\x61a\x00\x61a\x01", "second time"),
        (b"\xa2\x61a\x00\x78\x01a\x01", "second time"),
        (b"\xa1\x01\x02", "not text"),
        (b"\xa1\x61\xff\x00", "UTF-8"),
        (b"\xa1\x61a\x62\xc3\x28", "UTF-8"),
        (b"\xa0\x00", "behind the message"),
        (b"\xa1\x61a\x9b\xff\xff\xff\xff\xff\xff\xff\xff", "more items announced"),
        (b"\xa1\x61a\x9a\x7f\xff\xff\xff\x00", "more items announced"),
        (b"\xbb\xff\xff\xff\xff\xff\xff\xff\xff\x00", "more items announced"),
        (b"\xa1\x61a\x5b\xff\xff\xff\xff\xff\xff\xff\xff", "ends inside"),
        (nested(9), "deeper than 8"),
        (b"\xa1\x61a" + b"\x81" * 60000, "deeper than 8"),
        (b"\xa1\x61a\x59\xff\xfb" + bytes(65531), "more than 65536"),
    ],
)
def test_malformed_messages_are_refused_with_reason_and_offset(data: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        wire.decode(data)
    assert reason in refused.value.message
    assert isinstance(refused.value.detail["offset"], int)


def test_the_largest_depth_and_size_pass() -> None:
    assert wire.decode(nested(8))
    data = b"\xa1\x61a\x59\xff\xfa" + bytes(65530)
    assert len(data) == 65536
    assert wire.decode(data) == {"a": bytes(65530)}


def test_a_message_that_would_be_too_long_is_not_encoded() -> None:
    with pytest.raises(ProtocolError, match="65536"):
        wire.encode({"a": bytes(65536)})


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=20,
)


def depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max((depth(item) for item in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((depth(item) for item in value), default=0)
    return 0


@given(st.dictionaries(st.text(max_size=8), values, max_size=6))
def test_what_is_encoded_comes_back(message: dict[str, object]) -> None:
    data = wire.encode(message)
    if depth(message) > wire.MAX_DEPTH:
        with pytest.raises(ProtocolError):
            wire.decode(data)
    else:
        assert wire.decode(data) == message


@given(st.binary(max_size=60))
@example(b"\xa1\x61a\xfb\x7f\xf8\x00\x00\x00\x00\x00\x00")
def test_any_bytes_are_a_map_or_a_protocol_error(data: bytes) -> None:
    try:
        wire.decode(b"\xa2" + data)
    except ProtocolError:
        return
    again = cbor2.loads(b"\xa2" + data)
    assert len(again) == 2


@given(st.data())
def test_a_flipped_byte_never_gets_past_the_check_into_the_decoder(data: st.DataObject) -> None:
    good = bytearray(
        wire.encode({"id": 3, "op": "x", "args": {"enclave": "vault", "wait": 1.5, "k": [b"x"]}})
    )
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        wire.check(bytes(good))
    except ProtocolError:
        return
    cbor2.loads(bytes(good))


@pytest.fixture
def pair() -> Pair:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def open_descriptors() -> set[str]:
    gc.collect()  # what tests before this one have left goes now
    return {fd for fd in os.listdir("/proc/self/fd") if Path(f"/proc/self/fd/{fd}").exists()}


def test_descriptors_arrive_close_on_exec_and_belong_to_the_receiver(pair: Pair) -> None:
    left, right = pair
    with left, right, open("/dev/null", "rb") as null:
        wire.send(left, b"\xa0", [null.fileno()])
        packet = wire.receive(right)
        assert packet.data == b"\xa0"
        (fd,) = packet.fds
        assert not os.get_inheritable(fd)
        assert os.fstat(fd).st_rdev == os.fstat(null.fileno()).st_rdev
        os.close(fd)


@pytest.mark.parametrize("count", [wire.MAX_FDS + 1, 100, 253])
def test_descriptors_beyond_the_limit_are_refused_and_none_stays_open(pair: Pair, count: int) -> None:
    left, right = pair
    with left, right, open("/dev/null", "rb") as null:
        before = open_descriptors()
        rights = array.array("i", [null.fileno()] * count)
        left.sendmsg([b"\xa0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        with pytest.raises(ProtocolError, match="descriptors"):
            wire.receive(right)
        assert open_descriptors() == before


def test_a_packet_beyond_the_limit_is_refused_and_its_descriptors_are_closed(
    pair: Pair,
) -> None:
    left, right = pair
    with left, right, open("/dev/null", "rb") as null:
        before = open_descriptors()
        wire.send(left, bytes(65537), [null.fileno()])
        with pytest.raises(ProtocolError, match="65536"):
            wire.receive(right)
        assert open_descriptors() == before


async def test_the_trio_helpers_do_the_same(pair: Pair) -> None:
    import trio

    with trio.socket.from_stdlib_socket(pair[0]) as left, trio.socket.from_stdlib_socket(pair[1]) as right:
        with open("/dev/null", "rb") as null:  # noqa: ASYNC230 - opening it cannot block
            await wire.send_async(left, b"\xa0", [null.fileno()])
        packet = await wire.receive_async(right)
        assert packet.data == b"\xa0"
        wire.close_all(packet.fds)
        left.shutdown(socket.SHUT_WR)
        assert (await wire.receive_async(right)).data == b""


def test_the_synchronous_side_does_not_import_trio() -> None:
    import subprocess
    import sys

    code = "import sys, teemate.wire; sys.exit('trio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_floats_are_read_in_all_three_sizes() -> None:
    for head, pack in ((b"\xf9", ">e"), (b"\xfa", ">f"), (b"\xfb", ">d")):
        assert wire.decode(b"\xa1\x61a" + head + struct.pack(pack, 1.5)) == {"a": 1.5}


def test_what_was_encoded_before_can_be_part_of_a_message() -> None:
    segments = [[0, 4096, 3, 2], [4096, 4096, 3, 1]]
    assert wire.encode({"a": 1, "s": wire.Encoded(segments)}) == wire.encode({"a": 1, "s": segments})
    with pytest.raises(TypeError):
        wire.encode({"a": object()})
