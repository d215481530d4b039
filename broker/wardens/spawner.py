"""Starts the broker's programs through a process that has nothing of the clients.

Who starts a process waits until it has closed, at exec, its copies of all descriptors that are
close-on-exec.  A file on FUSE can hang in that for ever, and clients send files with `create`.  So
programs are started by ``teemate-spawner`` (native/warden/spawner.c), which was started before the
first client came.  They are children of this process all the same.

The spawner answers within the time that an exec takes, and asks nobody; one that does not is replaced.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
from collections.abc import Sequence
from typing import final

from teemate.broker.wardens.programs import spawner_program

__all__ = ["FIRST_FD", "MOST_FDS", "Spawner", "begin", "start_program"]

MOST_FDS = 253
"""SCM_MAX_FD of include/net/scm.h."""
_ANSWER = struct.Struct("ii")
_PATIENCE = 10.0
"""Seconds for an answer on a host that is very busy."""
FIRST_FD = 3
"""Of those that a program gets."""


@final
class Spawner:
    """One spawner process.

    Raises
    ------
    OSError
        It cannot be started.

    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                program = spawner_program()
                self.pid = os.posix_spawn(
                    program,
                    [program.name],
                    {},
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
                        (os.POSIX_SPAWN_DUP2, 2, 1),
                        (os.POSIX_SPAWN_DUP2, theirs.fileno(), FIRST_FD),
                    ],
                    setsigmask=[],
                    setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM],
                )
        except BaseException:
            self._sock.close()
            raise
        self._sock.settimeout(_PATIENCE)

    def start(self, words: Sequence[str], fds: Sequence[int] = ()) -> int:
        """Start a program with `fds` as its descriptors 3, 4, ...; returns its pid.

        From any thread.  The caller waits for the program; `fds` stay the caller's.

        Raises
        ------
        OSError
            The program cannot be started, or (EPIPE, TimeoutError) the spawner has failed.

        """
        message = b"".join(os.fsencode(word) + b"\0" for word in words)
        with self._lock:
            socket.send_fds(self._sock, [message], list(fds), socket.MSG_NOSIGNAL)
            answer = self._sock.recv(_ANSWER.size)
        if len(answer) != _ANSWER.size:
            raise BrokenPipeError(32, "the spawner has ended")
        pid, error = _ANSWER.unpack(answer)
        if error:
            if pid:
                os.waitpid(pid, 0)
            raise OSError(error, os.strerror(error), words[0])
        return int(pid)

    def close(self) -> None:
        """End it."""
        self._sock.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


_begun: list[Spawner] = []
_beginning = threading.Lock()


def begin() -> Spawner:
    """Return this process's spawner, started now if there is none: before there are clients."""
    with _beginning:
        if not _begun:
            _begun.append(Spawner())
        return _begun[0]


def start_program(words: Sequence[str], fds: Sequence[int] = ()) -> int:
    """See :meth:`Spawner.start`; a spawner that has failed is replaced, once.

    Raises
    ------
    OSError
        The program cannot be started.

    """
    for last in (False, True):
        spawner = begin()
        try:
            return spawner.start(words, fds)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            with _beginning:
                if _begun and _begun[0] is spawner:
                    _begun.remove(spawner)
                    spawner.close()
            if last:
                raise
    raise AssertionError("the second attempt returns or raises")
