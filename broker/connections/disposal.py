"""Getting rid of descriptors that clients sent, which can take as long as a client likes.

A client may send any descriptor with any message, wanted or not, and ``close`` is not harmless:

- The last reference to a **socket** lingers (SO_LINGER) for as many hours as its maker chose, and a Unix
  socket does so for every socket that is on its way in its queue.  That goes for a client's own
  connection as well, when it is closed while messages with descriptors are unread in it, and for
  a receive that leaves descriptors out because there is no room for them.
- Closing a **file** asks the file system to flush, and with FUSE that is a program of the client's.

So the broker takes every descriptor that comes (wire.py makes room for as many as the kernel
lets through), closes none of them itself, and closes a connection only when nothing is unread in it.  Sockets
are handed to a process that ends at once, for which nothing lingers (native/warden/closer.c): that
always gets on.  Files are closed in threads, each at once; what hangs is charged to the user until
``[limits] descriptors_received`` ends its connections unread.  No process is started from here, which
would have them flushed, too (spawner.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

import trio

from teemate.broker.policy.limits import Account, Charge, Resource
from teemate.broker.wardens.programs import closer_program
from teemate.broker.wardens.spawner import FIRST_FD, MOST_FDS, start_program

__all__ = ["Disposal", "DisposalStatistics"]

_FILE_THREADS = 512
_PENDING_ENOUGH = 512
"""Sockets that may wait for their end before nobody new is accepted."""
_PATIENCE = 2.0
"""Seconds until a user's connections end because what it sent hangs."""
_DRAIN_PACKETS = 256
_CREDENTIALS = socket.CMSG_SPACE(12)
"""Room for a struct ucred and nothing else."""
# Whole numbers, as in wire.py.
_LOOK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
_CUT = int(socket.MSG_CTRUNC)


@dataclass(frozen=True, slots=True, kw_only=True)
class DisposalStatistics:
    """Sockets and files whose end has not come yet, and how many were got rid of so far."""

    sockets: int
    files: int
    done: int


@final
class _Worker:
    """Does one job after the other in at most so many threads; everything but the jobs runs in trio's."""

    def __init__(self, threads: int) -> None:
        self._jobs: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        self._allowed = threads
        self._running = 0

    def add(self, job: Callable[[], None], done: Callable[[], None]) -> None:
        """Have `job` done in a thread, and `done` called in this one afterwards."""
        self._jobs.append((job, done))
        self._start()

    def _start(self) -> None:
        token = trio.lowlevel.current_trio_token()
        while self._jobs and self._running < self._allowed:
            job, done = self._jobs.popleft()
            self._running += 1

            def deliver(_outcome: object, done: Callable[[], None] = done) -> None:
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(self._ended, done)

            trio.lowlevel.start_thread_soon(job, deliver, "disposal")

    def _ended(self, done: Callable[[], None]) -> None:
        self._running -= 1
        done()
        self._start()

    @property
    def idle(self) -> bool:
        return not self._running and not self._jobs


