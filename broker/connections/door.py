"""Who comes in next: new connections, sorted by the user that they belong to.

The kernel has one queue of new connections for all users, first come first served, and everybody
waits in it who connects.  One user who connects in a loop keeps it full: then the others wait for as
long as it takes to look at a queue of strangers (before there was this door, a thousand at 0.2 ms
each).  The kernel cannot be asked for the connection of a certain user, so:

- The queue is *emptied* whenever anything is in it.  What every connection has to pass, learning its
  user and turning it away, is in C (native/door): a handful of system calls.
- What came stands in **lines**, one per user, each as long as the user may have connections.  Who
  finds its line full is told so and turned away.
- The lines take turns, and one connection comes in per turn of the scheduler: a victim waits for at
  most one connection of each other user, however many wait.
- Coming in costs as many tokens as several requests (limits.py), which are paid at the head of
  the line.  Who comes again and again waits in its own line, unidentified, with nothing of it but a
  descriptor here.
- While somebody is turned away, a thread of its own **watches** the queue, a thousand times a second, and
  not when something comes.  To be woken for each of a flood, or to deal with it in the thread that
  serves, would cost those who are served more than the flood itself.  Without a flood there is no such
  thread, and a connection wakes the task that serves it, or the attendant if one is expected (guests.py).
- Attackers keep the processors busy as well, and to the scheduler the broker is one of many.  So both threads
  ask to run *soon* after they were woken (:func:`be_prompt`), and before others if that is allowed (root
  may; else CAP_SYS_NICE, or LimitNICE= in the unit).  They have little to do, but everybody waits for it.
- Descriptors are for those who are here already: of the last ones (`reserved`) each user gets one at most
  for who waits, and half of them none.
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import trio

from teemate.broker._door import ffi, lib
from teemate.broker.policy.limits import Ledger, Resource

__all__ = ["CONNECTION_COST", "Caller", "Door", "DoorStatistics", "be_prompt"]

_PAUSE = 0.001
"""Seconds between two looks of the watch."""
_QUIET = 1.0
"""Seconds without anybody turned away after which it ends."""
_FAILURE_PAUSE = 0.1
"""Seconds to wait when the kernel has no descriptor or memory for another connection."""
_CALLERS = 256
_NICE = -10
_SLICE = 0.0005
"""Seconds: about as long as a request takes."""
CONNECTION_COST = 6.0
"""Requests (`ping`) that take as long as a connection: letting it in, finding out who it is, its end."""


def be_prompt() -> bool:
    """Ask the scheduler to let this thread run soon after it was woken; whether before others, too.

    Threads and processes that it starts are ordinary ones.
    """
    return bool(lib.door_be_prompt(_NICE, int(_SLICE * 1e6)) == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorStatistics:
    """Connections that wait to come in, and of how many users; `watched` in a flood."""

    waiting: int
    users: int
    turned_away: int
    watched: bool


class Caller(NamedTuple):
    """A connection that comes in; whoever takes it closes it."""

    sock: socket.socket
    uid: int


@final
class _Line:
    """The connections of one user that wait, and when the first of them has paid."""

    __slots__ = ("fds", "ready_at")

    def __init__(self) -> None:
        self.fds: deque[int] = deque()
        self.ready_at: float | None = None


@final
class Door:
    """Accepts everybody, lets them in one by one, and turns away whom there is no room for.

    `full` and `scarce` are the messages for those: their user's line is full, or descriptors are
    scarce.  `dispose` gets connections that may not be closed here, since descriptors are unread in
    them.  Descriptors from `reserved` up to `limit` are kept for others.  The listeners stay the
    caller's.

    Raises
    ------
    OSError
        There are no descriptors for it.

    """

    def __init__(
        self,
        ledger: Ledger,
        listeners: Sequence[socket.socket],
        *,
        full: bytes,
        scarce: bytes,
        dispose: Callable[[list[int]], None],
        reserved: int,
        limit: int,
    ) -> None:
        self._ledger = ledger
        self._listeners = [listener.fileno() for listener in listeners]
        self._dispose = dispose
        self._callers = ffi.new("struct door_caller[]", _CALLERS)
        self._unlucky = ffi.new("struct door_unlucky[]", _CALLERS)
        self._lines: dict[int, _Line] = {}
        self._turned_away = 0
        self._watched = False
        self._lent: Any = None
        """The attendant, while it looks after the listeners."""
        self._lend_again = 0.0
        self._failed = False
        self._epoll = select.epoll(select.EPOLL_CLOEXEC)
        longest = ledger.bounds[Resource.CONNECTIONS]
        self._door = lib.door_new(
            longest, reserved, (reserved + limit) // 2, full, len(full), scarce, len(scarce)
        )
        if self._door == ffi.NULL:
            self._epoll.close()
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self._epoll.register(lib.door_bell(self._door), select.EPOLLIN)
        for listener in listeners:
            listener.setblocking(False)
            self._epoll.register(listener, select.EPOLLIN)

    def look(self) -> None:
        """Sort in who came; in a flood the watch has accepted them already.

        Raises
        ------
        OSError
            The kernel has no descriptor or memory for somebody who waits.

        """
        failure = 0
        if self._lent is not None and not lib.attendant_listens(self._lent):
            self._have_back()
        if self._lent is not None:
            pass
        elif not self._watched:
            for listener in self._listeners:
                result = lib.door_sweep(self._door, listener)
                failure = min(failure, result)
                if result > 0:
                    self._watch()
        elif not lib.door_watched(self._door):
            self._watched = False
            for listener in self._listeners:
                self._epoll.register(listener, select.EPOLLIN)
        else:
            failure = -lib.door_failure(self._door)
        self._collect()
        self._failed = failure != 0
        if failure:
            raise OSError(-failure, os.strerror(-failure))

    def lend(self, attendant: Any) -> None:
        """Let the attendant accept who comes, and put into the lines whom it does not greet (greet.c).

        It gives this up by itself when it is of no use, and is not asked again soon.
        """
        if self._lent is not None or self._watched or trio.current_time() < self._lend_again:
            return
        if lib.attendant_listen(attendant, self._door, self._listeners, len(self._listeners)) == 0:
            self._lent = attendant
            for listener in self._listeners:
                self._epoll.unregister(listener)

    def take_back(self) -> None:
        """Whom the attendant has not greeted by now is in the lines afterwards."""
        if self._lent is not None:
            lib.attendant_deafen(self._lent)
            self._have_back()

    def _have_back(self) -> None:
        self._lent = None
        self._lend_again = trio.current_time() + _QUIET
        for listener in self._listeners:
            self._epoll.register(listener, select.EPOLLIN)

    def _watch(self) -> None:
        """Leave the queue to the thread, unless there cannot be one: then each look goes on sweeping."""
        if lib.door_watch(
            self._door, self._listeners, len(self._listeners), int(_PAUSE * 1e6), int(_QUIET * 1e3)
        ):
            return
        if not self._watched:
            self._watched = True
            for listener in self._listeners:
                self._epoll.unregister(listener)

    def _collect(self) -> None:
        while True:
            count = lib.door_collect(self._door, self._callers, _CALLERS)
            unread = []
            for caller in self._callers[0:count]:
                if caller.kind == lib.DOOR_UNREAD:
                    unread.append(caller.fd)
                    continue
                line = self._lines.get(caller.uid)
                if line is None:
                    line = self._lines[caller.uid] = _Line()
                line.fds.append(caller.fd)
            if unread:
                self._dispose(unread)
            if count < _CALLERS:
                return

    def take(self, now: float) -> Caller | None:
        """Return who comes in next, None when nobody may now.  The user's tokens are paid."""
        for uid, line in self._lines.items():
            if line.ready_at is None:
                line.ready_at = now + self._ledger.account(uid).bucket.take(CONNECTION_COST)
            if line.ready_at <= now:
                line.ready_at = None
                fd = line.fds.popleft()
                lib.door_came_in(self._door, uid)
                del self._lines[uid]
                if line.fds:
                    self._lines[uid] = line  # behind all others
                kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
                return Caller(socket.socket(socket.AF_UNIX, kind, 0, fileno=fd), uid)
        return None

    async def wait(self) -> None:
        """Wait until there is reason to look again, or somebody who waits has paid."""
        times = [line.ready_at for line in self._lines.values() if line.ready_at is not None]
        deadline = min(times, default=float("inf"))
        if self._failed:  # the listener stays readable, and that helps nobody
            await trio.sleep_until(min(deadline, trio.current_time() + _FAILURE_PAUSE))
            return
        with trio.move_on_at(deadline):
            await trio.lowlevel.wait_readable(self._epoll.fileno())

    def unlucky(self) -> dict[int, int]:
        """Return how many of which users were turned away since this was asked."""
        found: dict[int, int] = {}
        while True:
            count = lib.door_unlucky(self._door, self._unlucky, _CALLERS)
            for user in self._unlucky[0:count]:
                found[user.uid] = found.get(user.uid, 0) + user.count
            if count < _CALLERS:
                self._turned_away += sum(found.values())
                return found

    def close(self) -> None:
        """Turn away everybody who waits, without a word."""
        self._collect()
        lines, self._lines = self._lines, {}
        waiting = [fd for line in lines.values() for fd in line.fds]
        if waiting:
            self._dispose(waiting)
        self._epoll.close()
        door, self._door = self._door, ffi.NULL
        lib.door_free(door)

    def statistics(self) -> DoorStatistics:
        """Who waits at this moment."""
        waiting = sum(len(line.fds) for line in self._lines.values())
        return DoorStatistics(
            waiting=waiting, users=len(self._lines), turned_away=self._turned_away, watched=self._watched
        )
