"""What hostile clients do: parts that the tests of limits, the flood tool and the fuzzer share."""

from __future__ import annotations

import array
import ctypes
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2


class Lingering:
    """A TCP socket whose last close takes an hour: unsent data, SO_LINGER, and nobody who reads."""

    def __init__(self, seconds: int = 3600) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._sock = socket.create_connection(listener.getsockname())
            self._peer, _ = listener.accept()
        self._sock.setblocking(False)
        try:
            while True:
                self._sock.send(bytes(65536))
        except BlockingIOError:
            pass
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))

    def fileno(self) -> int:
        return self._sock.fileno()

    def abandon(self) -> None:
        """Leave the last reference to whoever got one; nothing lingers for us while there is another."""
        self._sock.close()

    def close(self) -> None:
        """Let whoever lingers go on: the peer's end resets the connection."""
        self._peer.close()
        self._sock.close()


def send_with(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    """Send a packet with any number of descriptors."""
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


@contextmanager
def hanging_file(folder: str) -> Iterator[int]:
    """A regular file on a FUSE file system whose program never answers once it is opened.

    For root.  INIT, LOOKUP and OPEN are answered, the rest is not: reads, stat and the flush that
    a close asks for wait until the file system is taken away.
    """
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if _libc.mount(b"teemate-test", folder.encode(), b"fuse", 0, options):
        number = ctypes.get_errno()
        os.close(device)
        raise OSError(number, os.strerror(number), folder)
    opened = -1
    try:
        with _aborted_in_the_end(folder, device):
            pid = os.fork()
            if pid == 0:  # it has to answer while we open: another process, which ends with the open
                _answer_until_opened(device)
            opened = os.open(os.path.join(folder, "image"), os.O_RDONLY | os.O_CLOEXEC)
            os.waitpid(pid, 0)
            yield opened
    finally:
        _libc.umount2(folder.encode(), _MNT_DETACH)
        os.close(device)
        if opened >= 0:
            with suppress(OSError):  # the flush is refused; it is closed all the same
                os.close(opened)


_LONGEST = 300
"""Seconds after which a file hangs no more, whatever has become of its test."""


@contextmanager
def _aborted_in_the_end(folder: str, device: int) -> Iterator[None]:
    """Abort the file system after the block, at the end of this process, or after `_LONGEST`.

    A process that hangs in it cannot be killed, and whoever reads of such a process in /proc hangs too, on
    the whole host.  Closing the device would not do: a child that hangs in its exec has a copy.
    """
    ours, theirs = os.pipe()
    control = folder + ".control"
    os.mkdir(control)
    if _libc.mount(b"fusectl", control.encode(), b"fusectl", 0, None):
        raise OSError(ctypes.get_errno(), "cannot mount fusectl", control)
    abort = os.open(f"{control}/{_connection(folder)}/abort", os.O_WRONLY | os.O_CLOEXEC)
    _libc.umount2(control.encode(), _MNT_DETACH)
    os.rmdir(control)
    pid = os.fork()
    if pid == 0:
        os.close(theirs)
        os.close(device)
        select.select([ours], [], [], _LONGEST)
        with suppress(OSError):
            os.write(abort, b"1")
        os._exit(0)
    os.close(ours)
    try:
        yield
    finally:
        with suppress(OSError):
            os.write(abort, b"1")
        os.close(abort)
        os.close(theirs)
        os.waitpid(pid, 0)


def _connection(folder: str) -> int:
    """Return the number of the FUSE connection that is mounted there: the minor number of its device."""
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            words = line.split()
            if words[4] == folder:
                return int(words[2].partition(":")[2])
    raise AssertionError(f"nothing is mounted at {folder}")


_HEADER = struct.Struct("<IIQQIIII")  # struct fuse_in_header
_LOOKUP, _OPEN, _INIT, _GETATTR = 1, 14, 26, 3
_VALID = 3600


def _attributes(node: int, mode: int) -> bytes:
    """struct fuse_attr."""
    return struct.pack("<QQQQQQIIIIIIIIII", node, 8192, 16, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def _answer_until_opened(device: int) -> None:
    try:
        while True:
            request = os.read(device, 1 << 17)
            _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
            if opcode == _INIT:
                answer = struct.pack("<IIIIHHIIHHI", 7, 31, 65536, 0, 12, 10, 65536, 1, 0, 0, 0) + bytes(24)
            elif opcode == _LOOKUP:
                answer = struct.pack("<QQQQII", 2, 0, _VALID, 0, 0, 0) + _attributes(2, 0o100644)
            elif opcode == _GETATTR:
                mode = 0o40755 if node == 1 else 0o100644
                answer = struct.pack("<QII", _VALID, 0, 0) + _attributes(node, mode)
            elif opcode == _OPEN:
                answer = struct.pack("<QII", 1, 1, 0)  # FOPEN_DIRECT_IO: no cache answers a read
            else:
                os.write(device, struct.pack("<IiQ", 16, -38, unique))  # ENOSYS
                continue
            os.write(device, struct.pack("<IiQ", 16 + len(answer), 0, unique) + answer)
            if opcode == _OPEN:
                return
    finally:
        os._exit(0)
