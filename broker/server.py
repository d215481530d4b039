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
from teemate.broker.connections.clients import Client
from teemate.broker.connections.connection import Connection
from teemate.broker.connections.door import Caller, Door, be_prompt
from teemate.broker.connections.identity import Peer, identify
from teemate.broker.policy.limits import Account, Charge, Resource
from teemate.broker.service import ServerStatistics, Service

__all__ = ["Server", "ServerStatistics", "bind", "listens"]

_BACKLOG = 4096
"""Who finds it full has to try again and again, in no order; net.core.somaxconn bounds it too."""
_TELL_EVERY = 1.0
"""Seconds after which the log tells of those who were turned away."""
_RESERVE = 256
"""Descriptors, or an eighth of all if that is fewer, that are kept from new connections."""


def bind(
    path: str, *, mode: int, gid: int | None, kind: socket.SocketKind = socket.SOCK_SEQPACKET
) -> socket.socket:
    """Return a listening socket at `path`; a socket that nobody listens on is replaced.

    Raises
    ------
    OSError
        EADDRINUSE when another broker answers there, or what is there is no socket.

    """
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        _remove_stale(path, kind)
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


def _remove_stale(path: str, kind: socket.SocketKind) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode) or _somebody_listens(path, kind):
            raise OSError(errno.EADDRINUSE, "another broker listens there, or a file lies there", path)
        os.unlink(path)


