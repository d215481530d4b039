"""An enclave that this process has mapped, and its pool of slots.

What private enclaves and granted ones have in common; where slots come from and go to is
the business of ``_private.py`` and ``_grant.py``.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from teemate._faults import FORKED, native_error, new_diag
from teemate._native import ffi, lib
from teemate._slot import Check, OcallHandler, Slot
from teemate._types import EnclaveStatistics, SlotGrant
from teemate.errors import Busy, EnclaveLost, Error, NotAttached

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Enclave", "SlotLease"]

_ENCLAVE = ffi.typeof("struct teemate_enclave **")
_map = lib.teemate_map
SLOT_WAIT = 10.0
LEAVE_WAIT = 1.0
"""Seconds that calls in other threads get to end when the enclave is detached."""
_SLICE = 0.05


class SlotLease:
    """Takes a free slot on entering and gives it back on leaving."""

    def __init__(self, enclave: Enclave, wait: float) -> None:
        self._enclave = enclave
        self._wait = wait
        self._slot: Slot | None = None

    def __enter__(self) -> Slot:
        """Take a free slot, waiting for one if all are in use."""
        self._slot = self._enclave._take(self._wait, None)
        return self._slot

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the slot back; one that is out of use is closed."""
        slot, self._slot = self._slot, None
        if slot is not None:
            self._enclave._give_back(slot)


