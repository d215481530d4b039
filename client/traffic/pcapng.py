"""Files that Wireshark opens: pcapng, as much of it as recordings need.

Format: https://www.ietf.org/archive/id/draft-ietf-opsawg-pcapng-02.html, cited by its sections.  Written is
one section, in this machine's byte order.  Read is what others may have made of it too:
both byte orders, several sections, blocks and options that are not known here.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple, final

from teemate.errors import ProtocolError

__all__ = ["LINKTYPE_USER0", "LINKTYPE_USER1", "Packet", "Section", "Writer", "read"]

LINKTYPE_USER0, LINKTYPE_USER1 = 147, 148
"""Reserved for private use (tcpdump.org, link-layer header types): up to 162."""
_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6  # 11.1
_MAGIC = 0x1A2B3C4D
_END, _COMMENT, _PROGRAM = 0, 1, 4  # 3.5, 4.1
_NAME, _RESOLUTION = 2, 9  # 4.2
_FLAGS = 2  # 4.3.1
_MICROSECONDS = 6
_LONGEST_OPTION = 0xFFFF
_LARGEST_BLOCK = 16 << 20
"""No block of ours comes near it; a file that announces more is damaged."""


class Section(NamedTuple):
    """The beginning of a section: who has written it, and what it says of itself."""

    program: str
    comments: tuple[str, ...]


class Packet(NamedTuple):
    """One packet; `data` may be less of it than its `size`."""

    at: float
    """Seconds since 1970."""
    data: bytes
    size: int
    inbound: bool
    comments: tuple[str, ...]


def _option(code: int, value: bytes) -> bytes:
    value = value[:_LONGEST_OPTION]
    return struct.pack("=HH", code, len(value)) + value + b"\0" * (-len(value) % 4)


def _comments(comments: Sequence[str]) -> bytes:
    return b"".join(_option(_COMMENT, text.encode("utf-8", "backslashreplace")) for text in comments)


@final
class Writer:
    """Writes packets to `file`, which stays the caller's; each is complete when :meth:`packet` returns.

    Those with data are of LINKTYPE_USER0.  Others are of LINKTYPE_USER1: who takes the former apart would
    find them damaged.
    """

    def __init__(
        self, file: BinaryIO, *, program: str, comments: Sequence[str], names: Sequence[str]
    ) -> None:
        self._file = file
        options = _comments(comments) + _option(_PROGRAM, program.encode())
        self._block(_SECTION, struct.pack("=IHHq", _MAGIC, 1, 0, -1), options)
        for link, name in zip((LINKTYPE_USER0, LINKTYPE_USER1), names, strict=True):
            options = _option(_NAME, name.encode()) + _option(_RESOLUTION, bytes([_MICROSECONDS]))
            self._block(_INTERFACE, struct.pack("=HHI", link, 0, 0), options)

    def packet(self, packet: Packet) -> None:
        """Write one packet."""
        at = round(packet.at * 10**_MICROSECONDS)
        head = struct.pack(
            "=IIIII", 0 if packet.data else 1, at >> 32, at & 0xFFFFFFFF, len(packet.data), packet.size
        )
        body = packet.data + b"\0" * (-len(packet.data) % 4)
        options = _option(_FLAGS, struct.pack("=I", 1 if packet.inbound else 2)) + _comments(packet.comments)
        self._block(_PACKET, head + body, options)

    def _block(self, kind: int, body: bytes, options: bytes) -> None:
        content = body + options + _option(_END, b"")
        length = struct.pack("=I", len(content) + 12)
        self._file.write(struct.pack("=I", kind) + length + content + length)
        self._file.flush()


def read(file: BinaryIO) -> Iterator[Section | Packet]:
    """Yield the sections and the packets of our link types in `file`, in their order.

    A last block that is not all there is left out: who wrote it was killed meanwhile.

    Raises
    ------
    ProtocolError
        It is no such file, or damaged.

    """
    order = "<" if sys.byteorder == "little" else ">"
    interfaces: list[tuple[int, int]] = []
    started = False
    while head := file.read(8):
        if len(head) < 8:
            if not started:
                raise _damaged("it is no pcapng file")
            return
        kind = struct.unpack("<I", head[:4])[0]  # the section's reads the same both ways
        if kind == _SECTION:
            magic = file.read(4)
            order = "<" if magic == struct.pack("<I", _MAGIC) else ">"
            if magic != struct.pack(f"{order}I", _MAGIC):
                raise _damaged("it is no pcapng file")
            interfaces.clear()
            started = True
        elif not started:
            raise _damaged("it is no pcapng file")
        else:
            magic = b""
            kind = struct.unpack(f"{order}I", head[:4])[0]
        length = struct.unpack(f"{order}I", head[4:])[0]
        if length % 4 or not 12 + len(magic) <= length <= _LARGEST_BLOCK:
            raise _damaged(f"a block of {length} bytes")
        rest = length - 8 - len(magic)
        content = file.read(rest)
        if len(content) < rest:
            return
        if content[-4:] != head[4:]:
            raise _damaged("a block ends with another length than it begins with")
        try:
            if kind == _SECTION:
                options = dict(_options(content[12:-4], order))
                program = options.get(_PROGRAM, b"").decode(errors="replace")
                yield Section(program, _texts(content[12:-4], order))
            elif kind == _INTERFACE:
                link = struct.unpack_from(f"{order}H", content)[0]
                interfaces.append((link, _ticks(dict(_options(content[8:-4], order)))))
            elif kind == _PACKET:
                packet = _packet(content[:-4], order, interfaces)
                if packet is not None:
                    yield packet
        except (struct.error, IndexError):
            raise _damaged("a block is shorter than what it holds") from None


def _packet(content: bytes, order: str, interfaces: list[tuple[int, int]]) -> Packet | None:
    number, high, low, captured, size = struct.unpack_from(f"{order}IIIII", content)
    link, ticks = interfaces[number]
    if link not in (LINKTYPE_USER0, LINKTYPE_USER1):
        return None
    end = 20 + captured
    if end > len(content):
        raise IndexError
    options = content[end + -captured % 4 :]
    flags = dict(_options(options, order)).get(_FLAGS, bytes(4))
    inbound = struct.unpack(f"{order}I", flags)[0] & 3 == 1
    at = (high << 32 | low) / ticks
    return Packet(at, content[20:end], size, inbound, _texts(options, order))


def _ticks(options: dict[int, bytes]) -> int:
    """Return how many there are in a second."""
    resolution = options.get(_RESOLUTION, bytes([_MICROSECONDS]))[0]
    return int((2 if resolution & 0x80 else 10) ** (resolution & 0x7F))


def _texts(options: bytes, order: str) -> tuple[str, ...]:
    return tuple(
        value.decode(errors="replace") for code, value in _options(options, order) if code == _COMMENT
    )


def _options(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + 4 <= len(data):
        code, length = struct.unpack_from(f"{order}HH", data, position)
        if code == _END:
            return
        position += 4
        if position + length > len(data):
            raise IndexError
        yield code, data[position : position + length]
        position += length + -length % 4


def _damaged(what: str) -> ProtocolError:
    return ProtocolError(f"the recording cannot be read: {what}", {"reason": what})
