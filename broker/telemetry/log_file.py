"""Where the log goes, without ever waiting for whoever reads it.

A pipe that nobody reads is full after 64 KiB, and writing to it takes until somebody does: that must
not be the broker's one thread.  So a record is written if that does not block, else kept, up to
:data:`BOUND` bytes; what comes beyond that is dropped, and counted.  When there is room again the log
says how many records are missing.  A reader that has gone is a pipe that is full for ever.

The keeper uses this too: nothing is imported that it would not have otherwise.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from collections import deque
from collections.abc import Callable
from typing import final

__all__ = ["BOUND", "LogFile"]

BOUND = 1 << 18
_PIECE = 4096
"""PIPE_BUF: a pipe takes as much of one writer in one piece, or nothing of it (pipe(7))."""


@final
class LogFile:
    """A file for log records; `fd` stays the caller's.

    `tell_lost` is called by :meth:`try_again` with how many records were dropped, when there is room to
    say so: not by :meth:`write`, since whoever writes may hold the logger's lock.
    """

    def __init__(self, fd: int, tell_lost: Callable[[int], None] = lambda _count: None) -> None:
        self.tell_lost = tell_lost
        self._fd = fd
        self._pieces: deque[bytes] = deque()
        self._kept = 0
        self._lost = 0
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode):
            self._write_some = self._write_to_pipe
        elif stat.S_ISSOCK(mode):
            self._write_some = self._write_to_socket
        elif stat.S_ISREG(mode):
            self._write_some = self._write_to_file
        else:
            self._write_some = self._write_when_writable

    def write(self, text: str) -> int:
        """Take one record; it is written now, later, or never."""
        data = text.encode("utf-8", "backslashreplace")
        if self._kept + len(data) > BOUND:
            self._push()
        if self._kept + len(data) > BOUND:
            self._lost += 1
            return len(text)
        self._pieces.extend(data[start : start + _PIECE] for start in range(0, len(data), _PIECE))
        self._kept += len(data)
        self._push()
        return len(text)

    def flush(self) -> None:
        """Nothing is buffered that could be written."""

    def isatty(self) -> bool:
        """Whether people look at it directly."""
        return os.isatty(self._fd)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def try_again(self) -> None:
        """Write what was kept, if there is room now; called once in a while."""
        if self._push() and self._lost:
            lost, self._lost = self._lost, 0
            self.tell_lost(lost)

    def _push(self) -> bool:
        """Write as much as is taken; whether that is all."""
        try:
            while self._pieces:
                written = self._write_some(self._pieces[0])
                self._kept -= written
                if written < len(self._pieces[0]):
                    self._pieces[0] = self._pieces[0][written:]
                else:
                    self._pieces.popleft()
        except OSError:  # full, or nobody will ever read it: then it stays full
            return False
        return True

    def _write_to_pipe(self, data: bytes) -> int:
        # RWF_NOWAIT and not O_NONBLOCK, which would hold for everybody who has this pipe.
        try:
            return os.pwritev(self._fd, [data], -1, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        self._write_some = self._write_when_writable  # an older kernel
        return self._write_when_writable(data)

    def _write_to_socket(self, data: bytes) -> int:
        with socket.socket(fileno=os.dup(self._fd)) as sock:
            return sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _write_to_file(self, data: bytes) -> int:
        return os.write(self._fd, data)

    def _write_when_writable(self, data: bytes) -> int:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        if not any(events & select.POLLOUT for _, events in poll.poll(0)):
            raise BlockingIOError(errno.EAGAIN, "nobody reads the log")
        return os.write(self._fd, data)
