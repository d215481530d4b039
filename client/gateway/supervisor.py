"""Keeps workers: starts them, starts those again that end, and ends all of them when it is told to.

It holds the listening sockets and never accepts, so connections that arrive while a worker is being started
again wait, or go to another one.  A worker sees its end of a socket pair close when the supervisor is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import final

import trio
from structlog.typing import FilteringBoundLogger

from . import places
from .places import Places
from .settings import Settings
from .worker import READY

__all__ = ["ENDING", "Supervisor", "SupervisorStatistics"]

ENDING = (signal.SIGTERM, signal.SIGINT)

WORKER: Sequence[str] = (sys.executable, "-m", "teemate.gateway.worker")

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
"""Before a worker that ended is started again: twice as long each time, unless it has run for this long."""
LATE = 5.0
"""What a worker gets beyond the grace to end by itself, before it is killed."""


@final
@dataclass(frozen=True, slots=True)
class SupervisorStatistics:
    """`starts` counts every worker that was ever started; `pids` are those that run, by number."""

    starts: int
    pids: tuple[int, ...]


@final
class Supervisor:
    """Runs as many workers as `settings` says on `listeners`, which stay the caller's."""

    def __init__(
        self,
        settings: Settings,
        listeners: Sequence[socket.socket],
        log: FilteringBoundLogger,
        log_format: str,
    ) -> None:
        self._settings = settings
        self._listeners = listeners
        self._count = settings.workers
        self._memory = places.create(self._count, settings.places)
        self._places = Places(
            self._memory, workers=self._count, count=settings.places, own=settings.slots, number=0
        )
        self._log = log
        self._log_format = log_format
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._ready: set[int] = set()
        self._all_ready = trio.Event()
        self._stopping = trio.Event()
        self._starts = 0

    def statistics(self) -> SupervisorStatistics:
        """Which workers there are."""
        return SupervisorStatistics(
            starts=self._starts, pids=tuple(process.pid for _, process in sorted(self._running.items()))
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; a second one ends what is under way at once.

        Both may be blocked until here, so that none is lost.
        """
        with trio.open_signal_receiver(*ENDING) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # what came until now is heard
            async with trio.open_nursery() as helping:
                helping.start_soon(self._obey, signals, helping)
                helping.start_soon(self._announce)
                async with trio.open_nursery() as keeping:
                    for number in range(self._count):
                        keeping.start_soon(self._keep, number)
                helping.cancel_scope.cancel()

    async def _announce(self) -> None:
        await self._all_ready.wait()
        self._log.info("ready", workers=self._count)
        _notify("READY=1")

    async def _obey(self, signals: AsyncIterator[int], helping: trio.Nursery) -> None:
        async for number in signals:
            if self._stopping.is_set():
                self._log.warning("ending at once", signal=signal.Signals(number).name)
                self._signal(signal.SIGKILL)
                continue
            self._stopping.set()
            self._log.info("stopping", signal=signal.Signals(number).name, workers=len(self._running))
            _notify("STOPPING=1")
            self._signal(signal.SIGTERM)
            helping.start_soon(self._hurry)

    async def _hurry(self) -> None:
        await trio.sleep(self._settings.grace + LATE)
        self._log.error("workers killed", pids=self.statistics().pids, reason="they did not end in time")
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        for process in self._running.values():
            process.send_signal(number)

    async def _keep(self, number: int) -> None:
        pause = FIRST_PAUSE
        while not self._stopping.is_set():
            began = trio.current_time()
            try:
                facts: dict[str, object] = {"status": await self._run_worker(number)}
            except OSError as error:  # the machine has no process or descriptor left, for now
                facts = {"status": None, "reason": str(error)}
            if self._stopping.is_set():
                break
            lived = trio.current_time() - began
            pause = FIRST_PAUSE if lived >= LONGEST_PAUSE else min(2 * pause, LONGEST_PAUSE)
            self._log.error("worker ended", number=number, **facts, seconds=round(lived, 3), pause=pause)
            with trio.move_on_after(pause):
                await self._stopping.wait()

    async def _run_worker(self, number: int) -> int:
        ours, theirs = socket.socketpair()
        descriptors = [listener.fileno() for listener in self._listeners]
        with ours:
            with theirs:
                process = subprocess.Popen(  # noqa: S603, ASYNC220 - our own module; it takes a fork
                    [
                        *WORKER,
                        "--settings", self._settings.to_json(), "--control", str(theirs.fileno()),
                        "--listeners", ",".join(map(str, descriptors)), "--places", str(self._memory),
                        "--log-format", self._log_format, "--number", str(number),
                    ],
                    pass_fds=[theirs.fileno(), self._memory, *descriptors],
                    stdin=subprocess.DEVNULL,
                )  # fmt: skip
            self._starts += 1
            self._running[number] = process
            try:
                pidfd = os.pidfd_open(process.pid)
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._await_ready, number, process.pid, ours)
                        await trio.lowlevel.wait_readable(pidfd)
                        nursery.cancel_scope.cancel()
                finally:
                    os.close(pidfd)
                return process.wait()
            finally:
                self._ready.discard(number)
                del self._running[number]
                if process.poll() is None:
                    process.kill()
                    process.wait()
                self._places.clear(number)

    async def _await_ready(self, number: int, pid: int, control: socket.socket) -> None:
        control.setblocking(False)
        await trio.lowlevel.wait_readable(control)
        if control.recv(len(READY)) == READY:
            self._log.info("worker ready", number=number, worker=pid)
            self._ready.add(number)
            if len(self._ready) == self._count:
                self._all_ready.set()


def _notify(text: str) -> None:
    """Tell the service manager, if there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.send(text.encode())
