"""The socket to the broker, shared by all threads of the process.

Whoever waits for an answer reads, one thread at a time, and hands what belongs to others to
them; so a cold attach needs no thread of ours.  Once a slot is in use a listener reads
instead (:meth:`Connection.listen`), since the broker's events (``revoked``) want an answer
even when nobody asks anything, and since a broker that is restarted wants its clients back
while all of their threads are inside.

`hello` is sent together with the first request, not by :func:`connect`: both answers come in
one round trip.

When the broker ends without a word and keeps its clients' grants (``_resume.py``), the thread that
reads connects again.  Requests without an answer are sent again with their numbers, by which
the broker knows what it has done already; new ones wait.  Nothing here blocks in a send: what the
socket does not take at once waits for the reader too, else two sides that send and do not read
could wait for each other.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from errno import ECONNRESET
from typing import Any

from teemate import wire
from teemate._requests import GIVE_BACK, REPEATABLE, Reply, Request, Undo, no_undo
from teemate._resume import Absence, Session, is_end, unknown_outcome
from teemate.errors import (
    Busy,
    ConnectionLost,
    EnclaveLost,
    Error,
    InternalError,
    LimitReached,
    NotAttached,
    ProtocolError,
    from_code,
)

__all__ = ["DEFAULT_PATH", "Check", "Connection", "Reply"]

DEFAULT_PATH = "/run/teemate/broker.sock"
SLICE = 0.05
"""Seconds between two looks at whether the caller still wants the answer."""

_spare_buffers = [bytearray(wire.MAX_MESSAGE)]
"""For receiving; made at import, so that the first connection need not."""

Check = Callable[[], None]
"""Raises when the caller no longer wants the result."""


class _AwayError(Exception):
    """The broker is away, and the caller does not want to wait for it."""


class Connection:
    """Requests, their answers and the broker's events on one socket after the other.  Thread safe.

    In a child of fork() everything raises :class:`NotAttached`: the socket is the parent's, and so
    is the token.
    """

    def __init__(self, path: str, client: str = "") -> None:
        self.path = path
        self.on_event: Callable[[dict[str, Any]], None] = lambda _event: None
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
        """Raise :class:`NotAttached` in a child of fork()."""
        if os.getpid() != self._pid:
            raise NotAttached(
                f"this process is a child of process {self._pid}, which holds the connection and the grants: "
                "connect and attach here"
            )

    def close(self, check: Check | None = None) -> None:
        """Close the socket; every grant of this connection ends.

        What was given back and the broker does not know yet is said first, which may have to wait for
        a broker that is away; `check` can end that.
        """
        if os.getpid() != self._pid:
            if self._socket is not None:
                self._socket.close()
            return
        try:
            with self._lock:
                told = [request for request in self._unanswered.values() if request.op in GIVE_BACK]
            with contextlib.suppress(ConnectionLost):
                for request in told:
                    self._await(request, check)
        finally:
            self._end(ConnectionLost(f"the connection to {self.path} was closed by this program"))
            with self._lock:
                if self._socket is not None:
                    with contextlib.suppress(OSError):  # the broker was faster
                        self._socket.shutdown(socket.SHUT_RDWR)
                    if not self._reading:
                        self._drop_socket()

    def request(
        self,
        op: str,
        args: Mapping[str, object] | None = None,
        *,
        fds: tuple[int, ...] = (),
        wait: float = 0.0,
        session: int | None = None,
        undo: Undo = no_undo,
        check: Check | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Reply:
        """Ask for `op` and wait for the answer, also over a restart of the broker.

        `fds` ride on the request and stay the caller's.  `wait`: seconds that the request itself
        lets the broker wait.  `session`: the session of the reply that a grant's number in `args`
        came from; in another one the number is another grant's.  `undo` is called with the answer
        if it comes after the caller was interrupted (its fds are closed then).  `meanwhile` is
        called while the broker works.

        Raises
        ------
        ConnectionLost
            The broker is gone and did not come back, or gave no answer in time.
        EnclaveLost
            The broker came back and does not know `session`.
        Error
            What the broker answered.

        """
        request = Request(next(self._numbers), op, args, fds=fds, wait=wait, session=session)
        self._send(request)
        try:
            if meanwhile is not None:
                meanwhile()
            answer = self._await(request, check)
        except BaseException:
            self._disown(request, undo)
            raise
        if isinstance(answer, Error):
            raise answer
        return answer

    def tell(self, op: str, args: Mapping[str, object], session: int) -> None:
        """Give something back, and return when the broker knows.

        While it is away this does not wait: it hears of it when it is back.
        """
        with contextlib.suppress(ConnectionLost, EnclaveLost, _AwayError):
            self._await(self._give_back(op, args, session), self._check_here)

    def post(self, op: str, args: Mapping[str, object], session: int) -> None:
        """Give something back without waiting for the answer; a lost connection is no error."""
        # The end of the session ends what this would have given back.
        with contextlib.suppress(ConnectionLost, EnclaveLost):
            self._give_back(op, args, session)

    def listen(self) -> None:
        """Have a thread read from now on, so that events and the broker's end are heard at once."""
        with self._lock:
            if self._listening or self._lost is not None:
                return
            self._listening = True
        _thread.start_new_thread(self._listener, ())

    # ---- sending --------------------------------------------------------------------

    def _give_back(self, op: str, args: Mapping[str, object], session: int) -> Request:
        request = Request(next(self._numbers), op, args, session=session, undo=no_undo)
        self._send(request)
        return request

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

    # ---- waiting for an answer --------------------------------------------------------

    def _await(self, request: Request, check: Check | None) -> Reply | Error:
        while True:
            with self._lock:
                while True:
                    if request.answer is not None:
                        return request.answer
                    if self._lost is not None:
                        raise self._lost
                    if not self._reading:
                        self._reading = True
                        break
                    self._wake.wait(self._patience(request, check))
                    if check is not None:
                        check()
            try:
                if not self._read(self._patience(request, check)) and check is not None:
                    check()
            finally:
                self._stop_reading()

    def _patience(self, request: Request, check: Check | None) -> float:
        now = time.monotonic()
        absence = self._absence
        if absence is not None:
            left = max(0.0, absence.deadline - now) + SLICE
        else:
            left = request.deadline - now
            if left <= 0:
                raise ConnectionLost(
                    f"the broker at {self.path} gave no answer to {request.op!r} in time: see its log",
                    {"op": request.op},
                )
        return left if check is None else min(left, SLICE)

    def _check_here(self) -> None:
        if self._absence is not None:
            raise _AwayError

    def _disown(self, request: Request, undo: Undo) -> None:
        with self._lock:
            answer = request.answer
            if answer is None and request.number in self._unanswered:
                if request.sent or request.op in GIVE_BACK:
                    request.undo = undo
                    request.fds = tuple(os.dup(fd) for fd in request.fds)
                else:
                    del self._unanswered[request.number]
                    self._backlog.remove(request)
        if isinstance(answer, Reply):
            wire.close_all(answer.fds)
            undo(answer)

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
        except ProtocolError as error:
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
            self._end(farewell, forgotten=absence is not None)
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
            self._socket.close()
            self._socket = None

    def _listener(self) -> None:
        # Signals are for the program's own threads.
        signal.pthread_sigmask(
            signal.SIG_BLOCK,
            signal.valid_signals()
            - {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP},
        )
        with self._lock:
            while self._reading:
                self._wake.wait()
            self._reading = True
        try:
            while self._lost is None:
                self._read(None)
        except Exception as error:  # a listener that died silently would hang everybody
            self._end(InternalError(f"reading the broker's messages failed: {error!r}"))
            raise
        finally:
            self._stop_reading()
