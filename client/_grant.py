"""An enclave that the broker shares with this process: a grant.

Slots are unmapped before the broker hears that they are released `clean`; it relies on that when it
hands them to somebody else.  What was left in them (a call that was given up) it has repaired.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from teemate._connection import Check
from teemate._enclave import LEAVE_WAIT, Enclave
from teemate._native import lib
from teemate._slot import Slot
from teemate._types import EnclaveInfo, SlotGrant
from teemate.errors import Busy, EnclaveLost, ProtocolError, Revoked
from teemate.wire import close_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from teemate._connection import Connection
    from teemate._requests import Reply

__all__ = ["GrantedEnclave"]

WAIT = 10.0


class GrantedEnclave(Enclave):
    """An alias mapping of a shared enclave and the slots of this grant."""

    def __init__(
        self,
        handle: Any,
        connection: Connection,
        session: int,
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
        self._session = session
        self._on_detach = on_detach
        self._listening = False
        self._acknowledged: set[Slot] = set()
        """Slots that were revoked, and that the broker was told of that they are unmapped."""

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
            session=self._session,
            undo=self._undo_acquire,
            check=check,
        )
        slots = [SlotGrant.parse(slot) for slot in reply.ok["slots"]]
        with self._wake:
            if self.gone is None:
                self._unopened.extend(slots)
                self._wake.notify_all()
                return
            gone = self.gone
        # Whoever ended the grant meanwhile did not know of these.
        self._undo_acquire(reply)
        raise gone

    def _undo_acquire(self, reply: Reply) -> None:
        self._post_release([slot["slot"] for slot in reply.ok["slots"]], clean=True)

    def _post_release(self, slots: Sequence[int], *, clean: bool) -> None:
        if slots:
            args = {"grant": self.grant, "slots": sorted(slots), "clean": clean}
            self._connection.post("slots.release", args, self._session)

    def release(self, count: int = 1) -> None:
        """Give `count` free slots of this grant back to the broker.

        Raises :class:`Busy` when fewer are free.
        """
        self._release(count, None)

    def _release(self, count: int, check: Check | None) -> None:
        numbers, clean = self._close_free(count)
        if numbers:
            self._connection.request(
                "slots.release",
                {"grant": self.grant, "slots": numbers, "clean": clean},
                session=self._session,
                check=check,
            )

    def _release_untold(self, count: int) -> None:
        """Do the same without waiting for the broker, which may be away."""
        numbers, clean = self._close_free(count)
        self._post_release(numbers, clean=clean)

    def _close_free(self, count: int) -> tuple[list[int], bool]:
        """Unmap `count` free slots; returns their numbers, and whether all are clean."""
        self.check_here()
        with self._wake:
            free = len(self._unopened) + len(self._free)
            if free < count:
                raise Busy(f"{self.name}: {count} slots to release, but only {free} of this grant are free")
            never_opened = [self._unopened.pop() for _ in range(min(count, len(self._unopened)))]
            # Those that were not used for the longest time: the others are warm.
            opened = [self._free.pop(0) for _ in range(count - len(never_opened))]
        results = [slot._close() for slot in opened]
        numbers = [slot.slot for slot in never_opened] + [slot.index for slot in opened]
        return numbers, all(results)

    def open_file(self, slot: Slot, name: str, *, writable: bool) -> None:
        """Give `slot` a descriptor of the file `name`, which the enclave's code lends it.

        Where the policy has ``io = "client"``: what the code asks of that file is then done in this process.

        Raises
        ------
        NotFound
            The code does not lend it, or only to read.
        Unsupported
            The policy has no such thing.

        """
        self.check_here()
        reply = self._connection.request(
            "files.open",
            {"grant": self.grant, "slot": slot.index, "file": name, "writable": writable},
            session=self._session,
        )
        if len(reply.fds) != 1:
            close_all(reply.fds)
            raise ProtocolError(f"a reply to files.open brings 1 descriptor, this one {len(reply.fds)}")
        slot.lend(name, reply.fds[0])

    def count_in(self, page: Any) -> None:
        """Have every call counted in `page`, which the broker reads."""
        with self._wake:
            if self._native is not None:
                self._counters = page
                lib.teemate_enclave_count(self._native, page)

    # ---- hooks of Enclave --------------------------------------------------------------

    def _called(self) -> None:
        self._calls += 1
        if not self._listening:
            self._hear()

    def _hear(self) -> None:
        if not self._listening:
            # From here on a revocation is heard even when the program makes no requests: its first call
            # has ended, or it takes long.  Not earlier, since who waits for the attach reads by itself,
            # without a switch of threads.
            self._listening = True
            self._connection.listen()

    def _slot_closed(self, slot: Slot, clean: bool) -> None:
        if self._over:
            return
        if slot.revoked is not None:
            self._acknowledge([slot])
            return
        # Waits for the answer, so that the slot is where it belongs when the caller goes on; what
        # the caller has to hear is why the slot broke, not that its grant ended meanwhile.
        args: dict[str, object] = {"grant": self.grant, "slots": [slot.index], "clean": clean}
        if slot.stolen:
            args["stolen"] = True
        self._connection.tell("slots.release", args, self._session)

    def _acknowledge(self, slots: Iterable[Slot], never_opened: Iterable[int] = ()) -> None:
        """Say of the slots that were revoked which are unmapped, each once: whoever comes last closes it."""
        with self._wake:
            closed = [slot for slot in slots if slot.clean and slot not in self._acknowledged]
            self._acknowledged.update(closed)
        self._post_release([*never_opened, *(slot.index for slot in closed)], clean=True)

    def _detached(self, clean: bool) -> None:
        self._on_detach(self)
        if not self._over:
            # The grant may be gone already, or its broker: that is what was asked for.
            self._connection.tell("detach", {"grant": self.grant, "clean": clean}, self._session)

    # ---- events, in the thread that reads the socket ------------------------------------

    def revoked(self, slots: Sequence[int], deadline: float) -> None:
        """Close the slots that the broker takes back, and acknowledge those that were still here.

        Calls that are inside get half of `deadline` seconds to end by themselves.  A broker that was
        restarted may say it again.
        """
        numbers = set(slots)
        with self._wake:
            mine = [*self._free, *self._taken]
            taken = [slot for slot in mine if slot.index in numbers]
            never_opened = [slot.slot for slot in self._unopened if slot.slot in numbers]
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
        # A thread that is inside still (in an OCALL handler) says so itself when it comes back.
        self._acknowledge(taken, never_opened)

    def taken_back(self) -> None:
        """Hear that the broker ended this grant while it could not be heard."""
        error = Revoked(
            f"{self.name}: the broker ended the grant while the connection was down (it was revoked, or this "
            "process was away for too long): attach again if the policy still allows it",
            {"grant": self.grant},
        )
        self._end(error, LEAVE_WAIT)

    def forgotten(self, why: str) -> None:
        """Hear that no broker knows of this grant; what is inside goes on, since nobody gets these slots."""
        self._end(EnclaveLost(f"{self.name}: {why}", {"grant": self.grant}), math.inf)

    def lost(self) -> None:
        """Hear that the enclave is gone."""
        with self._wake:
            self._mark_lost()
            self._wake.notify_all()
