"""The threads of a process and their requests to the broker.

Whoever waits for an answer reads (``_link.py``), one thread at a time, and hands what belongs to
others to them; so an attach waits for no thread of ours.  Once a slot is in use a listener reads
while nobody waits (:meth:`Connection.listen`), since the broker's events (``revoked``) want an answer
even when nobody asks anything, and since a broker that is restarted wants its clients back
while all of their threads are inside.  The listener waits in an epoll of its own; who asks takes the socket
out of that for the while, which is a system call and no switch of threads.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping

from teemate import wire
from teemate._link import Link
from teemate._requests import GIVE_BACK, Reply, Request, Undo, no_undo
from teemate.errors import (
    ConnectionLost,
    EnclaveLost,
    Error,
    InternalError,
)

__all__ = ["DEFAULT_PATH", "Check", "Connection", "Reply"]

DEFAULT_PATH = "/run/teemate/broker.sock"
SLICE = 0.05
"""Seconds between two looks at whether the caller still wants the answer."""

Check = Callable[[], None]
"""Raises when the caller no longer wants the result."""


class _AwayError(Exception):
    """The broker is away, and the caller does not want to wait for it."""


class Connection(Link):
    """Requests of this process's threads, and their answers.  Thread safe.

    In a child of fork() everything raises :class:`NotAttached`: the socket is the parent's, and so
    is the token.
    """

    def __init__(self, path: str, client: str = "") -> None:
        super().__init__(path, client)
        self._asking: set[object] = set()
        """One for each thread that waits for an answer."""
        self._watch: select.epoll | None = None
        """What the listener waits in, while there is one."""
        self._kicks = -1
        self._heard = False
        """Whether the socket is in there."""

    def close(self, check: Check | None = None) -> None:
        """Close the socket; every grant of this connection ends.

        What was given back and the broker does not know yet is said first, which may have to wait for
        a broker that is away; `check` can end that.
        """
        if os.getpid() != self._pid or sys.is_finalizing():
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
        try:
            self._begin_asking(request)  # before the answer can be there: else the listener is woken for it
            self._send(request)
            try:
                if meanwhile is not None:
                    meanwhile()
                answer = self._await(request, check)
            except BaseException:
                self._disown(request, undo)
                raise
        finally:
            self._end_asking(request)
        if isinstance(answer, Error):
            raise answer
        return answer

    def tell(self, op: str, args: Mapping[str, object], session: int) -> None:
        """Give something back, and return when the broker knows.

        While it is away this does not wait: it hears of it when it is back.
        """
        if sys.is_finalizing():
            return  # the end of the process gives it back
        asker = object()
        try:
            self._begin_asking(asker)
            with contextlib.suppress(ConnectionLost, EnclaveLost, _AwayError):
                self._await(self._give_back(op, args, session), self._check_here)
        finally:
            self._end_asking(asker)

    def post(self, op: str, args: Mapping[str, object], session: int) -> None:
        """Give something back without waiting for the answer; a lost connection is no error."""
        # The end of the session ends what this would have given back.
        with contextlib.suppress(ConnectionLost, EnclaveLost):
            self._give_back(op, args, session)

    def ready_listener(self) -> None:
        """Start the thread that :meth:`listen` will want, for who waits for something else anyway."""
        with self._lock:
            if self._gate is not None or self._lost is not None:
                return
            self._gate = _thread.allocate_lock()
            self._gate.acquire()
        _thread.start_new_thread(self._listener, (self._gate,))

    def listen(self) -> None:
        """Have a thread read from now on, so that events and the broker's end are heard at once."""
        self.ready_listener()
        with self._lock:
            if not self._listening and self._gate is not None:
                self._listening = True
                self._gate.release()

    def _give_back(self, op: str, args: Mapping[str, object], session: int) -> Request:
        request = Request(next(self._numbers), op, args, session=session, undo=no_undo)
        self._send(request)
        return request

    # ---- who asks, and the listener -----------------------------------------------------

    def _begin_asking(self, asker: object) -> None:
        """Read for oneself from now on; the listener hears nothing meanwhile.

        Ctrl-C can end it anywhere in here: :meth:`_end_asking` makes up for as much as was done.
        """
        self.check_process()
        with self._lock:
            self._asking.add(asker)
            if len(self._asking) == 1:
                self._socket_goes()

    def _end_asking(self, asker: object) -> None:
        if asker not in self._asking:  # in a child of fork() nothing has begun, and the lock may be held
            return
        with self._lock:
            self._asking.remove(asker)
            if not self._asking:
                self._socket_is_here()
                if self._absence is not None or self._lost is not None:
                    self._kick()

    def _kick(self) -> None:
        """Have the listener look what there is to do.  Under the lock."""
        if self._watch is not None:
            os.eventfd_write(self._kicks, 1)

    def _socket_is_here(self) -> None:
        """Let the listener hear the socket, unless somebody asks.  Under the lock."""
        if self._watch is not None and self._socket is not None and not self._asking and not self._heard:
            self._watch.register(self._socket, select.EPOLLIN)
            self._heard = True

    def _socket_goes(self) -> None:
        """Let the listener hear the socket no more.  Under the lock.

        Closing it would not do when a child of fork has the same file open.
        """
        if self._watch is not None and self._socket is not None and self._heard:
            self._watch.unregister(self._socket)
        self._heard = False

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

    def _end(self, error: Error, *, forgotten: bool = False) -> None:
        super()._end(error, forgotten=forgotten)
        self.listen()  # who waits to be needed sees that this is the end
        with self._lock:
            self._kick()

    def _listener(self, needed: _thread.LockType) -> None:
        # Signals are for the program's own threads.
        signal.pthread_sigmask(
            signal.SIG_BLOCK,
            signal.valid_signals()
            - {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP},
        )
        needed.acquire()
        try:
            try:
                self._open_watch()
            except OSError:  # mostly since the process has no descriptors left
                self._read_always()
                return
            try:
                while self._lost is None:
                    self._listen_once()
            finally:
                self._close_watch()
        except Exception as error:  # a listener that died silently would hang everybody
            self._end(InternalError(f"reading the broker's messages failed: {error!r}"))
            raise

    def _open_watch(self) -> None:
        with contextlib.ExitStack() as opened:
            watch = opened.enter_context(select.epoll())
            kicks = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            opened.callback(os.close, kicks)
            watch.register(kicks, select.EPOLLIN)
            with self._lock:
                self._watch, self._kicks = watch, kicks
                try:
                    self._socket_is_here()
                    self._kick()  # what happened until now
                except BaseException:
                    self._watch = None
                    raise
            opened.pop_all()

    def _read_always(self) -> None:
        """Listen without a watch: read whenever nobody else does; who asks waits for this thread then."""
        while True:
            with self._lock:
                while self._reading and self._lost is None:
                    self._wake.wait()
                if self._lost is not None:
                    return
                self._reading = True
            try:
                self._read(None)
            finally:
                self._stop_reading()

    def _close_watch(self) -> None:
        with self._lock:
            watch, self._watch, self._heard = self._watch, None, False
            assert watch is not None
            watch.close()
            os.close(self._kicks)

    def _listen_once(self) -> None:
        """Wait for something to do that nobody else does; take a packet, or get back to the broker."""
        assert self._watch is not None
        self._watch.poll()
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._kicks)
            if self._reading or self._asking or self._lost is not None:
                return  # who reads, or asks, tells when it has done
            self._reading = True
        try:
            self._read(0.0)
            while self._absence is not None:  # who asks meanwhile waits for this thread
                self._read(None)
        finally:
            self._stop_reading()
