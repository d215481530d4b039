"""A client's connection: its requests in, its replies and events out.

Reading.  One task per connection reads, in this order: wait while replies are still queued,
ask the user's bucket of tokens, receive one message.  So a client that does not read its
replies, or asks faster than it may, fills its own socket buffer and nothing here.  A request that
can be answered at once is answered in this task; one that has to wait gets a task of its own,
charged to the user as a request in flight.

Writing.  A message goes straight into the socket.  What does not fit is queued, charged to
the user, and sent by a task when the client reads again; a client that lets events pile up beyond
the limit is disconnected.

Errors.  A message that breaks the protocol is answered and the connection is closed.  A request
that fails is answered with its error and the connection lives on, also after a bug of ours:
that one is logged with its traceback, and the client is told only that it happened.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import termios
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

import trio

from teemate import errors, wire
from teemate.broker.limits import Charge, Resource
from teemate.broker.operations import Method, changes_something, find_method
from teemate.broker.requests import Answer, Request, Result, parse_request

if TYPE_CHECKING:
    from teemate.broker.clients import Client

__all__ = ["Connection", "ConnectionStatistics"]

_BUFFER = bytearray(wire.MAX_MESSAGE)
"""For every packet of every client: nothing is received between filling it and copying it out."""
_MESSAGES_AT_FIRST = 2
"""hello, and what came along with it."""
_MESSAGES_PER_TURN = 16
"""Requests of one client that are answered before other tasks get their turn."""
_GONE = {errno.EPIPE, errno.ECONNRESET}
_SMALLEST_SKB = 768
"""A packet takes at least so much of a socket's send buffer: struct sk_buff and skb_shared_info."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionStatistics:
    """One connection at this moment; `waiting` counts requests that have no reply yet."""

    client: int
    requests: int
    waiting: int
    queued_messages: int
    queued_bytes: int


class _Queued(NamedTuple):
    data: bytes
    fds: tuple[int, ...]  # duplicates, ours: the enclave may be gone before the client reads
    charge: Charge


def _no_descriptors(what: str, error: OSError) -> errors.LimitReached:
    return errors.LimitReached(
        f"{what} ({error.strerror}): RLIMIT_NOFILE (LimitNOFILE= in its unit) sets how many it may have",
        {"limit": "RLIMIT_NOFILE"},
    )


