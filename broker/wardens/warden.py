"""One warden: the process that enters an enclave on the broker's behalf.

The broker sends one request at a time and waits no longer than the deadline. A warden that does not
answer, answers nonsense or ends is killed and a new one is started from the enclave's descriptor and
control key; then the request is made once more, since every request can be repeated. A request that fails
twice fails for its caller, who puts the slot aside. A warden that somebody else killed (an operator, the
kernel for want of memory) says nothing about its request, which is made again. Only when new wardens
cannot be *started* several times in a row is the enclave itself given up: hanging or crashing control
ECALLs, however many, are repaired. When an entry finds that the EPC is empty, nothing is tried again.

An enclave with storage has a warden all the time, since calls inside wait for the files that it reads and
writes: one that ends is replaced at once, and not only when there is something to ask it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import trio
from structlog.typing import FilteringBoundLogger

from teemate.broker.enclaves.control import ControlKey, ControlOp, Lent, SlotKey
from teemate.broker.enclaves.storage import Storage
from teemate.broker.wardens.protocol import (
    REPLY_SIZE,
    RenewStep,
    WardenOp,
    WardenReply,
    renew_body,
    repair_body,
    request,
    start_body,
)
from teemate.broker.wardens.spawner import start_program

__all__ = [
    "EnclaveBrokenError",
    "EnclaveGoneError",
    "Geometry",
    "Warden",
    "WardenError",
    "WardenStatistics",
]

_Body = Callable[[], bytes]
"""Made anew for each attempt: sequence numbers are never used twice."""
_OUTSIDE_KILLS = 8
"""So many wardens in a row may be killed by others in one request; then it fails."""
_START_FACTOR = 5
"""Starting maps the enclave and may run its author's start code: it may take so many deadlines."""
_SHORT_LIFE = 10.0
"""Seconds; a kept warden that ends by itself earlier is replaced after a pause that doubles, up to this."""
_FIRST_PAUSE = 0.1


class WardenError(Exception):
    """A request failed, twice: with a warden each that hung, ended, or could not enter the enclave."""


class EnclaveBrokenError(WardenError):
    """No warden can be started for this enclave any more."""


