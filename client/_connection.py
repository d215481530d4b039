"""The socket to the broker, shared by all threads of the process.

Whoever waits for an answer reads, one thread at a time, and hands what belongs to others to
them; so a cold attach needs no thread of ours.  Once a slot is in use a listener reads
instead (:meth:`Connection.listen`), since the broker's events (``revoked``) want an answer
even when nobody asks anything.

`hello` is sent together with the first request, not by :func:`connect`: both answers come in
one round trip.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from teemate import wire
from teemate.errors import ConnectionLost, Error, InternalError, NotAttached, ProtocolError, from_code

__all__ = ["DEFAULT_PATH", "Connection", "Reply"]

DEFAULT_PATH = "/run/teemate/broker.sock"
PROTOCOL_VERSION = 1
REPLY_TIMEOUT = 60.0
"""Seconds that the broker has for an answer, on top of what the request lets it wait."""
SLICE = 0.05
"""Seconds between two looks at whether the caller still wants the answer."""

# Encoded once, which also brings the encoder into memory before the first request.
_HELLO = wire.encode({"id": 0, "op": "hello", "args": {"version": PROTOCOL_VERSION}})

_spare_buffers = [bytearray(wire.MAX_MESSAGE)]
"""For receiving; made at import, so that the first connection need not."""

Check = Callable[[], None]
"""Raises when the caller no longer wants the result."""


class Reply(NamedTuple):
    """An answer; `fds` belong to whoever made the request."""

    ok: dict[str, Any]
    fds: tuple[int, ...]


class _Failure(NamedTuple):
    error: Error


Undo = Callable[[dict[str, Any]], None]
"""Gives back what an answer granted after its caller had gone."""


def _no_undo(_ok: dict[str, Any]) -> None:
    pass


class Connection:
    """Requests, their answers and the broker's events on one socket.  Thread safe.

    In a child of fork() everything raises :class:`NotAttached`: the socket is the parent's.
    """

    def __init__(self, path: str, client: str = "") -> None:
        self.path = path
        self.on_event: Callable[[dict[str, Any]], None] = lambda _event: None
        self.on_lost: Callable[[], None] = lambda: None
        self._client = client
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._next_id = 0
        self._greeted = False
        self._reading = False
        self._listening = False
        self._waiting: set[int] = set()
        self._replies: dict[int, Reply | _Failure] = {}
        self._orphans: dict[int, Undo] = {}
        self._lost: Error | None = None
        self._farewell: Error | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
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
        """Whether the broker is gone."""
        return self._lost is not None

    def check_process(self) -> None:
        """Raise :class:`NotAttached` in a child of fork()."""
        if os.getpid() != self._pid:
            raise NotAttached(
                f"this process is a child of process {self._pid}, which holds the connection and the grants: "
                "connect and attach here"
            )

    def close(self) -> None:
        """Close the socket; every grant of this connection ends."""
        if os.getpid() != self._pid:
            self._socket.close()
            return
        self._end(ConnectionLost(f"the connection to {self.path} was closed by this program"), quiet=True)
        with contextlib.suppress(OSError):  # the broker was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            if not self._listening:
                self._socket.close()

    def request(
        self,
        op: str,
        args: Mapping[str, object] | None = None,
        *,
        fds: tuple[int, ...] = (),
        wait: float = 0.0,
        undo: Undo = _no_undo,
        check: Check | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Reply:
        """Ask for `op` and wait for the answer.

        `fds` ride on the request and stay the caller's.  `wait`: seconds that the request itself
        lets the broker wait.  `undo` is called with the answer if it comes after the caller
        was interrupted (its fds are closed then).  `meanwhile` is called while the broker works.

        Raises
        ------
        ConnectionLost
            The broker is gone, or gave no answer in time.
        Error
            What the broker answered.

        """
        number = self._send(op, args, fds, None)
        try:
            if meanwhile is not None:
                meanwhile()
            answer = self._await(number, op, time.monotonic() + wait + REPLY_TIMEOUT, check)
        except BaseException:
            self._disown(number, undo)
            raise
        if isinstance(answer, _Failure):
            raise answer.error
        return answer

    def post(self, op: str, args: Mapping[str, object], undo: Undo = _no_undo) -> None:
        """Send a request whose answer nobody waits for; a lost connection is no error."""
        # The end of the connection ends what this would have given back.
        with contextlib.suppress(ConnectionLost):
            self._send(op, args, (), undo)

    def listen(self) -> None:
        """Have a thread read from now on, so that events are heard at once."""
        with self._lock:
            if self._listening or self._lost is not None:
                return
            self._listening = True
        _thread.start_new_thread(self._listener, ())

    # ---- sending --------------------------------------------------------------------

    def _send(
        self, op: str, args: Mapping[str, object] | None, fds: tuple[int, ...], orphan: Undo | None
    ) -> int:
        self.check_process()
        with self._lock:
            if self._lost is not None:
                raise self._lost
            number = self._next_id + 1
            self._next_id = number
            if orphan is None:
                self._waiting.add(number)
            else:
                self._orphans[number] = orphan
        message: dict[str, object] = {"id": number, "op": op}
        if args:
            message["args"] = args
        try:
            data = wire.encode(message)
            if not self._greeted:
                self._greet()
            wire.send(self._socket, data, fds)
        except OSError as error:
            # The broker may have said why before it closed: read that first.
            if self._farewell is None:
                self._farewell = ConnectionLost(
                    f"the broker at {self.path} closed the connection ({error.strerror}): see its log",
                    {"socket": self.path, "errno": error.errno},
                )
        except BaseException:
            with self._lock:
                self._waiting.discard(number)
                self._orphans.pop(number, None)
            raise
        return number

    def _greet(self) -> None:
        hello = _HELLO
        if self._client:
            args = {"version": PROTOCOL_VERSION, "client": self._client}
            hello = wire.encode({"id": 0, "op": "hello", "args": args})
        with self._lock:
            if not self._greeted:
                wire.send(self._socket, hello)
                self._greeted = True

    # ---- receiving ------------------------------------------------------------------

    def _await(self, number: int, op: str, deadline: float, check: Check | None) -> Reply | _Failure:
        while True:
            with self._lock:
                while True:
                    answer = self._replies.pop(number, None)
                    if answer is not None:
                        self._waiting.discard(number)
                        return answer
                    if self._lost is not None:
                        raise self._lost
                    if not self._reading:
                        self._reading = True
                        break
                    self._wake.wait(self._patience(op, deadline, check))
                    if check is not None:
                        check()
            try:
                if self._poll.poll(self._patience(op, deadline, check) * 1000):
                    self._receive()
                elif check is not None:
                    check()
            finally:
                with self._lock:
                    self._reading = False
                    self._wake.notify_all()

    def _patience(self, op: str, deadline: float, check: Check | None) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ConnectionLost(
                f"the broker at {self.path} gave no answer to {op!r} in time: see its log", {"op": op}
            )
        return left if check is None else min(left, SLICE)

    def _receive(self) -> None:
        """Take one packet; only called by the thread that holds `_reading`."""
        try:
            packet = wire.receive(self._socket, self._buffer)
        except OSError as error:
            broken = ConnectionLost(
                f"the connection to {self.path} broke: {error.strerror}",
                {"socket": self.path, "errno": error.errno},
            )
            if error.errno == errno.ECONNRESET:
                # The broker closed without having read everything; what it said before is
                # still to be read (the kernel reports the reset first, once).
                self._farewell = self._farewell or broken
            else:
                self._end(broken)
            return
        except ProtocolError as error:
            self._end(error)
            return
        if not packet.data:
            wire.close_all(packet.fds)
            self._end(
                self._farewell
                or ConnectionLost(
                    f"the broker at {self.path} ended; calls in enclaves go on, new requests need it back",
                    {"socket": self.path},
                )
            )
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
            self._answer(message, packet.fds)

    def _answer(self, message: dict[str, Any], fds: tuple[int, ...]) -> None:
        number = message.get("id")
        ok = message.get("ok")
        answer: Reply | _Failure
        if isinstance(ok, dict):
            answer = Reply(ok, fds)
        else:
            wire.close_all(fds)
            fds = ()
            untrusted = message.get("error")
            if not isinstance(untrusted, dict):
                self._end(ProtocolError("the broker sent neither an answer nor an error"))
                return
            answer = _Failure(
                from_code(str(untrusted.get("code")), str(untrusted.get("message")), untrusted.get("detail"))
            )
            if number == 0 or number is None:
                # The greeting was refused, or the broker could not read a request of ours.
                self._farewell = answer.error
                return
        if number == 0:
            return
        with self._lock:
            if number in self._waiting:
                self._replies[number] = answer
                # The listener reads on without an end: whoever waits hears of it here.
                self._wake.notify_all()
                return
            undo = self._orphans.pop(number, None) if isinstance(number, int) else None
        wire.close_all(fds)
        if undo is None:
            self._end(ProtocolError(f"the broker answered a request that nobody made (id {number})"))
        elif isinstance(answer, Reply):
            undo(answer.ok)

    def _disown(self, number: int, undo: Undo) -> None:
        with self._lock:
            self._waiting.discard(number)
            answer = self._replies.pop(number, None)
            if answer is None:
                self._orphans[number] = undo
        if isinstance(answer, Reply):
            wire.close_all(answer.fds)
            undo(answer.ok)

    def _end(self, error: Error, *, quiet: bool = False) -> None:
        with self._lock:
            if self._lost is not None:
                return
            self._lost = error
            self._orphans.clear()
            self._wake.notify_all()
        if not quiet:
            self.on_lost()

    def _listener(self) -> None:
        # Signals are for the program's own threads.
        signal.pthread_sigmask(
            signal.SIG_BLOCK,
            signal.valid_signals()
            - {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP},
        )
        try:
            with self._lock:
                while self._reading:
                    self._wake.wait()
                self._reading = True
            while self._lost is None:
                self._receive()
        except Exception as error:  # a listener that died silently would hang everybody
            self._end(InternalError(f"reading the broker's messages failed: {error!r}"))
            raise
        finally:
            self._socket.close()
