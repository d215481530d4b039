"""An enclave that the broker shares with this process: a grant.

Slots are unmapped before the broker hears that they are released, and it hears whether they
are `clean`; it relies on that when it hands them to somebody else.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from teemate._connection import Check
from teemate._enclave import Enclave
from teemate._slot import Slot
from teemate._types import EnclaveInfo, SlotGrant
from teemate.errors import Busy, Error, Revoked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from teemate._connection import Connection

__all__ = ["GrantedEnclave"]

WAIT = 10.0


class GrantedEnclave(Enclave):
    """An alias mapping of a shared enclave and the slots of this grant."""

    def __init__(
        self,
        handle: Any,
        connection: Connection,
        grant: int,
        info: EnclaveInfo,
        slots: Sequence[SlotGrant],
        on_detach: Callable[[GrantedEnclave], None],
    ) -> None:
        super().__init__(
            handle,
            name=info.name,
            base=info.base,
            size=info.size,
            mrenclave=info.mrenclave,
            pages=info.pages,
            slots=slots,
        )
        self.info = info
        """What the broker said of it when it was attached."""
        self.grant = grant
        """The grant's number, as administrators see it."""
        self.draining = False
        """Whether the broker waits for its clients to leave."""
        self._connection = connection
        self._on_detach = on_detach
        self._listening = False

    def acquire(self, count: int = 1, wait: float = WAIT) -> None:
        """Get `count` more slots for this grant, waiting up to `wait` seconds for them.

        Raises :class:`Busy` when none got free in time, :class:`LimitReached` when the policy
        allows no more.
        """
        self._acquire(count, wait, None)

    def _acquire(self, count: int, wait: float, check: Check | None) -> None:
        self.check_here()
        reply = self._connection.request(
            "slots.acquire",
            {"grant": self.grant, "count": count, "wait": wait},
            wait=wait,
            undo=self._undo_acquire,
            check=check,
        )
        slots = [SlotGrant.parse(slot) for slot in reply.ok["slots"]]
        with self._wake:
            self._unopened.extend(slots)
            self._wake.notify_all()

    def _undo_acquire(self, ok: dict[str, Any]) -> None:
        slots = [slot["slot"] for slot in ok["slots"]]
        self._connection.post("slots.release", {"grant": self.grant, "slots": slots, "clean": True})

    def release(self, count: int = 1) -> None:
        """Give `count` free slots of this grant back to the broker.

        Raises :class:`Busy` when fewer are free.
        """
        self._release(count, None)

    def _release(self, count: int, check: Check | None) -> None:
        self.check_here()
        with self._wake:
            free = len(self._unopened) + len(self._free)
            if free < count:
                raise Busy(f"{self.name}: {count} slots to release, but only {free} of this grant are free")
            never_opened = [self._unopened.pop() for _ in range(min(count, len(self._unopened)))]
            opened = [self._free.pop() for _ in range(count - len(never_opened))]
        results = [slot._close() for slot in opened]
        numbers = [slot.slot for slot in never_opened] + [slot.index for slot in opened]
        if numbers:
            self._connection.request(
                "slots.release", {"grant": self.grant, "slots": numbers, "clean": all(results)}, check=check
            )

    # ---- hooks of Enclave --------------------------------------------------------------

    def _called(self) -> None:
        self._calls += 1
        if not self._listening:
            # From here on a revocation is heard even when the program makes no requests; not
            # earlier, since a cold attach has no thread to spare.
            self._listening = True
            self._connection.listen()

    def _slot_closed(self, slot: Slot, clean: bool) -> None:
        if slot.revoked is not None or self._connection.lost:
            return
        # Waits for the answer, so that the slot is where it belongs when the caller goes on; what
        # the caller has to hear is why the slot broke, not that its grant ended meanwhile.
        with contextlib.suppress(Error):
            self._connection.request(
                "slots.release", {"grant": self.grant, "slots": [slot.index], "clean": clean}
            )

    def _detached(self, clean: bool) -> None:
        connection = self._connection
        self._on_detach(self)
        if connection.lost:
            return
        try:
            connection.request("detach", {"grant": self.grant, "clean": clean})
        except Error:
            # The grant is gone already, or its broker: that is what was asked for.
            if not connection.lost:
                connection.check_process()

    # ---- events, in the thread that reads the socket ------------------------------------

    def revoked(self, slots: Sequence[int], deadline: float) -> None:
        """Close the slots that the broker takes back, and acknowledge.

        Calls that are inside get half of `deadline` seconds to end by themselves.
        """
        numbers = set(slots)
        with self._wake:
            mine = [*self._free, *self._taken]
            taken = [slot for slot in mine if slot.index in numbers]
            self._unopened = deque(slot for slot in self._unopened if slot.slot not in numbers)
            self._free = [slot for slot in self._free if slot.index not in numbers]
            self.patience = time.monotonic() + deadline / 2
            error = Revoked(
                f"{self.name}: the broker took the grant back: attach again if the policy still allows it",
                {"grant": self.grant, "slots": sorted(numbers)},
            )
            if not self._unopened and len(taken) == len(mine):
                self.gone = error
            for slot in taken:
                slot.revoked = error
            self._wake.notify_all()
        end = self.patience + 1.0
        while any(slot._close() is None for slot in taken) and time.monotonic() < end:
            with self._wake:
                self._wake.wait(0.02)
        clean = all(slot.clean for slot in taken)
        if numbers:
            self._connection.post(
                "slots.release", {"grant": self.grant, "slots": sorted(numbers), "clean": clean}
            )

    def lost(self) -> None:
        """Hear that the enclave is gone."""
        with self._wake:
            self._mark_lost()
            self._wake.notify_all()
