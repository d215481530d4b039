"""One slot of an enclave in this process: calls through it, and how they end.

The C library enters; this module decides what happens between two entries.  A call comes back
to Python at least every 20 ms (on Linux's driver after 5 to 10 ms inside), so that signal handlers
run (Ctrl-C), deadlines are kept and a revocation is heard; then it goes on, or is *abandoned*: the
enclave still stands in the middle of it, so the slot is out of use.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from teemate._faults import FORKED, describe_fault, native_error, new_diag, status_error
from teemate._native import ffi, lib
from teemate._types import Exit, SlotGrant
from teemate.errors import (
    Busy,
    CallTimeout,
    EnclaveFault,
    EnclaveLost,
    Error,
    LimitReached,
    NotAttached,
    Revoked,
)

if TYPE_CHECKING:
    from teemate._enclave import Enclave

__all__ = ["OcallHandler", "Slot"]

OcallHandler = Callable[[bytes], bytes]
"""Gets an OCALL's data and returns the answer, 1 MiB at most.

An exception from it fails the OCALL; the enclave ends the call, and then the caller gets the exception.
What is no :class:`Exception` (KeyboardInterrupt) abandons the call."""

PAUSE_NS = 20_000_000
"""How long a call may keep Python's signal handlers, deadlines and revocations waiting."""
OCALL_ANSWER_MAX = 1 << 20
"""Bytes of an OCALL's answer (SLOT_OCALL_CAPACITY of native/lib/slot.h)."""
MAX_REPLY = 65536
"""Bytes of an answer, unless the call says otherwise."""

_EENTER = 2
_ERESUME = 3
_EEXIT = 4
_DONE = lib.TEEMATE_CALL_DONE
_PAUSED = lib.TEEMATE_CALL_PAUSED
_OCALL = lib.TEEMATE_CALL_OCALL
_FAULT = lib.TEEMATE_CALL_FAULT
_REVOKED = lib.TEEMATE_CALL_REVOKED
_LOST = lib.TEEMATE_CALL_LOST
_STOLEN = lib.TEEMATE_CALL_STOLEN
_PAGE_FAULT = 14
_MEMORY_ERROR = 18
_LEFT = lib.TEEMATE_LEFT
_MONOTONIC = time.monotonic
# Types and functions that a cold attach needs: cffi looks each up once, here rather than there.
_CALL = ffi.typeof("struct teemate_call *")
_ARGS = ffi.typeof("struct teemate_slot_args *")
_SLOT = ffi.typeof("struct teemate_slot **")
_BYTES = ffi.typeof("uint8_t[]")
# Not cleared: the enclave tells how much it has written, and no more is read.
_new_buffer = ffi.new_allocator(should_clear_after_alloc=False)
_slot_open = lib.teemate_slot_open
_slot_call = lib.teemate_slot_call
_slot_resume = lib.teemate_slot_resume
_slot_answer = lib.teemate_slot_answer
_slot_close = lib.teemate_slot_close

Check = Callable[[], None]


def _fitting(answer: bytes) -> bytes:
    if len(answer) > OCALL_ANSWER_MAX:
        raise LimitReached(
            f"an OCALL's answer of {len(answer)} bytes: {OCALL_ANSWER_MAX} are possible",
            {"maximum": OCALL_ANSWER_MAX, "used": len(answer)},
        )
    return bytes(answer)


