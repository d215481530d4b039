"""Accepts connections on the broker's socket and keeps one client's trouble from the others."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import stat
from typing import final

import trio

from teemate import errors, wire
from teemate.broker.clients import Client
from teemate.broker.connection import Connection, drain_input
from teemate.broker.identity import identify
from teemate.broker.limits import Resource
from teemate.broker.service import ServerStatistics, Service

__all__ = ["Server", "ServerStatistics", "bind", "listens"]

_BACKLOG = 1024
_ACCEPT_PAUSE = 0.1
"""Seconds to wait when the kernel has no descriptor or memory for another connection."""
_RESERVE = 256
"""Descriptors, or an eighth of all if that is fewer, that are kept from new connections."""
_GONE_ALREADY = {errno.ECONNABORTED, errno.EINTR}


def bind(path: str, *, mode: int, gid: int | None) -> socket.socket:
    """Return a listening socket at `path`; a socket that nobody listens on is replaced.

    Raises
    ------
    OSError
        EADDRINUSE when another broker answers there, or what is there is no socket.

    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        _remove_stale(path)
        mask = os.umask(0o777)  # until the mode is set, nobody connects
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        if gid is not None:
            os.chown(path, -1, gid)
        os.chmod(path, mode)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def listens(fd: int) -> bool:
    """Whether `fd` is a socket that listens."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    with socket.socket(fileno=os.dup(fd)) as sock:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _remove_stale(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode) or _somebody_listens(path):
            raise OSError(errno.EADDRINUSE, "another broker listens there, or a file lies there", path)
        os.unlink(path)


def _somebody_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # its backlog is full: somebody does
            return True
        except OSError:
            return False
        return True


@final
class Server:
    """Listens until it is cancelled."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._accepted = 0
        self._refused = 0
        self._breaches = 0
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        service.server_statistics = self.statistics

    async def run(self, listeners: list[socket.socket]) -> None:
        """Serve every client of `listeners`, which stay the caller's."""
        await self._service.running.wait()
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                listener.setblocking(False)
                nursery.start_soon(self._accept_one, listener, nursery)

    async def _accept_one(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        """Accept one client and serve it; a new task takes over at the listener.

        Whoever was woken by a client goes on with it at once, so that a cold attach waits for no
        other task to be started; and a flood of connections is one client in a turn of the scheduler.
        """
        while True:
            try:
                sock, _ = listener.accept()
                break
            except BlockingIOError:
                await trio.lowlevel.wait_readable(listener)
            except OSError as error:
                if error.errno not in _GONE_ALREADY:
                    self._service.log.warning("cannot accept", reason=error.strerror)
                    await trio.sleep(_ACCEPT_PAUSE)
        self._accepted += 1
        nursery.start_soon(self._accept_one, listener, nursery)
        await self._serve(sock)

    async def _serve(self, sock: socket.socket) -> None:
        """Serve one client from its identity to its end; no error leaves this function."""
        service = self._service
        with sock:
            sock.setblocking(False)
            if self._refused_for_descriptors(sock):
                return
            try:
                peer = identify(sock, service.cgroup_tree, trust_pid=service.policy.broker.trust_pid)
            except (errors.ConnectionLost, OSError) as error:
                self._refused += 1
                service.log.warning("client was gone before it was identified", reason=str(error))
                return
            pidfd: int | None = peer.pidfd
            try:
                account = service.ledger.account(peer.identity.uid)
                try:
                    charge = account.charge(Resource.CONNECTIONS)
                except errors.LimitReached as error:
                    self._refuse(sock, error, uid=peer.identity.uid)
                    return
                with charge:
                    client = Client(service, service.next_client(), peer, account)
                    pidfd = None  # the client's now
                    await self._serve_client(Connection(client, sock))
            finally:
                if pidfd is not None:
                    os.close(pidfd)

    def _refused_for_descriptors(self, sock: socket.socket) -> bool:
        """Refuse a `sock` that got one of the last numbers: who is here already may need those."""
        reserve = min(_RESERVE, self._limit // 8)
        if self._limit < 0 or sock.fileno() < self._limit - reserve:
            return False
        error = errors.LimitReached(
            f"the broker has nearly all of its {self._limit} descriptors in use: RLIMIT_NOFILE"
            " (LimitNOFILE= in its unit) sets how many it may have",
            {"limit": "RLIMIT_NOFILE", "maximum": self._limit},
        )
        self._refuse(sock, error)
        return True

    def _refuse(self, sock: socket.socket, error: errors.LimitReached, **about: object) -> None:
        self._refused += 1
        self._service.log.warning("connection refused", reason=error.message, **about)
        body = {"code": error.code, "message": error.message, "detail": error.detail}
        with contextlib.suppress(OSError):
            wire.send(sock, wire.encode({"id": None, "error": body}))
        drain_input(sock)

    async def _serve_client(self, connection: Connection) -> None:
        service, client = self._service, connection.client
        service.clients[client.number] = client
        why = "the broker ends"
        try:
            why = await connection.serve()
        except Exception as error:
            why = "internal error"
            service.log.exception("internal error", client=client.number, exc_info=error)
        finally:
            client = connection.client  # another one than before if it was resumed
            client.connection = None
            del service.clients[client.number]
            try:
                service.client_left(client, why)
            except Exception as error:
                service.log.exception("internal error", client=client.number, exc_info=error)
        if why.startswith("broke"):
            self._breaches += 1
            service.log.warning(
                "client broke the protocol", client=client.number, pid=client.identity.pid,
                uid=client.identity.uid, reason=why,
            )  # fmt: skip

    def statistics(self) -> ServerStatistics:
        """What came in so far."""
        return ServerStatistics(accepted=self._accepted, refused=self._refused, breaches=self._breaches)