@final
class Connection:
    """The socket of a client, with what is queued for it; the socket stays its maker's."""

    def __init__(self, client: Client, sock: socket.socket) -> None:
        self.client = client
        client.connection = self
        self.greeted = False
        self.closing = False
        self._sock = sock
        self._nursery: trio.Nursery | None = None
        self._unstarted: list[tuple[Any, ...]] = []
        self._waiting = 0
        self._queue: deque[_Queued] = deque()
        self._queued_bytes = 0
        self._drained = trio.Event()
        self._patient: bytes | None = None
        self._greeting = trio.Event()
        self._silent: errors.LimitReached | None = None
        self._unread: deque[Charge] = deque()
        """Of messages with descriptors that the client may not have received yet."""

    # -- reading ---------------------------------------------------------------

    async def serve(self) -> str:
        """Answer requests until the connection ends; returns why it did.  The socket stays the caller's."""
        why = "closed by the client"
        try:
            breach = self._answer_first()
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for function, *args in self._unstarted:
                    nursery.start_soon(function, *args)
                if self.closing:
                    nursery.cancel_scope.cancel()
                if not self.greeted and breach is None:
                    nursery.start_soon(self._await_greeting)
                try:
                    if breach is not None:
                        raise breach
                    await self._read_requests()
                except errors.ProtocolError as error:
                    why = f"broke the protocol: {error.message}"
                    self._reply_error(None, error)
                except errors.LimitReached as error:
                    why = f"refused: {error.message}"
                    self._reply_error(None, error)
                except OSError as error:
                    why = f"connection failed: {error.strerror}"
                nursery.cancel_scope.cancel()
            if self._silent is not None:
                why = f"refused: {self._silent.message}"
        finally:
            self.closing = True
            self._nursery = None
            while self._queue:
                self._discard(self._queue.popleft())
            while self._unread:
                self._unread.popleft().release()
        return why

    def _answer_first(self) -> Exception | None:
        """Answer what the client sent with its connection, before anything is set up for what may follow.

        With cold caches the nursery takes as long as the attach.  Returns the breach of the protocol
        or the failure of the socket that ends the connection.
        """
        try:
            for _ in range(_MESSAGES_AT_FIRST):
                if self.closing or self.client.account.bucket.take():
                    break
                packet = self._receive()
                if not packet.data:
                    self.client.dispose(packet.fds)
                    break  # the end is there to be read again
                self._handle(packet)
        except BlockingIOError:
            self._send_patient()
        except (errors.ProtocolError, errors.LimitReached, OSError) as error:
            return error
        return None

    def _receive(self) -> wire.Packet:
        return wire.receive(self._sock, _BUFFER, self.client.dispose)

    async def _await_greeting(self) -> None:
        """Let a client take its time for hello, but not for ever, nor many of one user at a time."""
        seconds = self.client.service.policy.limits.handshake_seconds
        try:
            with self.client.account.charge(Resource.HANDSHAKES):
                with trio.move_on_after(seconds):
                    await self._greeting.wait()
                    return
        except errors.LimitReached as error:
            self._silent = error
        else:
            setting = "[limits] handshake_seconds"
            self._silent = errors.LimitReached(
                f"no hello came within {seconds:g} s: the broker's policy sets this in {setting}",
                {"limit": "handshake_seconds", "maximum": seconds, "setting": setting},
            )
        self._reply_error(None, self._silent)
        self.close()

    async def _read_requests(self) -> None:
        bucket = self.client.account.bucket
        answered = 0
        while True:
            if self._queue:
                await self._drained.wait()
            delay = bucket.take()
            if delay:
                self._send_patient()
                await trio.sleep(delay)
            while True:
                if self.client.account.exhausted(Resource.DESCRIPTORS_RECEIVED):
                    self._send_patient()
                    await self.client.service.disposal.room_for(self.client.account)
                try:
                    packet = self._receive()
                    break
                except BlockingIOError:
                    answered = 0
                    self._send_patient()
                    await trio.lowlevel.wait_readable(self._sock)
            if not packet.data:
                self.client.dispose(packet.fds)
                return
            if len(packet.data) > 4096:
                bucket.take(len(packet.data) / 4096)
            self._handle(packet)
            if self.closing:
                return
            if self.greeted:
                self._greeting.set()
            answered += 1
            if answered == _MESSAGES_PER_TURN:
                answered = 0
                await trio.lowlevel.checkpoint()

    def _handle(self, packet: wire.Packet) -> None:
        """Answer one message, or start the task that will; its descriptors are closed or passed on."""
        untrusted_fds = packet.fds
        self.client.requests += 1
        request: Request | None = None
        try:
            request = parse_request(wire.decode(packet.data))
            method = find_method(request.operation)
            self._check_frame(request, method, len(untrusted_fds))
        except errors.ProtocolError:
            self.client.dispose(untrusted_fds)
            raise
        try:
            self._start(request, method, untrusted_fds)
        except Exception as error:
            self._reply_failure(request, error)

    def _check_frame(self, request: Request, method: Method[object] | None, fds: int) -> None:
        expected = method.fds if method else 0
        if fds != expected:
            raise errors.ProtocolError(
                f"{fds} descriptors came with {request.operation[:64]!r}, which takes {expected}"
            )
        if not self.greeted and request.operation != "hello":
            raise errors.ProtocolError("the first message on a connection is hello")

    def _start(self, request: Request, method: Method[object] | None, fds: tuple[int, ...]) -> None:
        """Answer the request, or start the task that will; `fds` go to the handler."""
        if method is None:
            raise errors.Unsupported(f"this broker knows no operation {request.operation[:64]!r}")
        try:
            charge = self.client.account.charge(Resource.REQUESTS)
        except errors.LimitReached:
            self.client.dispose(fds)
            raise
        waits = False
        client = self.client
        client.asking = request.id
        if len(client.tokens) > 1 and request.operation != "hello":
            client.service.resumption.first_request(client)
        try:
            known = client.recalled.get(request.id) if method.changes else None
            if known is not None and known[0] == request.operation:
                client.dispose(fds)
                result: Result = client.service.granting.repeat(client, *known)
            else:
                result = method.run(client, request.untrusted_args, fds)
            if isinstance(result, Answer):
                self._reply(request, result)
            else:
                waits = True
                self._waiting += 1
                self._start_soon(self._finish, request, result, charge)
        finally:
            if not waits:
                charge.release()

    def _start_soon(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(function, *args)
        else:
            self._unstarted.append((function, *args))

    async def _finish(self, request: Request, result: Awaitable[Answer], charge: Charge) -> None:
        with charge:
            try:
                self._reply(request, await result)
            except Exception as error:
                self._reply_failure(request, error)
            finally:
                self._waiting -= 1

    # -- writing ---------------------------------------------------------------

    def _reply(self, request: Request, answer: Answer) -> None:
        number = request.id
        if changes_something(request.operation):
            outcome = answer.ok if answer.outcome is None else answer.outcome
            self.client.service.state.answered(self.client, number, request.operation, outcome)
        if answer.patient:
            self._send_patient()
            self._patient = wire.encode({"id": number, "ok": answer.ok})
        else:
            try:
                self.send({"id": number, "ok": answer.ok}, answer.fds)
            except errors.LimitReached:
                if answer.undo is not None:
                    answer.undo()
                raise
        if answer.after is not None:
            answer.after()

    def _reply_failure(self, request: Request, error: Exception) -> None:
        if not isinstance(error, errors.Error) or isinstance(error, errors.InternalError):
            self.client.service.log.error(
                "internal error", operation=request.operation, client=self.client.number, exc_info=error
            )
            error = errors.InternalError("the broker has a bug, which its log describes; other clients go on")
        if changes_something(request.operation):
            self.client.service.state.failed(self.client, request.id)
        self._reply_error(request.id, error)

    def _reply_error(self, number: int | None, error: errors.Error) -> None:
        body: dict[str, object] = {"code": error.code, "message": error.message}
        if error.detail:
            body["detail"] = error.detail
        self.send({"id": number, "error": body})

    def send(self, message: Mapping[str, object], fds: tuple[int, ...] = ()) -> None:
        """Send one message, now or when the client reads again; `fds` stay the caller's.

        Raises
        ------
        LimitReached
            Descriptors cannot be sent now; nothing was.

        """
        if self.closing:
            return
        data = wire.encode(message)
        self._send_patient()
        self._transmit(data, fds)

    def _send_patient(self) -> None:
        """Send the reply that waited for another one.

        A client that says hello and attach at once is woken when both are answered, not twice.
        """
        data, self._patient = self._patient, None
        if data is not None:
            self._transmit(data)

    def _transmit(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        if self.closing:
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
                raise _no_descriptors("too many descriptors are on their way to clients", error) from error
            # Gone: the reader finds out by itself, after what the client sent before it left.
            if error.errno not in _GONE:
                self._give_up_writing(error)

    def _charge_descriptors(self, count: int) -> Charge:
        """Charge descriptors on their way; who does not read holds them open, and the kernel counts them."""
        account = self.client.account
        self.settle_descriptors()
        if account.exhausted(Resource.DESCRIPTORS_SENT, count):
            for client in self.client.service.clients.values():
                if client.account is account and client.connection is not None:
                    client.connection.settle_descriptors()
        return account.charge(Resource.DESCRIPTORS_SENT, count)

    def settle_descriptors(self) -> None:
        """Release the charges of descriptors that the client has received.

        What it has not takes room in our socket's send buffer (SIOCOUTQ), so that there cannot be
        more of them than messages of the smallest size would fit into that.
        """
        if not self._unread:
            return
        unread = struct.unpack("i", fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4)))[0]
        most = -(-unread // _SMALLEST_SKB) + len(self._queue)
        while len(self._unread) > most:
            self._unread.popleft().release()

    def _enqueue(self, data: bytes, fds: tuple[int, ...]) -> None:
        try:
            charge = self.client.account.charge(Resource.QUEUED_BYTES, len(data))
        except errors.LimitReached as error:
            self.client.service.complaints.warning(
                "client does not read",
                self.client.identity.uid,
                client=self.client.number,
                reason=error.message,
            )
            self.close()
            return
        first = not self._queue
        copies: list[int] = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))
        except OSError as error:
            wire.close_all(copies)
            charge.release()
            raise _no_descriptors("the broker has none left to keep for who does not read", error) from error
        self._queue.append(_Queued(data, tuple(copies), charge))
        self._queued_bytes += len(data)
        if first:
            self._drained = trio.Event()
            self._start_soon(self._write_queue)

    def _give_up_writing(self, error: OSError) -> None:
        """End the connection, else the client would wait for ever for what could not be sent."""
        self.client.service.log.warning("cannot send", client=self.client.number, reason=error.strerror)
        self.close()

    async def _write_queue(self) -> None:
        while self._queue:
            head = self._queue[0]
            try:
                wire.send(self._sock, head.data, head.fds)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)
                continue
            except OSError:  # gone: nobody will read the rest
                self.close()
                break
            self._discard(self._queue.popleft())
        self._drained.set()

    def _discard(self, queued: _Queued) -> None:
        self._queued_bytes -= len(queued.data)
        wire.close_all(queued.fds)
        queued.charge.release()

    def everything_was_read(self) -> bool:
        """Whether the client has received all that was sent to it."""
        if self._queue or self.closing:
            return False
        unread = fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4))  # SIOCOUTQ, unix(7)
        return not any(unread)

    # -- ending ----------------------------------------------------------------

    def close(self) -> None:
        """End the connection; its task notices and cleans up."""
        self.closing = True
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def statistics(self) -> ConnectionStatistics:
        """This connection at this moment."""
        return ConnectionStatistics(
            client=self.client.number,
            requests=self.client.requests,
            waiting=self._waiting,
            queued_messages=len(self._queue),
            queued_bytes=self._queued_bytes,
        )