class EnclaveGoneError(WardenError):
    """The enclave's EPC is empty: the warden's own entry found no TCS where one was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What a warden has to know of its enclave; `segments` are (offset, size, prot, type)."""

    backend: int
    base: int
    size: int
    segments: Sequence[tuple[int, int, int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WardenStatistics:
    """What one enclave's wardens did; `pid` is None while none runs.

    `contended` counts entries that found a TCS of the warden's own busy: a process that maps the
    enclave entered it, which no client has a reason to do.
    """

    pid: int | None
    requests: int
    started: int
    killed: int
    failed: int
    contended: int


@final
class Warden:
    """The wardens of one enclave, one after the other.  The descriptors stay the enclave's."""

    def __init__(
        self,
        program: Path,
        geometry: Geometry,
        key: ControlKey,
        fds: tuple[int, int],
        log: FilteringBoundLogger,
        *,
        deadline: float,
        failures: int,
        storage: Storage | None = None,
    ) -> None:
        self._storage = storage
        self.on_started: Callable[[], None] = lambda: None
        """Called when a new one has started: have :meth:`keep` run."""
        self._short_lives = 0
        self._program = program
        self._geometry = geometry
        self._key = key
        self._fds = fds
        self._log = log
        self._deadline = deadline
        self._failures_allowed = failures
        self._lock = trio.Lock()
        self._sock: socket.socket | None = None
        self._pid: int | None = None
        self._number = 0
        self._started = 0
        self._killed = 0
        self._failed = 0
        self._contended = 0
        self.on_contended: Callable[[int], None] = lambda _count: None
        """Called with how often, when somebody else was in the warden's own TCSs."""
        self._start_failures = 0
        self._closed = False
        self._gone = ""

    # -- what the broker asks for -------------------------------------------------

    async def start(self) -> None:
        """Start the first warden, which gives the enclave its control key."""
        async with self._lock:
            await self._ensure_started()

    async def keep(self) -> None:
        """Return when the present warden has ended and the next one is there; see `on_started`.

        Raises
        ------
        WardenError

        """
        pid, started = self._pid, trio.current_time()
        if pid is None:
            return
        pidfd = await self._pidfd(pid)
        if pidfd is None:
            return
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        async with self._lock:
            if self._closed or self._pid not in (pid, None):
                return
            by_itself = self._pid == pid and not await self._report_and_kill(
                "I/O", _EndedError("it ended: what it said itself stands in the log before this")
            )
        if by_itself:
            brief = trio.current_time() - started < _SHORT_LIFE
            self._short_lives = self._short_lives + 1 if brief else 0
            await trio.sleep(min(_FIRST_PAUSE * 2**self._short_lives, _SHORT_LIFE))
        async with self._lock:
            if not self._closed:
                await self._ensure_started()

    async def _pidfd(self, pid: int) -> int | None:
        """Return a descriptor of the present warden, once there is room; None: it is not present any more."""
        pause = _FIRST_PAUSE
        while self._pid == pid:  # nobody has waited for this child, so its number is still its own
            try:
                return os.pidfd_open(pid)
            except OSError as error:
                self._log.warning("warden not watched", pid=pid, reason=error.strerror)
            await trio.sleep(pause)
            pause = min(2 * pause, _SHORT_LIFE)
        return None

    @property
    def storage(self) -> Storage | None:
        """The folder of the enclave's files, while they are this enclave's."""
        return self._storage

    def forget_storage(self) -> None:
        """Wardens that start from now on have none."""
        self._storage = None

    async def end_storage(self) -> None:
        """The enclave's files are its next generation's: calls inside are told so."""
        if self._storage is None:
            return
        self.forget_storage()
        async with self._lock:
            await self._kill()
            if not self._closed and not self._gone:
                with contextlib.suppress(WardenError):
                    await self._ensure_started()

    async def control(
        self,
        op: ControlOp,
        slot: int = 0,
        *,
        generation: int = 0,
        argument: int | Callable[[], int] = 0,
        key: bytes = bytes(16),
        data: bytes = b"",
        deadline: float | None = None,
    ) -> WardenReply:
        """A control ECALL; the reply's status is the enclave's own, whatever it is.

        An `argument` that is a function is asked when it is the request's turn.
        """

        def body() -> bytes:
            value = argument() if callable(argument) else argument
            return self._key.control(op, slot, generation=generation, argument=value, key=key, data=data)

        for attempt in (1, 2):
            reply = await self._request(WardenOp.CONTROL, body, deadline)
            if reply.entered:
                return reply
            self._failed += 1
            if attempt == 2:
                raise WardenError(f"{op.name} of slot {slot}: {reply.text or os.strerror(-reply.status)}")
        raise AssertionError("the second attempt returns or raises")

    async def lent(self, slot: int, name: str) -> Lent:
        """Return what the enclave's code lends the holder of `slot` of the file `name`."""
        reply = await self.control(ControlOp.LENT, slot, data=name.encode().ljust(64, b"\0"))
        if reply.status != 0 or reply.result.length != 1:
            return Lent.NOT
        return Lent(reply.result.data[0]) if reply.result.data[0] in set(Lent) else Lent.NOT

    async def probe(self, slot: int) -> WardenReply:
        """Enter through the slot's own TCS; not `entered`: it is in use or has no SSA frame left."""

        def body() -> bytes:
            return self._key.control(ControlOp.PROBE, slot)

        return await self._request(WardenOp.PROBE, body)

    async def repair(self, slot: int, generation: int, *, holder_dead: bool) -> WardenReply:
        """Undo what was interrupted in the slot, whose key was taken away; -EBUSY: to be tried later."""

        def body() -> bytes:
            return repair_body(slot, generation, holder_dead=holder_dead)

        return await self._request(WardenOp.REPAIR, body)

    async def renew(
        self,
        slot: int,
        generation: int,
        key: SlotKey,
        *,
        holder_dead: bool,
        hurry: Callable[[], bool] = lambda: False,
    ) -> WardenReply:
        """CLEAR, REPAIR, RESET and ARM in one request, until one of them fails or has something to tell.

        In a `hurry`, asked when it is the request's turn, the image makes nothing ready in the slot.

        The reply is that of the last `step`: of ARM when the slot has `key` now; of REPAIR, with status 0,
        when something was undone, and RESET and ARM are still to be asked for.  A step that fails does so as
        when it is asked for alone, a CLEAR, RESET or ARM after a second attempt.
        """

        def body() -> bytes:
            control = self._key.control
            return renew_body(
                control(ControlOp.CLEAR, slot, generation=generation),
                control(ControlOp.RESET, slot),
                control(ControlOp.ARM, slot, generation=key.generation, argument=hurry(), key=key.key),
                holder_dead=holder_dead,
            )

        for attempt in (1, 2):
            reply = await self._request(WardenOp.RENEW, body)
            if reply.entered or reply.step is RenewStep.REPAIR:
                return reply
            self._failed += 1
            if attempt == 2:
                step = "RENEW" if reply.step is RenewStep.NONE else reply.step.name
                raise WardenError(f"{step} of slot {slot}: {reply.text or os.strerror(-reply.status)}")
        raise AssertionError("the second attempt returns or raises")

    async def close(self) -> None:
        """End the warden; it notices that its socket closes, and is killed if it is stuck."""
        self._closed = True
        async with self._lock:
            await self._kill()

    # -- requests ----------------------------------------------------------------

    async def _request(self, op: WardenOp, body: _Body, deadline: float | None = None) -> WardenReply:
        own = outside = 0
        while True:
            async with self._lock:
                try:
                    return await self._ask(op, body, deadline or self._deadline)
                except _FailedError as failed:
                    if await self._report_and_kill(op.name, failed):
                        outside += 1
                    else:
                        own += 1
                    if own == 2:
                        raise WardenError(f"{op.name} failed twice: {failed}") from failed
                    if outside == _OUTSIDE_KILLS:
                        raise WardenError(f"{op.name}: somebody killed {outside} wardens") from failed

    async def _ask(self, op: WardenOp, body: _Body, deadline: float) -> WardenReply:
        """One attempt, under the lock."""
        if self._closed:
            raise WardenError("the enclave was destroyed")
        await self._ensure_started()
        reply = await self._exchange(op, body(), deadline)
        if reply.contended:
            self._contended += reply.contended
            self.on_contended(reply.contended)
        self._require_there(reply)
        return reply

    def _require_there(self, reply: WardenReply) -> None:
        """Nothing brings an EPC back, so this enclave is not entered again."""
        if not reply.entered and reply.status == -errno.ENODEV:
            self._gone = (
                "its EPC is gone: the host was suspended, its machine was migrated, or its memory failed"
                f" ({reply.text or 'a page fault at the TCS'})"
            )
            raise EnclaveGoneError(self._gone)

    async def _exchange(
        self, op: WardenOp, body: bytes, deadline: float, fds: tuple[int, ...] = ()
    ) -> WardenReply:
        """Send a request and wait for its reply; also when cancelled, else the next gets that reply."""
        assert self._sock is not None
        self._number += 1
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(fd.to_bytes(4, "little") for fd in fds))]
        try:
            self._sock.sendmsg([request(op, self._number, body)], rights if fds else [], socket.MSG_NOSIGNAL)
        except OSError as error:
            raise _EndedError(f"cannot send to it: {error.strerror}") from error
        with trio.move_on_after(deadline) as scope:
            scope.shield = True
            while True:
                try:
                    raw = self._sock.recv(REPLY_SIZE + 1)
                    break
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._sock)
                except OSError as error:
                    raise _EndedError(f"cannot receive from it: {error.strerror}") from error
        if scope.cancelled_caught:
            raise _FailedError(f"no answer within {deadline:g} s ([broker] warden_deadline)")
        if not raw:
            raise _EndedError("it ended")
        try:
            reply = WardenReply.parse(raw)
        except ValueError as error:
            raise _FailedError(str(error)) from error
        if reply.id != self._number:
            raise _FailedError(f"it answered request {reply.id} instead of {self._number}")
        if reply.entered and (reply.step is RenewStep.NONE) == (op is WardenOp.RENEW):
            raise _FailedError(f"it answered {op.name} with step {reply.step.name}")
        return reply

    # -- the process -----------------------------------------------------------------

    async def _ensure_started(self) -> None:
        if self._gone:
            raise EnclaveGoneError(self._gone)
        while self._sock is None:
            try:
                await self._spawn()
            except _FailedError as failed:
                self._start_failures += 1
                await self._report_and_kill(WardenOp.START.name, failed)
                if self._start_failures >= self._failures_allowed:
                    raise EnclaveBrokenError(
                        f"no warden could be started {self._start_failures} times in a row: {failed}"
                    ) from failed

    async def _spawn(self) -> None:
        words, folders = [str(self._program)], []
        with contextlib.ExitStack() as theirs:
            if self._storage is not None:
                words += ["lending" if self._storage.lends else "storage", str(self._storage.limit)]
                try:
                    folders.append(await trio.to_thread.run_sync(self._storage.open))
                except OSError as error:
                    folder = f"its files' folder {self._storage.folder} ([broker] state_directory)"
                    raise _FailedError(f"{folder}: {error.strerror}") from error
                theirs.callback(os.close, folders[0])
            try:
                ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            except OSError as error:
                raise _FailedError(f"no socket can be had for it: {error.strerror}") from error
            theirs.callback(its.close)
            ours.setblocking(False)
            try:
                self._pid = start_program(words, [its.fileno(), *folders])
            except OSError as error:
                ours.close()
                raise _FailedError(f"{self._program}: {error.strerror}") from error
        self._sock = ours
        self._started += 1
        geometry = self._geometry
        body = start_body(
            geometry.base, geometry.size, geometry.backend, self._key.for_warden(), geometry.segments
        )
        reply = await self._exchange(WardenOp.START, body, self._deadline * _START_FACTOR, self._fds)
        if reply.vector is not None:  # it was entered: an ENODEV before that is not about the EPC
            self._require_there(reply)
        if reply.status != 0:
            raise _FailedError(reply.text or f"status {reply.status}")
        self._start_failures = 0
        self.on_started()

    async def _report_and_kill(self, request: str, failed: _FailedError) -> bool:
        """Whether somebody else had killed it."""
        self._killed += 1
        pid = self._pid
        # Its end of the socket closes as it exits: then SIGKILL is somebody else's, ours comes too late.
        by_sigkill = await self._kill()
        outside = isinstance(failed, _EndedError) and by_sigkill
        reason = "somebody else killed it" if outside else str(failed)
        self._log.warning("warden killed", request=request, reason=reason, pid=pid)
        return outside

    async def _kill(self) -> bool:
        """Whether SIGKILL ended it."""
        pid, sock = self._pid, self._sock
        self._pid = self._sock = None
        if sock is not None:
            sock.close()
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # ours and not waited for yet: its number cannot be another's
        # In a thread, which takes no descriptor: there may be none left.
        with trio.CancelScope(shield=True):
            status = await trio.to_thread.run_sync(os.waitid, os.P_PID, pid, os.WEXITED)
        return status is not None and (status.si_code, status.si_status) == (os.CLD_KILLED, signal.SIGKILL)

    def statistics(self) -> WardenStatistics:
        """What was asked of it so far."""
        return WardenStatistics(
            pid=self._pid,
            requests=self._number,
            started=self._started,
            killed=self._killed,
            failed=self._failed,
            contended=self._contended,
        )


class _FailedError(Exception):
    """This warden is of no use any more."""


class _EndedError(_FailedError):
    """It has ended, and not by us."""
