"""What goes out to one client: into its socket, or queued until it reads again.

A message goes straight into the socket.  What does not fit is queued, charged to the user, and
sent by a task when the client reads again; a client that lets messages pile up beyond the limit
is disconnected.  Descriptors on their way are charged too: the kernel holds them open, and counts
them, until they are read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import struct
import termios
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, final

import trio

from teemate import errors, wire
from teemate.broker.policy.limits import Charge, Resource

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client

__all__ = ["Outbox", "no_descriptors"]

_GONE = {errno.EPIPE, errno.ECONNRESET}
_SMALLEST_SKB = 768
"""A packet takes at least so much of a socket's send buffer: struct sk_buff and skb_shared_info."""


class _Queued(NamedTuple):
    data: bytes
    fds: tuple[int, ...]  # duplicates, ours: the enclave may be gone before the client reads
    charge: Charge


def no_descriptors(what: str, error: OSError) -> errors.LimitReached:
    """Return what a client is told that the broker has no descriptors left for."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return errors.LimitReached(
        f"{what} ({error.strerror}): RLIMIT_NOFILE (LimitNOFILE= in its unit) sets how many it may have, now"
        f" {limit}",
        {"limit": "RLIMIT_NOFILE", "maximum": limit, "setting": "LimitNOFILE= in the broker's unit"},
    )


@final
class Outbox:
    """Messages to a client; the socket stays the connection's.

    `start_soon` starts a task of the connection, `give_up` ends the connection.
    """

    def __init__(
        self,
        client: Client,
        sock: socket.socket,
        start_soon: Callable[[Callable[[], Awaitable[None]]], None],
        give_up: Callable[[], None],
    ) -> None:
        self.closed = False
        """Whether nothing is sent any more."""
        self._client = client
        self._sock = sock
        self._start_soon = start_soon
        self._give_up = give_up
        self._queue: deque[_Queued] = deque()
        self.queued_bytes = 0
        self._drained = trio.Event()
        self._held: bytes | None = None
        self._unread: deque[Charge] = deque()
        """Of messages with descriptors that the client may not have received yet."""

    # -- for the connection ----------------------------------------------------

    def send(self, message: Mapping[str, object], fds: tuple[int, ...] = ()) -> bytes:
        """Send one message, now or when the client reads again; `fds` stay the caller's.

        Returns its encoding, empty when the connection is over.

        Raises
        ------
        LimitReached
            Descriptors cannot be sent now; nothing was.

        """
        if self.closed:
            return b""
        data = wire.encode(message)
        self.send_held()
        self._transmit(data, fds)
        return data

    def hold(self, message: Mapping[str, object]) -> bytes:
        """Send a message with the next one, or with :meth:`send_held`; returns its encoding.

        A client that says hello and attach at once is woken when both are answered, not twice.
        """
        self.send_held()
        self._held = wire.encode(message)
        return self._held

    def offer(self, data: bytes) -> bool:
        """Send an encoded message if it has not to wait for the client; returns whether it was sent."""
        self.send_held()
        if self.closed or self._queue:
            return False
        try:
            wire.send(self._sock, data)
        except OSError:  # full, or gone: the reader finds out by itself
            return False
        return True

    def send_held(self) -> None:
        """Send what was held back for another message, which will not come soon."""
        data, self._held = self._held, None
        if data is not None:
            self._transmit(data)

    async def drained(self) -> None:
        """Wait until nothing is queued."""
        if self._queue:
            await self._drained.wait()

    def discard(self) -> None:
        """Throw away what is left, and its charges: the connection is over."""
        self.closed = True
        while self._queue:
            self._discard(self._queue.popleft())
        while self._unread:
            self._unread.popleft().release()

    def settle_descriptors(self) -> None:
        """Release the charges of descriptors that the client has received.

        What it has not takes room in our socket's send buffer (SIOCOUTQ), so that there cannot be
        more of them than messages of the smallest size would fit into that.
        """
        if not self._unread:
            return
        most = -(-self._unread_bytes() // _SMALLEST_SKB) + len(self._queue)
        while len(self._unread) > most:
            self._unread.popleft().release()

    def note_sent(self, descriptors: int) -> None:
        """Another thread sent a message with so many descriptors."""
        self.settle_descriptors()
        self._unread.append(self._client.account.owe(Resource.DESCRIPTORS_SENT, descriptors))

    def unsent(self, number: int) -> None:
        """A message could not be sent, for this reason (errno): the client would wait for it for ever."""
        # Gone: the reader finds out by itself, after what the client sent before it left.
        if number in _GONE:
            return
        client = self._client
        client.service.complaints.warning(
            "cannot send", client.identity.uid, client=client.number, reason=os.strerror(number)
        )
        self._give_up()

    def everything_was_read(self) -> bool:
        """Whether the client has received all that was sent to it."""
        return not self._queue and not self.closed and not self._unread_bytes()

    @property
    def queued_messages(self) -> int:
        """How many wait for the client to read."""
        return len(self._queue)

    # -- sending ---------------------------------------------------------------

    def _unread_bytes(self) -> int:
        """What the sent messages that were not received take of the send buffer (unix(7), SIOCOUTQ)."""
        count: int = struct.unpack("i", fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4)))[0]
        return count

    def _transmit(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        if self.closed:
            return
        on_the_way = self._charge_descriptors(len(fds)) if fds else None
        try:
            if self._queue:
                self._enqueue(data, fds)
            else:
                self._send_or_enqueue(data, fds)
        except errors.LimitReached:
            if on_the_way is not None:
                on_the_way.release()
            raise
        if on_the_way is not None:
            self._unread.append(on_the_way)

    def _send_or_enqueue(self, data: bytes, fds: tuple[int, ...]) -> None:
        try:
            wire.send(self._sock, data, fds)
        except BlockingIOError:
            self._enqueue(data, fds)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise no_descriptors("too many descriptors are on their way to clients", error) from error
            self.unsent(error.errno or 0)

    def _charge_descriptors(self, count: int) -> Charge:
        """Charge descriptors on their way; who does not read holds them open, and the kernel counts them."""
        account = self._client.account
        self.settle_descriptors()
        if account.exhausted(Resource.DESCRIPTORS_SENT, count):
            for client in self._client.service.clients.values():
                if client.account is account and client.connection is not None:
                    client.connection.outbox.settle_descriptors()
        return account.charge(Resource.DESCRIPTORS_SENT, count)

    def _enqueue(self, data: bytes, fds: tuple[int, ...]) -> None:
        client = self._client
        try:
            charge = client.account.charge(Resource.QUEUED_BYTES, len(data))
        except errors.LimitReached as error:
            client.service.complaints.warning(
                "client does not read", client.identity.uid, client=client.number, reason=error.message
            )
            self._give_up()
            return
        first = not self._queue
        copies: list[int] = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))
        except OSError as error:
            wire.close_all(copies)
            charge.release()
            raise no_descriptors("the broker has none left to keep for who does not read", error) from error
        self._queue.append(_Queued(data, tuple(copies), charge))
        self.queued_bytes += len(data)
        if first:
            self._drained = trio.Event()
            self._start_soon(self._write_queue)

    async def _write_queue(self) -> None:
        while self._queue:
            head = self._queue[0]
            try:
                wire.send(self._sock, head.data, head.fds)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)
                continue
            except OSError:  # gone: nobody will read the rest
                self._give_up()
                break
            self._discard(self._queue.popleft())
        self._drained.set()

    def _discard(self, queued: _Queued) -> None:
        self.queued_bytes -= len(queued.data)
        wire.close_all(queued.fds)
        queued.charge.release()
