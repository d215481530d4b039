"""One message on the wire: CBOR in a SOCK_SEQPACKET packet, with descriptors beside it.

Both ends import this module, so that they cannot disagree: the client library and the
broker.  What came from the other side is looked through byte by byte *before* any
object is built from it (:func:`check`), because a decoder that builds first has done the
attacker's work by the time it complains.  The rules are those of ``protocol.cddl``: one map of
at most 64 KiB, text keys, no tags, no indefinite lengths, no duplicate keys, depth at
most 8, valid UTF-8, nothing behind it.

Descriptors: :func:`receive` and :func:`receive_async` return the descriptors that came with a
packet, close-on-exec, and the caller owns them.  When they raise, every descriptor that had
arrived is closed (or given to the caller's `dispose`).  The senders never take a descriptor over.

trio is not imported here: the asynchronous helpers only await methods of the socket that
they are given, so a program that uses the synchronous library never loads it.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import cbor2

from teemate.errors import LimitReached, ProtocolError

if TYPE_CHECKING:
    import trio.socket

__all__ = [
    "MAX_DEPTH",
    "MAX_FDS",
    "MAX_MESSAGE",
    "Encoded",
    "Packet",
    "check",
    "close_all",
    "decode",
    "decode_trusted",
    "encode",
    "encode_part",
    "receive",
    "receive_async",
    "send",
    "send_async",
]

MAX_MESSAGE = 65536
"""Bytes in one message, both ways."""
MAX_DEPTH = 8
"""Maps and arrays inside one another, the message's own map included."""
MAX_FDS = 4
"""Descriptors that can ride on one message."""

_SCM_MAX_FD = 253
"""So many the kernel lets through (include/net/scm.h).  There is room for all of them: what it has to cut
off it closes itself, before the receive returns: that can take for ever (broker/connections/disposal.py)."""
_ANCILLARY = socket.CMSG_SPACE(_SCM_MAX_FD * array.array("i").itemsize)
# Whole numbers: to combine those of Python's enumeration takes longer than the system call.
_RECEIVE_FLAGS = int(socket.MSG_CMSG_CLOEXEC)
_SEND_FLAGS = int(socket.MSG_NOSIGNAL)
_CUT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)


class Packet(NamedTuple):
    """What one receive gave: `data` is empty when the other side is gone.

    `fds` belong to whoever received the packet.
    """

    data: bytes
    fds: tuple[int, ...]


def _refuse(reason: str, offset: int) -> NoReturn:
    raise ProtocolError(f"malformed message: {reason} at byte {offset}", {"reason": reason, "offset": offset})


def check(untrusted_data: bytes) -> None:
    """Look through one encoded message without building anything from it.

    A single loop over the items with a stack of the containers that are open, since this is
    on the path of every attach.  Item heads: RFC 8949, section 3.

    Raises
    ------
    ProtocolError
        With ``detail`` holding the ``reason`` and the ``offset`` of the item at fault.

    """
    data = untrusted_data
    size = len(data)
    if size > MAX_MESSAGE:
        _refuse(f"more than {MAX_MESSAGE} bytes", MAX_MESSAGE)
    if not size:
        _refuse("no item", 0)
    if data[0] >> 5 != 5:
        _refuse("the message is not a map", 0)
    position = 0
    # `left` counts the items still to come in the innermost container; in a map (which has a
    # set of the keys seen so far) an even number means that a key is next.
    left = 1
    keys: set[bytes] | None = None
    stack: list[tuple[int, set[bytes] | None]] = []
    try:
        while True:
            while not left:
                if not stack:
                    if position != size:
                        _refuse("bytes behind the message", position)
                    return
                left, keys = stack.pop()
            start = position
            head = data[position]
            position += 1
            value = head & 31
            major = head >> 5
            if major == 7:
                if head == 0xF9:
                    position += 2
                elif head == 0xFA:
                    position += 4
                elif head == 0xFB:
                    position += 8
                elif not 0xF4 <= head <= 0xF6:
                    _refuse("a simple value other than false, true, null", start)
            elif value >= 24:
                if value > 27:
                    _refuse("an indefinite length" if value == 31 else "a reserved length", start)
                width = 1 << (value - 24)
                value = int.from_bytes(data[position : position + width], "big")
                position += width
            if position > size:
                _refuse("the message ends inside this item", start)
            if keys is not None and not left & 1:
                if major != 3:
                    _refuse("a key that is not text", start)
                end = position + value
                if end > size:
                    _refuse("the message ends inside this item", start)
                key = data[position:end]
                if key in keys:
                    _refuse("a key for the second time", start)
                if not key.isascii():
                    key.decode()
                keys.add(key)
                position = end
                left -= 1
                continue
            left -= 1
            if major < 2 or major == 7:
                continue
            if major == 3:
                end = position + value
                if end > size:
                    _refuse("the message ends inside this item", start)
                text = data[position:end]
                if not text.isascii():
                    text.decode()
                position = end
            elif major == 2:
                position += value
                if position > size:
                    _refuse("the message ends inside this item", start)
            elif major == 6:
                _refuse("a tag", start)
            else:
                stack.append((left, keys))
                if len(stack) > MAX_DEPTH:
                    _refuse(f"containers nested deeper than {MAX_DEPTH}", start)
                if major == 5:
                    left, keys = 2 * value, set()
                else:
                    left, keys = value, None
                # Every item takes a byte: a count that cannot be true is not counted down.
                if left > size - position:
                    _refuse("more items announced than bytes follow", start)
    except IndexError:
        _refuse("the message ends where an item should start", size)
    except UnicodeDecodeError:
        _refuse("text that is not UTF-8", start)


