"""A client's connection: its requests in; its replies and events out go through outbox.py.

Reading.  One task per connection reads, in this order: wait while replies are still queued,
ask the user's bucket of tokens, have the user's turn (turns.py), receive one message.  So a client
that does not read its replies, or asks faster than it may, fills its own socket buffer and nothing
here.  A request that can be answered at once is answered in this task; one that has to wait gets a
task of its own, charged to the user as a request in flight.

Errors.  A message that breaks the protocol is answered and the connection is closed.  A request
that fails is answered with its error and the connection lives on, also after a bug of ours:
that one is logged with its traceback, and the client is told only that it happened.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import trio

from teemate import errors, wire
from teemate.broker.connections.operations import Method, changes_something, find_method
from teemate.broker.connections.outbox import Outbox
from teemate.broker.connections.requests import Answer, Request, Result, parse_request
from teemate.broker.connections.turns import Turn
from teemate.broker.policy.limits import Charge, Resource

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client

__all__ = ["Connection", "ConnectionStatistics"]

_BUFFER = bytearray(wire.MAX_MESSAGE)
"""For every packet of every client: nothing is received between filling it and copying it out."""
_MESSAGES_AT_FIRST = 2
"""hello, and what came along with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionStatistics:
    """One connection at this moment; `waiting` counts requests that have no reply yet."""

    client: int
    requests: int
    waiting: int
    queued_messages: int
    queued_bytes: int


@final
class Connection:
    """The socket of a client, with what is queued for it; the socket stays its maker's."""

    def __init__(self, client: Client, sock: socket.socket) -> None:
        self.client = client
        client.connection = self
        self.greeted = False
        self._sock = sock
        self.outbox = Outbox(client, sock, self._start_soon, self.close)
        self._nursery: trio.Nursery | None = None
        self._unstarted: list[tuple[Any, ...]] = []
        self.passed_on = 0
        """Messages in a row that were none for the attendant."""
        self.brief = False
        """Whether it came for one grant, as far as can be told, and has not stayed after it."""
        self._waiting = 0
        self._turn: Turn | None = None
        """The user's turn while it is ours: who resumes may belong to another account afterwards."""
        self._greeting = trio.Event()
        self._dismissed: errors.Error | None = None
        self._monitoring = client.service.monitoring

    @property
    def closing(self) -> bool:
        """Whether it is over, or about to be."""
        return self.outbox.closed

    @property
    def waits(self) -> bool:
        """Whether a request has no reply yet."""
        return self._waiting > 0

    # -- reading ---------------------------------------------------------------

    async def serve(self) -> str:
        """Answer requests until the connection ends; returns why it did.  The socket stays the caller's."""
        why = "closed by the client"
        try:
            breach = None if self.greeted else self._answer_first()
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
            if self._dismissed is not None:
                why = f"refused: {self._dismissed.message}"
        finally:
            self._nursery = None
            self.outbox.discard()
        return why

    def _answer_first(self) -> Exception | None:
        """Answer what the client sent with its connection, before anything is set up for what may follow.

        With cold caches the nursery takes as long as the attach.  Returns the breach of the protocol
        or the failure of the socket that ends the connection.
        """
        newcomer = self.client
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
            self.outbox.send_held()
        except (errors.ProtocolError, errors.LimitReached, OSError) as error:
            return error
        self.brief = bool(self.client.grants)
        if self.greeted and self.client is newcomer:
            self.client.service.attendant.guests.came(self)
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
            self.dismiss(error)
        else:
            setting = "[limits] handshake_seconds"
            self.dismiss(
                errors.LimitReached(
                    f"no hello came within {seconds:g} s: the broker's policy sets this in {setting}",
                    {"limit": "handshake_seconds", "maximum": seconds, "setting": setting},
                )
            )

    async def _read_requests(self) -> None:
        account = self.client.account
        try:
            while True:
                if self.outbox.queued_messages:
                    self._rest()
                    await self.outbox.drained()
                delay = account.bucket.take()
                if delay:
                    self._rest()
                    await trio.sleep(delay)
                packet = await self._next_packet()
                if packet is None:
                    continue
                if not packet.data:
                    self.client.dispose(packet.fds)
                    return
                if len(packet.data) > 4096:
                    account.bucket.take(len(packet.data) / 4096)
                self._handle(packet)
                if self.closing:
                    return
                if self.greeted:
                    self._greeting.set()
                if self._turn is not None and self._turn.over:
                    self.outbox.send_held()
                    await trio.lowlevel.checkpoint()
                    self._rest()
        finally:
            self._rest()

    async def _next_packet(self) -> wire.Packet | None:
        """Receive a message, in this connection's turn; None: the attendant has answered it."""
        account = self.client.account
        while True:
            if account.exhausted(Resource.DESCRIPTORS_RECEIVED):
                self._rest()
                await self.client.service.disposal.room_for(account)
            if self._turn is None:
                await account.turn.take()
                self._turn = account.turn
            try:
                return self._receive()
            except BlockingIOError:
                self._rest()
                answered = await self.client.service.attendant.attend(self)
                if answered:
                    return None
                if answered is None:
                    await trio.lowlevel.wait_readable(self._sock)

    @property
    def socket(self) -> socket.socket:
        """The socket, its maker's."""
        return self._sock

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def _rest(self) -> None:
        """Nothing is read until later: let others of this user do so, and send what was held back."""
        if self._turn is not None:
            turn, self._turn = self._turn, None
            turn.give_up()
        self.outbox.send_held()

    def _handle(self, packet: wire.Packet) -> None:
        """Answer one message, or start the task that will; its descriptors are closed or passed on."""
        untrusted_fds = packet.fds
        self.client.requests += 1
        request: Request | None = None
        untrusted_message: dict[str, object] | None = None
        try:
            untrusted_message = wire.decode(packet.data)
            if self._monitoring.viewers:
                self._monitoring.received(self, packet.data, untrusted_fds)
            request = parse_request(untrusted_message)
            method = find_method(request.operation)
            self._check_frame(request, method, len(untrusted_fds))
        except errors.ProtocolError as error:
            if untrusted_message is None and self._monitoring.viewers:
                self._monitoring.received(self, packet.data, untrusted_fds, error.message)
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
        if method.stops:
            client.service.attendant.call_all_in()
        else:
            client.service.attendant.settle()
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

    # -- answering ---------------------------------------------------------------

    def _reply(self, request: Request, answer: Answer) -> None:
        number = request.id
        if changes_something(request.operation):
            outcome = answer.ok if answer.outcome is None else answer.outcome
            self.client.service.state.answered(self.client, number, request.operation, outcome)
        if answer.patient:
            message = {"id": number, "ok": answer.ok}
            data = self.outbox.hold(message)
            if self._monitoring.viewers:
                self._monitoring.sent(self, data, ())
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
        data = self.outbox.send(message, fds)
        if data and self._monitoring.viewers:
            self._monitoring.sent(self, data, fds)

    # -- ending ----------------------------------------------------------------

    def dismiss(self, error: errors.Error) -> None:
        """End the connection, and tell the client why."""
        self._dismissed = error
        self._reply_error(None, error)
        self.close()

    def close(self) -> None:
        """End the connection; its task notices and cleans up."""
        self.outbox.closed = True
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def statistics(self) -> ConnectionStatistics:
        """This connection at this moment."""
        return ConnectionStatistics(
            client=self.client.number,
            requests=self.client.requests,
            waiting=self._waiting,
            queued_messages=self.outbox.queued_messages,
            queued_bytes=self.outbox.queued_bytes,
        )
