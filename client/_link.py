"""The sockets to the broker, one after the other, and what comes and goes through them.

`hello` is sent together with the first request, not by the constructor: both answers come in one
round trip.

When the broker ends without a word and keeps its clients' grants (``_resume.py``), the thread that
reads connects again.  Requests without an answer are sent again with their numbers, by which
the broker knows what it has done already; new ones wait.  Nothing here blocks in a send: what the
socket does not take at once waits for the reader too, else two sides that send and do not read
could wait for each other.
"""

from __future__ import annotations

import _thread
import itertools
import os
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from errno import ECONNRESET
from typing import Any

from teemate import wire
from teemate._requests import REPEATABLE, Reply, Request
from teemate._resume import Absence, Session, is_end, unknown_outcome
from teemate.errors import (
    Busy,
    ConnectionLost,
    Error,
    LimitReached,
    NotAttached,
    ProtocolError,
    from_code,
)

__all__ = ["Link"]

_spare_buffers = [bytearray(wire.MAX_MESSAGE)]
"""For receiving; made at import, so that the first connection need not."""


class Link:
    """What :class:`Connection` is built on: requests out, answers and events in.

    Everything that is said to be *under the lock* is called with :attr:`_lock` held; everything
    under *receiving* by the one thread that has set :attr:`_reading`.
    """

    def __init__(self, path: str, client: str = "") -> None:
        self.path = path
        self.on_event: Callable[[dict[str, Any]], None] = lambda _event: None
        self.on_counters: Callable[[int], None] = lambda _fd: None
        """Gets the descriptor of a page that somebody wants calls counted in; it is closed afterwards."""
        self.on_resumed: Callable[[frozenset[int]], None] = lambda _grants: None
        """Hears which grants live on with the broker, after it was away."""
        self.on_forgotten: Callable[[str], None] = lambda _why: None
        """Hears that the broker knows no grant of this connection any more."""
        self.resumes = 0
        """How often the broker was away and came back."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._numbers = itertools.count(1)
        self._session = Session(client)
        self._greeted = False
        self._reading = False
        self._listening = False
        self._gate: _thread.LockType | None = None
        """Held until the listener, a thread that waits for it, is needed."""
        self._unanswered: dict[int, Request] = {}
        self._backlog: deque[Request] = deque()
        """Those of them that are still to be sent on this socket."""
        self._absence: Absence | None = None
        self._last_absence: Absence | None = None
        self._lost: Error | None = None
        self._farewell: Error | None = None
        self._broken: Error | None = None
        self._socket: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise ConnectionLost(
                f"no broker answers at {path} ({error.strerror or error}): is teemate-broker running, "
                "and is TEEMATE_SOCKET right?",
                {"socket": path, "errno": error.errno},
            ) from None
        try:
            self._buffer = _spare_buffers.pop()
        except IndexError:
            self._buffer = bytearray(wire.MAX_MESSAGE)
        self._poll = select.poll()
        self._poll.register(self._socket.fileno(), select.POLLIN)

    @property
    def lost(self) -> bool:
        """Whether the broker is gone for good."""
        return self._lost is not None

    @property
    def away(self) -> bool:
        """Whether the broker is gone and may come back."""
        return self._absence is not None

    def check_process(self) -> None:
        """Raise :class:`NotAttached` in a child of fork(), and ConnectionLost at the interpreter's end.

        Python ends its threads wherever they are then, the listener too: with locks nobody gets any more.
        """
        if os.getpid() != self._pid:
            raise NotAttached(
                f"this process is a child of process {self._pid}, which holds the connection and the grants: "
                "connect and attach here"
            )
        if sys.is_finalizing():
            raise ConnectionLost("the interpreter ends, and its grants with it", {"socket": self.path})

    # ---- sending --------------------------------------------------------------------

    def _send(self, request: Request) -> None:
        self.check_process()
        with self._lock:
            if self._lost is not None:
                raise self._lost
            if request.session is not None and request.session != self._session.number:
                raise self._session.over()
            self._unanswered[request.number] = request
            if self._absence is not None or self._backlog or not self._transmit(request):
                self._backlog.append(request)

    def _transmit(self, request: Request) -> bool:
        """Send one request; returns False when the socket does not take it now.  Under the lock."""
        assert self._socket is not None
        try:
            if not self._greeted:
                wire.send(self._socket, self._session.hello(resume=False), (), socket.MSG_DONTWAIT)
                self._greeted = True
            wire.send(self._socket, request.data, request.fds, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            if not is_end(error):
                reason = f"the kernel does not take {request.op!r} for the broker: {error.strerror}"
                self._answer_locked(request, LimitReached(reason, {"errno": error.errno}))
                return True
            # The broker may have said why before it closed, and the reader finds out what comes next.
            self._broken = self._broken or ConnectionLost(
                f"the broker at {self.path} closed the connection ({error.strerror}): see its log",
                {"socket": self.path, "errno": error.errno},
            )
        request.sent = True
        return True

    def _flush(self) -> None:
        """Send what waits to be sent, as far as the socket takes it.  Under the lock."""
        if self._absence is None:
            while self._backlog and self._transmit(self._backlog[0]):
                self._backlog.popleft()

    # ---- receiving: only the thread that holds `_reading` ------------------------------

    def _read(self, patience: float | None) -> bool:
        """Do what the broker's side asks for: take one packet, or get back to the broker.

        At most `patience` seconds; returns whether a packet came.
        """
        absence = self._absence
        if absence is not None:
            left = absence.deadline - time.monotonic()
            if left <= 0:
                self._give_up(absence)
                return False
            patience = left if patience is None else min(left, patience)
            if not absence.dialled:
                self._come_back(absence, patience)
                return False
        if patience is not None and not self._poll.poll(patience * 1000):
            return False
        self._receive()
        return True

    def _stop_reading(self) -> None:
        with self._lock:
            self._reading = False
            if self._lost is not None:
                self._drop_socket()
            self._wake.notify_all()

    def _receive(self) -> None:
        sock = self._socket
        if sock is None:  # closed by this program
            return
        try:
            packet = wire.receive(sock, self._buffer)
        except OSError as error:
            broken = ConnectionLost(
                f"the connection to {self.path} broke: {error.strerror}",
                {"socket": self.path, "errno": error.errno},
            )
            if error.errno == ECONNRESET:
                # The broker closed without having read everything; what it said before is
                # still to be read (the kernel reports the reset first, once).
                self._broken = self._broken or broken
            else:
                self._end(broken)
            return
        except (ProtocolError, LimitReached) as error:
            self._end(error)
            return
        if not packet.data:
            wire.close_all(packet.fds)
            self._ended()
            return
        try:
            message = wire.decode_trusted(packet.data)
        except ProtocolError as error:
            wire.close_all(packet.fds)
            self._end(error)
            return
        if "event" in message:
            try:
                if message["event"] == "counters" and len(packet.fds) == 1:
                    self.on_counters(packet.fds[0])
            finally:
                wire.close_all(packet.fds)
            self.on_event(message)
        else:
            self._take_answer(message, packet.fds)

    def _take_answer(self, message: dict[str, Any], fds: tuple[int, ...]) -> None:
        number = message.get("id")
        ok = message.get("ok")
        answer: Reply | Error
        if isinstance(ok, dict):
            if number == 0:
                wire.close_all(fds)
                self._welcome(ok)
                return
            answer = Reply(ok, fds, self._session.number, self.resumes)
        else:
            wire.close_all(fds)
            untrusted = message.get("error")
            if not isinstance(untrusted, dict):
                self._end(ProtocolError("the broker sent neither an answer nor an error"))
                return
            answer = from_code(
                str(untrusted.get("code")), str(untrusted.get("message")), untrusted.get("detail")
            )
            if number == 0 or number is None:
                # The greeting was refused, or the broker could not read a request of ours.
                self._farewell = answer
                if self._absence is not None:
                    self._ended()
                return
        with self._lock:
            request = self._unanswered.get(number) if isinstance(number, int) else None
            undo = None if request is None else request.undo
            if request is not None:
                self._answer_locked(request, answer)
            self._flush()
        if (request is None or undo is not None) and isinstance(answer, Reply):
            wire.close_all(answer.fds)
        if request is None:
            self._end(ProtocolError(f"the broker answered a request that nobody made (id {number})"))
        elif undo is not None and isinstance(answer, Reply):
            undo(answer)

    def _answer_locked(self, request: Request, answer: Reply | Error) -> None:
        """Hand the answer to whoever waits for it.  Under the lock."""
        del self._unanswered[request.number]
        request.answer = answer
        if request.undo is not None:
            wire.close_all(request.fds)
        # The listener reads on without an end: whoever waits hears of it here.
        self._wake.notify_all()

    # ---- the broker goes and comes back -------------------------------------------------

    def _ended(self) -> None:
        """The connection is over: end with what the broker said, or come back."""
        farewell, broken = self._farewell, self._broken
        self._farewell = self._broken = None
        absence = self._absence
        if isinstance(farewell, (Busy, LimitReached)) and absence is not None:
            absence.refusal = farewell  # others may make room
        elif farewell is not None:
            # Who keeps grants and says why it ends this connection has ended them with it.
            self._end(farewell, forgotten=absence is not None or self._session.kept)
            return
        if not self._session.can_resume:
            self._end(
                broken
                or ConnectionLost(
                    f"the broker at {self.path} ended; calls in enclaves go on, new requests need it back",
                    {"socket": self.path},
                )
            )
            return
        with self._lock:
            if self._lost is not None:
                return
            self._drop_socket()
            if absence is None:
                self._absence = Absence(self._session.grace, self._last_absence)
            else:
                absence.failed("the broker ended again before it had greeted us")

    def _come_back(self, absence: Absence, patience: float) -> None:
        """Try to reach the broker once, or wait until it is time for it."""
        self.check_process()  # the token is the parent's
        delay = absence.next_try - time.monotonic()
        if delay > 0:
            with self._lock:
                if self._lost is None:
                    self._wake.wait(min(delay, patience))
            return
        try:
            sock = absence.dial(self.path, self._session.hello(resume=True))
        except OSError as error:
            absence.failed(error.strerror or str(error))
            if not self._session.welcomed and not isinstance(error, BlockingIOError):
                # Nobody keeps this socket open for another broker.
                self._give_up(absence)
            return
        with self._lock:
            if self._lost is not None:
                sock.close()
                return
            self._socket = sock
            self._poll = select.poll()
            self._poll.register(sock.fileno(), select.POLLIN)
            self._greeted = True
            absence.dialled = True
            self._socket_is_here()

    def _welcome(self, ok: dict[str, Any]) -> None:
        """The broker has greeted us; after an absence, everything without an answer is sent again."""
        absence = self._absence
        if absence is None:
            self._session.welcome(ok)
            return
        resumed = ok.get("resumed")
        with self._lock:
            forgotten = self._session.over()
            if resumed is None:
                self._forget(isinstance(ok.get("token"), bytes) and not self._session.welcomed)
                self._session.number += 1
            self._session.welcome(ok)
            self.resumes += 1
            self._backlog = deque(self._unanswered.values())
            for request in self._backlog:
                request.start()
            absence.over = time.monotonic()
            self._last_absence, self._absence = absence, None
            self._flush()
            self._wake.notify_all()
        if resumed is None:
            self.on_forgotten(forgotten.message)
        else:
            self.on_resumed(frozenset(resumed))

    def _forget(self, nothing_done: bool) -> None:
        """Answer what must not be asked of a broker that does not know us.  Under the lock.

        `nothing_done`: the broker keeps its sessions and knows nothing of this one, so none of its
        requests was carried out.
        """
        for request in list(self._unanswered.values()):
            if request.session is not None or request.undo is not None:
                # Of grants that have ended, or for callers that have gone: nothing is left to undo.
                self._answer_locked(request, self._session.over())
            elif request.sent and not nothing_done and request.op not in REPEATABLE:
                self._answer_locked(request, unknown_outcome(self.path, request.op))

    def _give_up(self, absence: Absence) -> None:
        self._end(absence.in_vain(self.path, greeted=self._session.welcomed), forgotten=True)

    # ---- the end ----------------------------------------------------------------------

    def _end(self, error: Error, *, forgotten: bool = False) -> None:
        with self._lock:
            if self._lost is not None:
                return
            self._lost = error
            self._absence = None
            for request in self._unanswered.values():
                if request.undo is not None:
                    wire.close_all(request.fds)
            self._unanswered.clear()
            self._backlog.clear()
            self._wake.notify_all()
            if forgotten:
                self.resumes += 1
        if forgotten:
            self.on_forgotten(error.message)

    def _drop_socket(self) -> None:
        if self._socket is not None:
            self._socket_goes()
            self._socket.close()
            self._socket = None

    def _socket_is_here(self) -> None:
        """There is another socket.  Under the lock."""

    def _socket_goes(self) -> None:
        """The socket is about to be closed.  Under the lock."""