def decode(untrusted_data: bytes) -> dict[str, object]:
    """Return the map that `untrusted_data` encodes, after :func:`check`.

    Raises
    ------
    ProtocolError
        When it is not one message as the protocol has it.

    """
    check(untrusted_data)
    try:
        message = cbor2.loads(untrusted_data)
    except (cbor2.CBORDecodeError, ValueError) as error:  # what passes check() decodes: a bug if not
        raise ProtocolError(f"malformed message: {error}", {"reason": str(error), "offset": 0}) from error
    if not isinstance(message, dict):
        _refuse("the message is not a map", 0)
    return message


def decode_trusted(data: bytes) -> dict[str, object]:
    """Return the map that the broker's `data` encodes, without :func:`check`.

    For clients: the broker is part of the host that they run on and sees to their enclaves, so
    checking what it sends guards against nothing, and would be a tenth of a cold attach.

    Raises
    ------
    ProtocolError
        When it is no map in CBOR.

    """
    try:
        message = cbor2.loads(data)
    except (cbor2.CBORDecodeError, ValueError) as error:
        raise ProtocolError(f"malformed message: {error}", {"reason": str(error), "offset": 0}) from error
    if not isinstance(message, dict):
        _refuse("the message is not a map", 0)
    return message


class Encoded:
    """A value that is encoded already: what many messages hold in common is encoded once.

    `data` is trusted to be one item within the protocol's rules.
    """

    __slots__ = ("data",)

    def __init__(self, value: object) -> None:
        self.data: bytes = cbor2.dumps(value)


def _write_encoded(encoder: cbor2.CBOREncoder, value: object) -> None:
    if not isinstance(value, Encoded):
        raise TypeError(f"a message cannot hold a {type(value).__name__}")
    encoder.write(value.data)


def encode_part(value: object) -> bytes:
    """Return the encoding of something that is to be a part of a message, however long it is."""
    data: bytes = cbor2.dumps(value, default=_write_encoded)
    return data


def encode(message: Mapping[str, object]) -> bytes:
    """Return the encoding of `message`, every length in its shortest form, keys in their order.

    Not the canonical order of RFC 8949, section 4.2: nothing on this wire is signed or compared,
    and sorting the keys of a reply to `attach` takes four times as long as encoding it.

    Raises
    ------
    ProtocolError
        When it is longer than :data:`MAX_MESSAGE`: ask for less at a time.

    """
    data: bytes = cbor2.dumps(message, default=_write_encoded)
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(
            f"a message of {len(data)} bytes; the protocol allows {MAX_MESSAGE}: ask for less at a time",
            {"reason": f"more than {MAX_MESSAGE} bytes", "offset": MAX_MESSAGE},
        )
    return data


def close_all(fds: Iterable[int]) -> None:
    """Close every descriptor of `fds`."""
    for fd in fds:
        os.close(fd)


def _rights(fds: Iterable[int]) -> list[tuple[int, int, array.array[int]]]:
    numbers = array.array("i", fds)
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []


def _packet(
    data: bytes,
    ancillary: list[tuple[int, int, bytes]],
    flags: int,
    dispose: Callable[[Iterable[int]], None] = close_all,
) -> Packet:
    fds: tuple[int, ...] = ()
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
            fds += tuple(numbers)
    if len(fds) > MAX_FDS or flags & _CUT:
        dispose(fds)
        if flags & socket.MSG_TRUNC:
            _refuse(f"more than {MAX_MESSAGE} bytes", MAX_MESSAGE)
        if len(fds) > MAX_FDS:
            _refuse(f"more than {MAX_FDS} descriptors", 0)
        raise LimitReached(
            "a message came with descriptors, and this process has none left: RLIMIT_NOFILE (`ulimit -n`)"
            " sets how many it may have",
            {"limit": "RLIMIT_NOFILE", "setting": "ulimit -n"},
        )
    return Packet(data, fds)


def send(sock: socket.socket, data: bytes, fds: Iterable[int] = (), flags: int = 0) -> None:
    """Send one packet, blocking unless `flags` has MSG_DONTWAIT; `fds` stay the caller's.

    Raises
    ------
    OSError
        As the socket gives it: EPIPE when the other side is gone, EMSGSIZE when the
        socket's send buffer is smaller than the packet.

    """
    sock.sendmsg([data], _rights(fds), _SEND_FLAGS | int(flags))


def receive(
    sock: socket.socket,
    buffer: bytearray | None = None,
    dispose: Callable[[Iterable[int]], None] = close_all,
) -> Packet:
    """Receive one packet, blocking; `data` is empty when the other side is gone.

    `buffer` of :data:`MAX_MESSAGE` bytes is used for the time of the call: a fresh one costs more
    than receiving does.  When it raises, `dispose` gets the descriptors that had arrived.

    Raises
    ------
    ProtocolError
        The packet is larger than the protocol allows, or has more descriptors.
    LimitReached
        This process has no room for the descriptors.
    OSError
        As the socket gives it.

    """
    if buffer is None:
        data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE, _ANCILLARY, _RECEIVE_FLAGS)
    else:
        length, ancillary, flags, _ = sock.recvmsg_into([buffer], _ANCILLARY, _RECEIVE_FLAGS)
        data = bytes(memoryview(buffer)[:length])
    return _packet(data, ancillary, flags, dispose)


async def send_async(sock: trio.socket.SocketType, data: bytes, fds: Iterable[int] = ()) -> None:
    """:func:`send` on a trio socket: waits while the other side's buffer is full."""
    await sock.sendmsg([data], _rights(fds), _SEND_FLAGS)


async def receive_async(sock: trio.socket.SocketType) -> Packet:
    """:func:`receive` on a trio socket."""
    data, ancillary, flags, _ = await sock.recvmsg(MAX_MESSAGE, _ANCILLARY, _RECEIVE_FLAGS)
    return _packet(data, ancillary, flags)