def _somebody_listens(path: str, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # its backlog is full: somebody does
            return True
        except OSError:
            return False
        return True


def _full(limit: int) -> errors.LimitReached:
    return errors.LimitReached(
        f"{limit} connections of this user wait to be let in already, since it makes them faster than it"
        " may, or all at once: the broker's policy sets this in [limits] connections, and in"
        " requests_per_second how fast they come in",
        {"limit": "connections", "maximum": limit, "setting": "[limits] connections"},
    )


def _message(error: errors.LimitReached) -> bytes:
    body = {"code": error.code, "message": error.message, "detail": error.detail}
    return wire.encode({"id": None, "error": body})


@final
class Server:
    """Listens until it is cancelled."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._accepted = 0
        self._refused = 0
        self._breaches = 0
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._limit = limit if limit >= 0 else 1 << 30
        self._reserved = self._limit - min(_RESERVE, self._limit // 8)
        service.server_statistics = self.statistics
        self._door: Door | None = None

    async def run(self, listeners: list[socket.socket]) -> None:
        """Serve every client of `listeners`, which stay the caller's."""
        service = self._service
        await service.running.wait()
        be_prompt()
        trio.lowlevel.add_instrument(service.ledger.rounds)
        door = Door(
            service.ledger,
            listeners,
            full=_message(_full(service.policy.limits.connections)),
            scarce=_message(self._scarce("nearly all are in use")),
            dispose=service.disposal.close_unread,
            reserved=self._reserved,
            limit=self._limit,
        )
        self._door = door
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_of_unlucky, door)
                nursery.start_soon(self._let_in, door, nursery)

                def receive(fd: int, peer: Peer, number: int, account: Account) -> Connection:
                    return self._receive(nursery, fd, Client(service, number, peer, account))

                nursery.start_soon(service.attendant.guests.run, door, receive)
        finally:
            door.close()

    async def _let_in(self, door: Door, nursery: trio.Nursery) -> None:
        """Let one client in and serve it; a new task takes over at the door.

        Whoever was woken by a client goes on with it at once, so that a cold attach waits for no
        other task to be started; and a flood of connections is one client in a turn of the scheduler.
        """
        await self._service.disposal.caught_up()
        while True:
            try:
                door.look()
            except OSError as error:
                self._service.complaints.warning("cannot accept", None, reason=error.strerror)
            caller = door.take(trio.current_time())
            if caller is not None:
                break
            await door.wait()
        self._accepted += 1
        nursery.start_soon(self._let_in, door, nursery)
        await self._serve(caller)

    async def _tell_of_unlucky(self, door: Door) -> None:
        """Count and log who was turned away."""
        while True:
            await trio.sleep(_TELL_EVERY)
            for uid, count in door.unlucky().items():
                self._service.ledger.account(uid).refused += count
                self._service.complaints.warning(
                    "connections turned away", uid, count=count, reason="too many wait to be let in"
                )

    async def _serve(self, caller: Caller) -> None:
        """Serve one client from its identity to its end; no error leaves this function."""
        service = self._service
        sock, uid = caller
        charge: Charge | None = None
        try:
            account = service.ledger.account(uid)
            try:
                charge = account.charge(Resource.CONNECTIONS)
                if account.exhausted(Resource.DESCRIPTORS_RECEIVED):
                    await service.disposal.room_for(account)
            except errors.LimitReached as error:
                self._refuse(sock, error, uid)
                return
            connection = self._connection(sock, account)
            if connection is not None:
                await self._serve_client(connection)
        finally:
            service.disposal.close_connection(sock, charge)

    def _receive(self, nursery: trio.Nursery, fd: int, client: Client) -> Connection:
        """Serve a client that was greeted already (guests.py), from here on."""
        service = self._service
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK, 0, fileno=fd)
        connection = Connection(client, sock)
        service.clients[client.number] = client
        self._accepted += 1
        nursery.start_soon(self._serve_received, connection, client.account.owe(Resource.CONNECTIONS))
        return connection

    async def _serve_received(self, connection: Connection, charge: Charge) -> None:
        try:
            await self._serve_client(connection)
        finally:
            self._service.disposal.close_connection(connection.socket, charge)

    def _connection(self, sock: socket.socket, account: Account) -> Connection | None:
        """Find out who it is; None when that was refused, with the reason told."""
        service = self._service
        try:
            peer = identify(sock, service.cgroup_tree, trust_pid=service.policy.broker.trust_pid)
        except errors.ConnectionLost as error:
            self._refused += 1
            service.complaints.warning(
                "client was gone before it was identified", account.uid, reason=error.message
            )
            return None
        except OSError as error:
            self._refuse(sock, self._scarce(error.strerror or ""), account.uid)
            return None
        if self._is_reserved(sock) and not service.policy.administrators.includes(peer.identity):
            os.close(peer.pidfd)
            self._refuse(sock, self._scarce("nearly all are in use"), account.uid)
            return None
        return Connection(Client(service, service.next_client(), peer, account), sock)

    def _is_reserved(self, sock: socket.socket) -> bool:
        """Whether `sock` got one of the last numbers: who is here already may need those.

        An administrator gets one of them: somebody has to be able to do something about it.
        """
        return sock.fileno() >= self._reserved

    def _scarce(self, why: str) -> errors.LimitReached:
        return errors.LimitReached(
            f"the broker has no descriptors for new connections ({why}): RLIMIT_NOFILE"
            f" (LimitNOFILE= in its unit) sets how many it may have, now {self._limit}",
            {
                "limit": "RLIMIT_NOFILE",
                "maximum": self._limit,
                "setting": "LimitNOFILE= in the broker's unit",
            },
        )

    def _refuse(self, sock: socket.socket, error: errors.LimitReached, uid: int) -> None:
        self._refused += 1
        self._service.complaints.warning("connection refused", uid, reason=error.message)
        with contextlib.suppress(OSError):
            wire.send(sock, _message(error))

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
            service.monitoring.ended(connection)
            client = connection.client  # another one than before if it was resumed
            client.connection = None
            del service.clients[client.number]
            try:
                service.client_left(client, why)
            except Exception as error:
                service.log.exception("internal error", client=client.number, exc_info=error)
        if why.startswith("broke"):
            self._breaches += 1
            service.complaints.warning(
                "client broke the protocol", client.identity.uid, client=client.number,
                pid=client.identity.pid, reason=why,
            )  # fmt: skip

    def statistics(self) -> ServerStatistics:
        """What came in so far."""
        door = self._door.statistics() if self._door is not None else None
        return ServerStatistics(
            accepted=self._accepted,
            refused=self._refused,
            breaches=self._breaches,
            door=door,
        )