@final
class Disposal:
    """Takes over descriptors of clients, and connections that are over."""

    def __init__(self) -> None:
        self._sockets = _Worker(1)
        self._waiting: list[tuple[list[int], Charge | None]] = []
        self._dropping = False
        self._files: dict[int, _Worker] = {}
        self._pending_sockets = 0
        self._pending_files = 0
        self._done = 0
        self._progress = trio.Event()

    def dispose(self, account: Account, fds: Iterable[int]) -> None:
        """Get rid of what a client sent."""
        sockets: list[int] = []
        files: list[int] = []
        for fd in fds:
            (sockets if _is_socket(fd) else files).append(fd)
        if sockets:
            self._drop_sockets(sockets, account.owe(Resource.DESCRIPTORS_RECEIVED, len(sockets)))
        for fd in files:
            self.close_file(account, fd)

    def close_file(self, account: Account, fd: int) -> None:
        """Close what is no socket."""
        uid, charge = account.uid, account.owe(Resource.DESCRIPTORS_RECEIVED, 1)
        worker = self._files.setdefault(uid, _Worker(_FILE_THREADS))
        self._pending_files += 1

        def done() -> None:
            charge.release()
            self._pending_files -= 1
            self._got_on(1)
            if worker.idle:
                self._files.pop(uid, None)

        worker.add(lambda: _close_quietly(fd), done)

    def close_connection(self, sock: socket.socket, charge: Charge | None) -> None:
        """Close a connection; `charge` is released when that has happened.

        What was sent to the client before is still read by it: a socket that is closed over unread
        messages would take that away, so those are thrown away first, as long as no descriptors are
        with them.
        """
        if not _drained(sock):
            self._drop_sockets([sock.detach()], charge)
            return
        sock.close()
        if charge is not None:
            charge.release()

    def close_unread(self, fds: list[int]) -> None:
        """Close connections in which descriptors may be unread, and that count for nobody."""
        if fds:
            self._drop_sockets(fds, None)

    @property
    def is_caught_up(self) -> bool:
        """Whether few enough sockets are left to get rid of."""
        return self._pending_sockets <= _PENDING_ENOUGH

    async def caught_up(self) -> None:
        """Wait until that is so."""
        while not self.is_caught_up:
            await self._progress.wait()

    async def room_for(self, account: Account) -> None:
        """Wait until more descriptors of the user may come.

        Raises
        ------
        LimitReached
            What it sent hangs.

        """
        with trio.move_on_after(_PATIENCE):
            while account.exhausted(Resource.DESCRIPTORS_RECEIVED):
                await self._progress.wait()
        if account.exhausted(Resource.DESCRIPTORS_RECEIVED):
            account.charge(Resource.DESCRIPTORS_RECEIVED).release()  # says which limit it is

    def _got_on(self, count: int) -> None:
        self._done += count
        progress, self._progress = self._progress, trio.Event()
        progress.set()

    def _drop_sockets(self, fds: list[int], charge: Charge | None) -> None:
        self._pending_sockets += len(fds)
        self._waiting.append((fds, charge))
        self._start_dropping()

    def _start_dropping(self) -> None:
        """Drop all that wait with one process: who sends many costs no more than who sends one."""
        if self._dropping or not self._waiting:
            return
        self._dropping = True
        batch, self._waiting = self._waiting, []
        fds = [fd for some, _ in batch for fd in some]

        def done() -> None:
            for _, charge in batch:
                if charge is not None:
                    charge.release()
            self._dropping = False
            self._pending_sockets -= len(fds)
            self._got_on(len(fds))
            self._start_dropping()

        self._sockets.add(lambda: self._drop(fds), done)

    def _drop(self, fds: list[int]) -> None:
        """In a thread: let processes inherit the sockets, close ours, and let them end."""
        pids: list[int] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                for start in range(0, len(fds), MOST_FDS - 1):
                    with contextlib.suppress(OSError):
                        pids.append(_start_closer(theirs.fileno(), fds[start : start + MOST_FDS - 1]))
            for fd in fds:  # without a process they may linger here, and others have to wait
                _close_quietly(fd)
        for pid in pids:
            os.waitpid(pid, 0)

    def statistics(self) -> DisposalStatistics:
        """What is still to be got rid of."""
        return DisposalStatistics(sockets=self._pending_sockets, files=self._pending_files, done=self._done)


def _start_closer(end: int, fds: list[int]) -> int:
    """Return the process that holds `fds` until the other side of `end` is closed.

    The spawner cannot take sockets in which others are nested deeply (ETOOMANYREFS, before Linux 6.10):
    then it is started from here, where files that hang may hold it up (spawner.py).
    """
    program = closer_program()
    try:
        return start_program([str(program), str(FIRST_FD)], [end, *fds])
    except OSError as error:
        if error.errno != errno.ETOOMANYREFS:
            raise
    # A descriptor that is dup2()ed to itself is inherited (posix_spawn(3) of glibc).
    actions = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in (*fds, end)]
    return os.posix_spawn(program, [program.name, str(end)], {}, file_actions=actions, setsigmask=[])


def _is_socket(fd: int) -> bool:
    """Ask the descriptor itself: fstat() may wait for its file system."""
    try:
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd).detach()
    except OSError:  # ENOTSOCK
        return False
    return True


def _drained(sock: socket.socket) -> bool:
    """Throw away what is unread as long as it is without descriptors; whether nothing is left.

    An empty message looks like the end of the connection, but messages come with credentials
    when that is asked for, and the end does not.  There is room for those only: MSG_CTRUNC tells of
    descriptors, which stay where they are (MSG_PEEK).
    """
    try:
        sock.shutdown(socket.SHUT_RD)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        for _ in range(_DRAIN_PACKETS):
            try:
                _, ancillary, flags, _ = sock.recvmsg(1, _CREDENTIALS, _LOOK)
            except ConnectionResetError:  # told once: the other side left something of ours unread
                continue
            if flags & _CUT:
                return False
            if not ancillary:
                return True
            sock.recv(1, socket.MSG_DONTWAIT)
    except OSError:
        pass
    return False


def _close_quietly(fd: int) -> None:
    with contextlib.suppress(OSError):  # a file system's complaint; the descriptor is closed all the same
        os.close(fd)
