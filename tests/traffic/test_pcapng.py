"""Recordings are files that others can read, and damaged ones are refused with a reason."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teemate.errors import ProtocolError
from teemate.traffic.pcapng import Packet, Section, Writer, read

PACKETS = (
    Packet(1795794549.169884, b"\xa1\x62id\x01", 5, True, ("first", "ünd second")),
    Packet(1795794549.2, b"", 70000, False, ()),
    Packet(0.0, b"1234", 4, False, ("",)),
)


def recording() -> bytes:
    file = io.BytesIO()
    writer = Writer(file, program="test", comments=("about", "more"), names=("messages", "others"))
    for packet in PACKETS:
        writer.packet(packet)
    return file.getvalue()


def test_what_is_written_is_read_again() -> None:
    section, *packets = read(io.BytesIO(recording()))
    assert section == Section("test", ("about", "more"))
    for packet, wanted in zip(packets, PACKETS, strict=True):
        assert isinstance(packet, Packet)
        assert packet._replace(at=round(packet.at, 6)) == wanted


def block(kind: int, content: bytes) -> bytes:
    length = struct.pack(">I", 12 + len(content))
    return struct.pack(">I", kind) + length + content + length


def test_the_other_byte_order_unknown_blocks_and_other_clocks_are_read() -> None:
    section = block(0x0A0D0D0A, struct.pack(">IHHq", 0x1A2B3C4D, 1, 0, -1))
    ethernet = block(1, struct.pack(">HHI", 1, 0, 0))
    ours = block(1, struct.pack(">HHI", 147, 0, 0) + struct.pack(">HHB3x", 9, 1, 9))  # nanoseconds
    unknown = block(0x0BAD, b"what is this")
    packets = [block(6, struct.pack(">IIIII", number, 0, 1_500_000_000, 4, 4) + b"data") for number in (0, 1)]
    found = list(read(io.BytesIO(section + ethernet + unknown + ours + b"".join(packets))))
    assert found == [Section("", ()), Packet(1.5, b"data", 4, False, ())]


def test_a_file_whose_writer_was_killed_is_read_up_to_there() -> None:
    whole = recording()
    for end in range(len(whole)):
        try:
            found = list(read(io.BytesIO(whole[:end])))
        except ProtocolError:
            assert end < 12  # not even its beginning
        else:
            assert len(found) <= len(PACKETS)


@pytest.mark.parametrize(
    "data", [b"no recording at all", b"\0" * 64, recording()[:4] + b"\x07\0\0\0" + recording()[8:]]
)
def test_what_is_no_recording_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        list(read(io.BytesIO(data)))


@given(st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    damaged = bytearray(recording())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        for _ in read(io.BytesIO(bytes(damaged))):
            pass
    except ProtocolError:
        pass