class Slot:
    """A TCS of an enclave for one thread at a time: what ``with enclave.slot() as slot`` gives."""

    def __init__(self, enclave: Enclave, grant: SlotGrant) -> None:
        self.index = grant.slot
        """Number of the slot in the enclave."""
        self.generation = grant.generation
        self.broken: str | None = None
        """Why the slot cannot be used any more; None while it can."""
        self.revoked: Revoked | None = None
        self.clean: bool | None = None
        """Once it is closed: whether no thread of this process is inside, or at its AEP.  The broker
        undoes a call that was left in it."""
        self.stolen = False
        """Another process resumed a call of it."""
        self._enclave = enclave
        self._busy = threading.Lock()
        self._call = ffi.new(_CALL)
        self._capacity = 0
        self._out: Any = None
        args = ffi.new(_ARGS)
        args.index = grant.slot
        args.tcs_offset = grant.tcs
        args.generation = grant.generation
        ffi.memmove(args.key, grant.key, 16)
        ffi.memmove(args.bind, grant.bind, 88)
        handle = ffi.new(_SLOT)
        diag = new_diag()
        error = _slot_open(enclave._handle(), args, handle, diag)
        ffi.memmove(args.key, bytes(16), 16)
        if error:
            raise native_error(error, diag, f"{enclave.name}: opening slot {self.index}")
        self._handle: Any = handle[0]

    def __repr__(self) -> str:
        """Say which slot of which enclave."""
        return f"<Slot {self.index} of {self._enclave.name}{', ' + self.broken if self.broken else ''}>"

    def lend(self, name: str, fd: int) -> None:
        """Have calls do what the enclave asks of its file `name` with `fd`, which is this slot's by now."""
        error = lib.teemate_slot_lend(self._handle, name.encode(), fd)
        if error:
            raise native_error(error, new_diag(), f"{self._enclave.name}: lending slot {self.index} {name!r}")

    # ---- calls ----------------------------------------------------------------------

    def call(
        self,
        name: str,
        payload: bytes | bytearray | memoryview = b"",
        timeout: float | None = None,
        *,
        ocalls: Mapping[str, OcallHandler] | None = None,
        max_reply: int = MAX_REPLY,
    ) -> bytes:
        """Do the ECALL `name` with `payload` and return its answer.

        Parameters
        ----------
        timeout
            Seconds; the resolution is some milliseconds.  None: no limit.
        ocalls
            Handlers for OCALLs of this call by name, before ``enclave.ocalls``.  They run in this thread.
        max_reply
            Bytes that the answer may have.

        Raises
        ------
        CallTimeout
            The call was given up; the slot is out of use.
        CallFailed
            The enclave answered with a status of its own.
        EnclaveFault
            The enclave's code failed; the slot is out of use.
        Revoked, EnclaveLost, NotAttached
            The slot, the enclave or the grant is gone.
        NotFound
            The image has no ECALL of that name.
        Busy
            Another thread has this slot; or a lock inside was not free within its patience: ``detail`` has
            its ``holder``, a slot.
        LimitReached
            The answer has more than `max_reply` bytes (``detail`` has how many are ``needed``), or the
            enclave's heap is full.
        Denied
            The enclave does not accept the slot's identity: release it, and acquire another.
        BaseException
            What a signal handler or an OCALL handler raised; the slot is out of use.

        """
        return self._run(name, payload, timeout, ocalls, max_reply, None)

    def _run(
        self,
        name: str,
        payload: bytes | bytearray | memoryview,
        timeout: float | None,
        ocalls: Mapping[str, OcallHandler] | None,
        max_reply: int,
        check: Check | None,
    ) -> bytes:
        if not self._busy.acquire(False):
            raise self._in_use()
        enclave = self._enclave
        try:
            # What most calls do not need is not asked for: a child of fork is told by the C library.
            if enclave.gone is None and self.revoked is None and self.broken is None:
                handle = self._handle
            else:
                handle = self._usable()
            deadline = None if timeout is None else _MONOTONIC() + timeout
            # Both have to stay where they are until the call is over.
            data = payload if type(payload) is bytes else bytes(payload)
            encoded = name.encode()
            if self._capacity < max_reply:
                self._out = _new_buffer(_BYTES, max_reply)
                self._capacity = max_reply
            call = self._call
            call.outcome = _DONE
            failed: Exception | None = None
            pause = PAUSE_NS if timeout is None or timeout > 0.02 else max(1, int(timeout * 1e9))
            try:
                error = _slot_call(
                    handle, encoded, len(encoded), data, len(data), self._out, max_reply, pause, call
                )
                while not error and call.outcome != _DONE:
                    outcome = call.outcome
                    if outcome == _PAUSED:
                        pause = self._go_on(name, deadline, check)
                        error = _slot_resume(handle, pause, call)
                    elif outcome == _OCALL:
                        status, answer = -2, b""  # TM_E_UNKNOWN: no handler of that name
                        handler, request = self._ocall(ocalls)
                        if handler is not None:
                            try:
                                status, answer = 0, _fitting(handler(request))
                            except Exception as reason:
                                status, failed = -10, failed or reason  # TM_E_OCALL
                        error = _slot_answer(handle, status, answer, len(answer), PAUSE_NS, call)
                    else:
                        break
            except BaseException as reason:
                self._abandon(name, reason)
                raise
            if not error and call.outcome != _DONE:
                raise self._ended(name)
            if error:
                raise self._refused(error, f"call {name!r}")
            enclave._called()
            if failed is not None:
                raise failed
            length = call.out_length
            if not length and not call.status:
                return b""
            reply = bytes(ffi.buffer(self._out, min(length, max_reply)))
            if call.status:
                raise status_error(call.status, enclave.name, name, length, reply)
            return reply
        finally:
            self._busy.release()

    def enter(
        self, rdi: int = 0, rsi: int = 0, rdx: int = 0, r8: int = 0, r9: int = 0, timeout: float | None = None
    ) -> Exit:
        """Enter once with these registers, with the vDSO's contract, and return those at EEXIT.

        For images with an entry of their own; R12:R13 carry the slot's key.  Fails as
        :meth:`call` does; arriving at the landing page raises :class:`Revoked`.
        """
        return self._enter(rdi, rsi, rdx, r8, r9, timeout, None)

    def _enter(
        self,
        rdi: int,
        rsi: int,
        rdx: int,
        r8: int,
        r9: int,
        timeout: float | None,
        check: Check | None,
    ) -> Exit:
        if not self._busy.acquire(blocking=False):
            raise self._in_use()
        try:
            handle = self._usable()
            deadline = None if timeout is None else _MONOTONIC() + timeout
            regs = ffi.new("struct teemate_regs *")
            regs.rdi, regs.rsi, regs.rdx, regs.r8, regs.r9 = rdi, rsi, rdx, r8, r9
            call = self._call
            call.outcome = _DONE
            pause = PAUSE_NS if timeout is None or timeout > 0.02 else max(1, int(timeout * 1e9))
            function = _EENTER
            try:
                run = ffi.addressof(call, "run")
                while True:
                    outcome = lib.teemate_slot_enter(handle, regs, function, pause, run)
                    if outcome != lib.TEEMATE_PAUSED:
                        break
                    call.outcome = _PAUSED
                    pause = self._go_on("enter", deadline, check)
                    # Paused before EENTER had begun, the same entry is made again.
                    function = _EENTER if run.function == _EENTER else _ERESUME
            except BaseException as reason:
                self._abandon("enter", reason)
                raise
            call.outcome = _DONE
            if outcome < 0:
                raise self._refused(outcome, "a raw entry")
            if outcome != _LEFT:
                call.outcome = _REVOKED
                raise self._ended("enter")
            if call.run.function != _EEXIT:
                vector = run.exception_vector
                gone = vector == _MEMORY_ERROR or (run.function == _EENTER and vector == _PAGE_FAULT)
                call.outcome = _LOST if gone else _FAULT
                raise self._ended("enter")
            self._enclave._called()
            return Exit(regs.rdi, regs.rsi, regs.rdx, regs.r8, regs.r9, call.run.function)
        finally:
            self._busy.release()

    # ---- between two entries ------------------------------------------------------------

    def _in_use(self) -> Error:
        """Return why this thread cannot have the slot: it is being closed, or another thread has it."""
        gone = self._enclave.gone or self.revoked
        return gone or Busy(f"slot {self.index} is used by another thread: take one slot for each thread")

    def _usable(self) -> Any:
        enclave = self._enclave
        if enclave.pid != enclave.getpid():
            raise NotAttached(FORKED)
        if enclave.gone is not None:
            raise enclave.gone
        if self.revoked is not None:
            raise self.revoked
        if self.broken is not None:
            raise NotAttached(
                f"{enclave.name}: slot {self.index} is out of use: {self.broken}: "
                "take one with enclave.slot()"
            )
        return self._handle

    def _go_on(self, name: str, deadline: float | None, check: Check | None) -> int:
        """Decide at a pause whether to go on, and for how long; signal handlers have had their turn."""
        enclave = self._enclave
        enclave._pauses += 1
        enclave._hear()
        if check is not None:
            check()
        now = _MONOTONIC()
        if now >= enclave.patience:
            gone = enclave.gone or self.revoked
            if gone is not None:
                raise gone
        if deadline is None:
            return PAUSE_NS
        if now >= deadline:
            raise CallTimeout(
                f"{enclave.name}: call {name!r} took longer than its timeout and was given up; "
                f"slot {self.index} is out of use",
                {"call": name, "slot": self.index},
            )
        return min(PAUSE_NS, max(1, int((deadline - now) * 1e9)))

    def _ocall(self, ocalls: Mapping[str, OcallHandler] | None) -> tuple[OcallHandler | None, bytes]:
        call = self._call
        self._enclave._ocalls += 1
        self._enclave._hear()  # the handler may take long
        name = ffi.unpack(call.ocall_name, call.ocall_name_length).decode(errors="replace")
        handler = (ocalls or {}).get(name) or self._enclave.ocalls.get(name)
        return handler, bytes(ffi.buffer(call.ocall_data, call.ocall_length))

    def _ended(self, name: str) -> Exception:
        """Return the error for a call that the enclave did not finish, and put the slot out of use."""
        enclave = self._enclave
        outcome = self._call.outcome
        if outcome == _FAULT:
            self.broken = f"a fault in call {name!r}"
            run = self._call.run
            lib.teemate_slot_abandon(self._handle)
            place = None if run.function == _EENTER else enclave._place(self)
            return describe_fault(run, enclave.name, f"call {name!r}", enclave.base, enclave.size, place)
        if outcome == _STOLEN:
            self.broken = f"call {name!r} was resumed by another process"
            self.stolen = True
            lib.teemate_slot_abandon(self._handle)
            return EnclaveFault(
                f"{enclave.name}: another process that maps the enclave resumed call {name!r} of slot"
                f" {self.index}, so its result is lost: see who else is attached (`teemate status`)",
                {"call": name, "slot": self.index, "stolen": True},
            )
        if outcome == _REVOKED:
            self.broken = "its key was refused"
            self.revoked = Revoked(
                f"{enclave.name}: the enclave refused the key of slot {self.index}: it was revoked; "
                "attach again if the policy still allows it",
                {"slot": self.index},
            )
            return self.revoked
        return self._gone()

    def _gone(self) -> EnclaveLost:
        """Return the error for an enclave whose memory is not there any more, and put it out of use."""
        enclave = self._enclave
        self.broken = "the enclave is gone"
        enclave._mark_lost()
        return EnclaveLost(
            f"{enclave.name}: the enclave is gone (host suspended, memory error, or destroyed): "
            "attach to its next generation",
            {"slot": self.index},
        )

    def _refused(self, error: int, doing: str) -> Error:
        if error == -errno.ENODEV:  # a private enclave that could not be told the time
            return self._gone()
        diag = None
        if error == -errno.EUCLEAN:
            diag = new_diag()
            lib.teemate_signals_check(0, diag)
        return native_error(error, diag, f"{self._enclave.name}: {doing} in slot {self.index}")

    def _abandon(self, name: str, reason: BaseException) -> None:
        if self._call.outcome in (_PAUSED, _OCALL):
            self._enclave._abandoned += 1
            lib.teemate_slot_abandon(self._handle)
            if self.broken is None:
                self.broken = f"call {name!r} was abandoned ({type(reason).__name__})"

    def _close(self) -> bool | None:
        """Forget the key and unmap the TCS.  None: a thread is inside; else `clean`."""
        if not self._busy.acquire(blocking=False):
            return None
        try:
            if self._handle is not None:
                result = _slot_close(self._handle)
                if result < 0:
                    return None
                self._handle = None
                # Who is in a call holds the slot; after a fork the parent's thread may be.
                self.clean = self._enclave.pid == self._enclave.getpid()
                if self.broken is None:
                    self.broken = "it was given back"
            return self.clean
        finally:
            self._busy.release()
