"""Stands between clients and a broker, and shows what passes.

Everything is passed on as it came, descriptors too, whether it is in order or not.  One message at a time is
held in each direction of a connection: who does not read stops who sends, as without a proxy.  The broker
sees this process, not the clients.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import resource
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, final

import trio

from teemate import wire
from teemate.errors import ConnectionLost, Error
from teemate.traffic.concealing import Concealer
from teemate.traffic.description import BROKER, CLIENT, Described, Peer
from teemate.traffic.descriptors import describe_fd
from teemate.traffic.recording import Closed, Entry, Opened, Passed, Tracker

__all__ = ["Proxy", "Witness", "listen", "peer_of", "require_broker", "this_process"]

_UCRED = struct.Struct("iII")
_SCM_MAX_FD = 253  # include/net/scm.h
_ANCILLARY = socket.CMSG_SPACE(_SCM_MAX_FD * array.array("i").itemsize)
_RECEIVED = wire.MAX_MESSAGE + 1
"""Bytes: of a message that is too long enough is passed on for the other side to see that."""
_KEPT_FDS = 400
"""Descriptors that are not for connections: those that are on their way, and ours."""
_MOST = 2048
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)

Witness = Callable[[Entry, "Described | None"], None]
"""Hears of everything, in its order; its secrets are out."""


class _Received(NamedTuple):
    data: bytes
    fds: tuple[int, ...]
    lost_fds: bool


@contextmanager
def listen(path: str, mode: int) -> Iterator[socket.socket]:
    """Listen at `path` until the block ends; a socket that nobody listens on any more is replaced.

    Raises
    ------
    OSError
        Something else is there.

    """
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode) and not _answers(path):
            os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        mask = os.umask(0o777)  # until the mode is set, nobody connects
        try:
            sock.bind(path)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen there: {error.strerror}", path) from None
        finally:
            os.umask(mask)
        try:
            os.chmod(path, mode)
            sock.listen(128)
            yield sock
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


def _text_of(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8", "backslashreplace")
    except OSError:
        return ""


def _process(pid: int, uid: int) -> Peer:
    groups = _text_of(f"/proc/{pid}/cgroup").splitlines()
    cgroup = next((line[3:] for line in groups if line.startswith("0::")), "")
    return Peer(pid, uid, cgroup, _text_of(f"/proc/{pid}/comm").rstrip("\n"))


def this_process() -> Peer:
    """Return who we are to the broker."""
    return _process(os.getpid(), os.geteuid())


def peer_of(sock: trio.socket.SocketType) -> Peer:
    """Return who is at the other end; nothing is decided by it, so its number may be another's by now."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return _process(pid, uid)


@final
class Proxy:
    """Passes connections on to the broker at `to`, and tells `witness`."""

    def __init__(self, to: str, witness: Witness, complain: Callable[[str], None]) -> None:
        self._to = to
        self._witness = witness
        self._complain = complain
        self._concealer = Concealer()
        self._tracker = Tracker()
        self._count = 0
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = min(_MOST, (limit - _KEPT_FDS) // 2) if limit >= 0 else _MOST
        self._room = trio.Semaphore(max(1, most))

    async def run(self, listening: socket.socket) -> None:
        """Serve every client of `listening`, which is ours then, until cancelled."""
        listener = trio.socket.from_stdlib_socket(listening)
        async with trio.open_nursery() as nursery:
            while True:
                await self._room.acquire()
                try:
                    client, _ = await listener.accept()
                except OSError as error:
                    self._room.release()
                    if error.errno not in (errno.ECONNABORTED, errno.EMFILE, errno.ENFILE):
                        raise
                    self._complain(f"a client could not be let in: {error.strerror}")
                    await trio.sleep(0.1)
                    continue
                nursery.start_soon(self._serve, client)

    async def _serve(self, client: trio.socket.SocketType) -> None:
        self._count += 1
        number = self._count
        try:
            with client, trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as broker:
                try:
                    await broker.connect(self._to)
                except OSError as error:
                    self._complain(f"no broker answers at {self._to}: {error.strerror or error}")
                    return
                self._tell(Opened(_now(), number, peer_of(client)))
                first: list[str] = []
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pass_on, number, client, broker, CLIENT, first)
                    nursery.start_soon(self._pass_on, number, broker, client, BROKER, first)
                self._tell(Closed(_now(), number, first[0]))
        finally:
            self._room.release()

    def _tell(self, entry: Entry) -> None:
        self._witness(entry, self._tracker.describe(entry))

    async def _pass_on(
        self,
        number: int,
        source: trio.socket.SocketType,
        sink: trio.socket.SocketType,
        sender: str,
        first: list[str],
    ) -> None:
        """Pass everything on from one side until it ends, or the other takes no more."""
        try:
            while True:
                data, fds, lost_fds = await self._receive(source)
                try:
                    if lost_fds:
                        self._complain(
                            f"connection {number} is ended: a message of the {sender}'s came with"
                            " descriptors, and this proxy has none left (RLIMIT_NOFILE)"
                        )
                        break
                    if not data:
                        break
                    self._tell(self._passed(number, sender, data, fds))
                    await sink.sendmsg([data], _rights(fds), socket.MSG_NOSIGNAL)
                finally:
                    wire.close_all(fds)
        except OSError as error:
            if error.errno not in _GONE:
                self._complain(f"connection {number} is ended: {error.strerror or error}")
        first.append(sender)
        for end, how in ((source, socket.SHUT_RD), (sink, socket.SHUT_WR)):
            with contextlib.suppress(OSError):  # it has gone
                end.shutdown(how)

    @staticmethod
    async def _receive(source: trio.socket.SocketType) -> _Received:
        while True:
            try:
                data, ancillary, flags, _ = await source.recvmsg(
                    _RECEIVED, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
                )
                break
            except ConnectionResetError:
                # It closed without having read everything; what it said before can still be read.
                continue
        numbers = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
        return _Received(data, tuple(numbers), bool(flags & socket.MSG_CTRUNC))

    def _passed(self, number: int, sender: str, data: bytes, fds: tuple[int, ...]) -> Passed:
        described = tuple(describe_fd(fd) for fd in fds)
        try:
            shown, problem = self._concealer.conceal(wire.decode(data), data), ""
            wire.check(shown)
        except Error as error:  # nobody knows what it holds, so it is not kept
            shown, problem = b"", error.message
        return Passed(_now(), number, sender, len(data), described, shown, problem)


def _now() -> float:
    """Return the time as recordings have it."""
    return round(time.time(), 6)


def _rights(fds: tuple[int, ...]) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []


def require_broker(path: str) -> None:
    """Raise ConnectionLost when nobody listens at `path`."""
    if not _answers(path):
        raise ConnectionLost(f"no broker answers at {path}: is teemate-broker running?", {"socket": path})