class Enclave:
    """An enclave mapped into this process.  Thread safe; use it as a context manager."""

    def __init__(
        self,
        handle: Any,
        *,
        name: str,
        base: int,
        size: int,
        mrenclave: bytes,
        pages: int,
        slots: Iterable[SlotGrant],
    ) -> None:
        self.name = name
        self.base = base
        """Address, the same in every process."""
        self.size = size
        """Bytes of ELRANGE."""
        self.mrenclave = mrenclave
        self.ocalls: dict[str, OcallHandler] = {}
        """Handlers for OCALLs by name, for every call; they run in the calling thread."""
        self.gone: Error | None = None
        """What every later call raises: :class:`Revoked`, :class:`EnclaveLost` or :class:`NotAttached`."""
        self.patience = 0.0
        """Until when (monotonic) calls that are inside may still end by themselves."""
        self.getpid: Callable[[], int] = os.getpid
        self.pid = os.getpid()
        self._native: Any = handle
        self._pages_added = pages
        self._counters: Any = None
        """The page that calls are counted in, while this counts there."""
        self._wake = threading.Condition()
        self._over = False
        """Whether whoever gave the enclave knows nothing of it any more."""
        self._unopened: deque[SlotGrant] = deque(slots)
        self._free: list[Slot] = []
        self._taken: set[Slot] = set()
        self._calls = 0
        self._pauses = 0
        self._ocalls = 0
        self._abandoned = 0

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach."""
        self.detach()

    def __repr__(self) -> str:
        """Say which enclave and where."""
        return f"<{type(self).__name__} {self.name} at {self.base:#x}, {self.size} bytes>"

    def slot(self, wait: float = SLOT_WAIT) -> SlotLease:
        """Return a context manager that takes a free slot for this thread.

        Waits up to `wait` seconds for one, then raises :class:`Busy`; so it does at once when this process
        has no slot left.  :class:`Revoked`, :class:`EnclaveLost` or :class:`NotAttached` when the enclave is
        gone.
        """
        return SlotLease(self, wait)

    def statistics(self) -> EnclaveStatistics:
        """Return what was done through this object."""
        with self._wake:
            free = len(self._unopened) + len(self._free)
            return EnclaveStatistics(
                free + len(self._taken), free, self._calls, self._pauses, self._ocalls, self._abandoned
            )

    def pages(self) -> int:
        """Return the pages of 4096 bytes that the enclave takes up, however many processes map it.

        On the sim those that its memory holds now (blocks of its file).  Linux's driver tells nobody
        how much of an enclave is in the EPC and how much it has swapped out: there it is the pages
        that were added when the enclave was built, as the broker tells of one that it shares.
        """
        self.check_here()
        handle = self._handle()
        info = ffi.new("struct teemate_enclave_info *")
        error = lib.teemate_enclave_describe(handle, info)
        pages = 0
        if not error and info.backend == lib.TEEMATE_SIM:
            pages = lib.teemate_sim_pages(lib.teemate_enclave_fd(handle))
        elif not error:
            pages = self._pages_added
        if error or pages < 0:
            raise native_error(error or pages, None, f"{self.name}: counting pages")
        return int(pages)

    def detach(self) -> None:
        """Close all slots and unmap the enclave; for a private one this is its end.

        Calls of other threads get a second to end and are abandoned then; :class:`Busy` when one
        does not come back from an OCALL handler.
        """
        if os.getpid() != self.pid or self._native is None:
            return
        with self._wake:
            if self.gone is None:
                self.gone = NotAttached(f"{self.name}: this program has detached: attach again")
            self._unopened.clear()
            self.patience = time.monotonic() + LEAVE_WAIT
            while any(slot._busy.locked() for slot in self._taken):
                if time.monotonic() > self.patience + LEAVE_WAIT:
                    raise Busy(
                        f"{self.name}: a thread of this program is still in a call (in an OCALL handler?): "
                        "end it, then detach again"
                    )
                self._wake.wait(_SLICE)
        clean = self._close_slots()
        self._unmap()
        self._detached(clean)

    # ---- for the slots and for subclasses -------------------------------------------------

    def check_here(self) -> None:
        """Raise :class:`NotAttached` in a child of fork(), and what :attr:`gone` says."""
        if os.getpid() != self.pid:
            raise NotAttached(FORKED)
        if self.gone is not None:
            raise self.gone

    def _handle(self) -> Any:
        if self._native is None:
            raise NotAttached(f"{self.name}: this program has detached: attach again")
        return self._native

    def _take(self, wait: float, check: Check | None) -> Slot:
        deadline: float | None = None
        with self._wake:
            while True:
                self.check_here()
                if self._free:
                    slot = self._free.pop()
                    break
                if self._unopened:
                    slot = Slot(self, self._unopened[0])
                    self._unopened.popleft()  # not before: a failure must not lose it
                    break
                now = time.monotonic()
                if deadline is None:
                    deadline = now + wait
                count = len(self._taken)
                if not count:
                    raise Busy(
                        f"{self.name}: this process has no slot left (one that was left in a call or faulted"
                        " is out of use): acquire one, or attach again",
                        {"slots": 0, "wait": wait},
                    )
                if now >= deadline:
                    raise Busy(
                        f"{self.name}: no free slot after {wait:g} s ({count} in use by this process): "
                        "attach with more slots, or acquire one",
                        {"slots": count, "wait": wait},
                    )
                left = deadline - now
                self._wake.wait(left if check is None else min(left, _SLICE))
                if check is not None:
                    check()
            self._taken.add(slot)
            return slot

    def _give_back(self, slot: Slot) -> None:
        if os.getpid() != self.pid:
            return
        with self._wake:
            if slot.broken is None and self.gone is None:
                self._taken.discard(slot)
                self._free.append(slot)
                self._wake.notify()
                return
        open_until_now = slot.clean is None
        closed = slot._close() is not None
        with self._wake:
            # Not earlier: what is not among the taken ones is not waited for before unmapping.
            if closed:
                self._taken.discard(slot)
            self._wake.notify_all()
        if open_until_now:
            self._slot_closed(slot, bool(slot.clean))
        if self._over:
            self._unmap_when_left()

    def _close_slots(self) -> bool:
        """Close every slot that nobody is inside of; returns whether all are closed and clean."""
        with self._wake:
            slots = [*self._free, *self._taken]
            self._free.clear()
        results = [slot._close() for slot in slots]
        return all(results)

    def _end(self, error: Error, patience: float) -> None:
        """Refuse every later call with `error`, and unmap the enclave once those inside have left.

        They get `patience` seconds and are abandoned then.  Whoever gave the enclave is told nothing.
        """
        with self._wake:
            self._over = True
            if self.gone is None:
                self.gone = error
                self.patience = time.monotonic() + patience
            self._unopened.clear()
            self._wake.notify_all()
        self._unmap_when_left()

    def _unmap_when_left(self) -> None:
        with self._wake:
            slots = [*self._free, *self._taken]
        if None not in [slot._close() for slot in slots]:
            self._unmap()

    def _unmap(self) -> None:
        """Unmap the enclave, whose slots are closed; by whichever thread is the first to come here."""
        with self._wake:
            native, self._native = self._native, None
        if native is not None:
            lib.teemate_close(native)
            self._counters = None

    def _called(self) -> None:
        """Count a call that has ended."""
        self._calls += 1

    def _hear(self) -> None:
        """Have it heard at once, from here on, when whoever gave the enclave takes it back."""

    def _slot_closed(self, slot: Slot, clean: bool) -> None:
        """Tell whoever gave the slot that it will not be used any more."""

    def _detached(self, clean: bool) -> None:
        """Tell whoever gave the enclave that it is unmapped."""

    def _mark_lost(self) -> None:
        if self.gone is None:
            self.gone = EnclaveLost(f"{self.name}: the enclave is gone: attach to its next generation")

    def _place(self, slot: Slot) -> tuple[int, str] | None:
        """Return offset and description of the instruction at which `slot` was interrupted, where known."""
        return None


def map_enclave(handle: Any, name: str) -> None:
    """Map all but the TCSs of an enclave; on failure it is closed."""
    diag = new_diag()
    error = _map(handle, diag)
    if error:
        lib.teemate_close(handle)
        raise native_error(error, diag, f"mapping enclave {name!r}")


def new_handle() -> Any:
    """Return room for a ``struct teemate_enclave *``."""
    return ffi.new(_ENCLAVE)
