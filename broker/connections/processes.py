"""Hears when clients' processes end, through their pidfds.

All pidfds sit in one epoll instance that one task waits on: watching a process costs its
connection one system call and no task.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import trio

__all__ = ["ProcessStatistics", "Processes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatistics:
    """How many processes are watched now, and how many were seen to end."""

    watched: int
    ended: int


@final
class Processes:
    """Calls back when a watched process has ended; the pidfds stay their holders'."""

    def __init__(self) -> None:
        self._epoll = select.epoll(select.EPOLL_CLOEXEC)
        self._ended = 0
        self._callbacks: dict[int, Callable[[], None]] = {}

    def watch(self, pidfd: int, ended: Callable[[], None]) -> None:
        """Call `ended` once when the process behind `pidfd` has ended; at once if it has already."""
        self._callbacks[pidfd] = ended
        self._epoll.register(pidfd, select.EPOLLIN | select.EPOLLONESHOT)

    def forget(self, pidfd: int) -> None:
        """Stop watching; the holder may close `pidfd` then."""
        if self._callbacks.pop(pidfd, None) is not None:
            self._epoll.unregister(pidfd)

    async def run(self) -> None:
        """Wait for processes to end, for as long as the broker runs."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                for pidfd, _ in self._epoll.poll(0):
                    ended = self._callbacks.get(pidfd)
                    if ended is not None:
                        self.forget(pidfd)
                        self._ended += 1
                        ended()
        finally:
            self._epoll.close()

    def statistics(self) -> ProcessStatistics:
        """How many are watched."""
        return ProcessStatistics(watched=len(self._callbacks), ended=self._ended)
