"""An enclave's TCSs and gate as the broker, its warden and its clients meet them, without any memory.

What DESIGN section 5 says and native/sdk/gate.c does: a slot word with generation, state and
"cleared", a key that opens it, and per TCS busy and CSSA.  Nothing here is shared with the broker's
own account, so that the two can disagree.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from teemate.broker.enclaves.control import ControlOp, ControlResult, SlotKey, SlotWord
from teemate.broker.enclaves.enclave import Built
from teemate.broker.wardens.protocol import RenewStep, WardenReply
from teemate.broker.wardens.warden import EnclaveGoneError, WardenError, WardenStatistics

if TYPE_CHECKING:
    from modelled_process import ModelledProcess

__all__ = ["ModelledEnclave", "ModelledSlot", "ModelledWarden"]

FIRST_SLOT = 2
NSSA = 3
CLEARED = 0x80
E_STATE = -5
EBUSY = -16


@dataclass(eq=False, repr=False)
class ModelledSlot:
    """One TCS and what the enclave keeps of it."""

    index: int
    generation: int = 0
    key: bytes = b""
    state: SlotWord = SlotWord.FREE
    cleared: bool = False
    cssa: int = 0
    runner: ModelledProcess | None = None
    """Whose thread runs inside: the TCS is busy.  It may be dead, and not buried yet."""
    inside: ModelledProcess | None = None
    """Whose call it is, running, interrupted or in an OCALL."""
    dirty: bool = False
    """Somebody was inside since the last scrubbing."""

    def __repr__(self) -> str:
        return f"<slot {self.index}>"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def word(self) -> int:
        """As struct tm_control_result has it."""
        return self.generation << 8 | self.state | (CLEARED if self.cleared else 0)

    def opens(self, key: bytes) -> bool:
        """Whether the gate would let a thread with this key in, now or when the call inside has ended."""
        return bool(self.key) and key == self.key and not self.cleared and self.state is not SlotWord.FREE

    # -- what a client's thread does -------------------------------------------------

    def enter(self, process: ModelledProcess, key: bytes) -> bool:
        """EENTER with a slot key; False when the gate or the TCS refuses."""
        if self.runner is not None or self.cssa or self.state is not SlotWord.ARMED or not self.opens(key):
            return False
        self.state, self.runner, self.inside, self.dirty = SlotWord.INSIDE, process, process, True
        return True

    def leave(self) -> None:
        """The call ends: the slot is its holder's to enter again, unless its key was taken meanwhile."""
        assert self.runner is not None
        assert self.cssa == 0
        self.runner = self.inside = None
        self.state = SlotWord.FREE if self.cleared else SlotWord.ARMED
        if self.cleared:
            self.key, self.cleared = b"", False

    def park(self) -> None:
        """The call leaves for an OCALL."""
        assert self.runner is not None
        self.runner, self.state = None, SlotWord.PARKED

    def unpark(self, process: ModelledProcess, key: bytes) -> bool:
        """The OCALL's return."""
        if self.inside is not process or not self.opens(key):
            return False
        self.runner, self.state = process, SlotWord.INSIDE
        return True

    def interrupt(self) -> None:
        """AEX."""
        self.runner = None
        self.cssa += 1

    def resume(self, process: ModelledProcess) -> None:
        """ERESUME, which no gate sees."""
        assert self.cssa
        self.cssa -= 1
        self.runner = process

    # -- what the warden does --------------------------------------------------------

    def repair(self, generation: int, *, holder_dead: bool) -> int:
        """Undo what was interrupted; what runs is only undone when it is dead (the sim's AEX of the dead)."""
        if self.runner is not None and self.runner.dead and holder_dead:
            self.interrupt()
        if self.runner is not None or (self.cssa >= NSSA and not holder_dead):
            return EBUSY
        if generation != self.generation or not (self.cleared or self.state is SlotWord.FREE):
            return E_STATE
        self.cssa, self.state, self.cleared, self.key, self.inside = 0, SlotWord.FREE, False, b"", None
        return 0

    def clear(self, generation: int) -> int:
        """Take the key of a generation away."""
        if generation != self.generation:
            return E_STATE
        if self.state in (SlotWord.FREE, SlotWord.ARMED):
            self.state, self.key = SlotWord.FREE, b""
        else:
            self.cleared = True
        return 0

    def reset(self) -> int:
        """Scrub."""
        if self.state is not SlotWord.FREE or self.cssa or self.runner is not None:
            return E_STATE
        self.dirty, self.inside = False, None
        return 0

    def arm(self, generation: int, key: bytes) -> int:
        """Give the slot its next key."""
        if self.state is not SlotWord.FREE or self.cssa or generation <= self.generation:
            return E_STATE
        assert not self.dirty, f"slot {self.index} gets a new key unscrubbed"
        self.generation, self.key, self.state, self.cleared = generation, key, SlotWord.ARMED, False
        return 0


class ModelledEnclave:
    """The TCSs of one enclave."""

    def __init__(self, count: int) -> None:
        self.slots = {index: ModelledSlot(index) for index in range(FIRST_SLOT, FIRST_SLOT + count)}

    def built(self) -> Built:
        """As the broker gets it from building; two descriptors of ours go with it."""
        count = len(self.slots)
        return Built(
            fd=os.memfd_create("modelled enclave"),
            arena=os.memfd_create("modelled arena"),
            base=1 << 46,
            size=1 << 20,
            pages=256,
            debug=False,
            sdk=True,
            isvprodid=0,
            isvsvn=0,
            mrenclave=bytes(32),
            mrsigner=bytes(32),
            segments=((0, 1 << 20, 7, 2),),
            tcs=tuple(4096 * index for index in range(FIRST_SLOT + count)),
            io_slots=0,
            client_slots=count,
        )


class ModelledWarden:
    """What :class:`teemate.broker.wardens.warden.Warden` does, on a modelled enclave, with trouble on order.

    Every request takes a turn of the scheduler, as a real one does; `hang` seconds more for the next one.
    """

    def __init__(self, enclave: ModelledEnclave) -> None:
        self._slots = enclave.slots
        self._own = ModelledSlot(0)
        self._lock = trio.Lock()
        self._requests = 0
        self.failures = 0
        """So many requests from now on fail, as when a warden and its successor both end."""
        self.steps_done = 0
        """Of a renewal that fails: so many of its steps were done before."""
        self.hang = 0.0
        self.hurried: list[bool] = []
        """Of each renewal: whether somebody waited for the slot."""
        self.gone = ""
        """Set: the EPC is empty, with this reason."""
        self.troubled: set[int] = set()
        """Slots of requests that failed: the broker may put them into quarantine."""

    async def start(self) -> None:
        """The first warden of a broker."""
        await self._turn(0)

    async def _turn(self, slot: int) -> ModelledSlot:
        async with self._lock:
            self._requests += 1
            hang, self.hang = self.hang, 0.0
            await trio.sleep(hang)
            if self.gone:
                raise EnclaveGoneError(self.gone)
            if self.failures:
                self.failures -= 1
                self.troubled.add(slot)
                raise WardenError("it ended twice")
        return self._slots.get(slot, self._own)

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
        """A control ECALL."""
        target = await self._turn(slot)
        if op is ControlOp.CLEAR:
            return _reply(target, target.clear(generation))
        if op is ControlOp.RESET:
            return _reply(target, target.reset())
        if op is ControlOp.ARM:
            return _reply(target, target.arm(generation, key))
        assert op is ControlOp.SSA, f"the model does not know {op.name}"
        return _reply(target, 0)

    async def repair(self, slot: int, generation: int, *, holder_dead: bool) -> WardenReply:
        """Undo what was interrupted in the slot, which is told as it was found."""
        target = await self._turn(slot)
        found = _result(target)
        status = target.repair(generation, holder_dead=holder_dead)
        return _reply(target, status, entered=status != EBUSY, found=found)

    async def renew(
        self,
        slot: int,
        generation: int,
        key: SlotKey,
        *,
        holder_dead: bool,
        hurry: Callable[[], bool] = lambda: False,
    ) -> WardenReply:
        """CLEAR, REPAIR, RESET and ARM, one after the other."""
        try:
            target = await self._turn(slot)
        except EnclaveGoneError:
            raise
        except WardenError:
            steps = self._renewal(self._slots[slot], generation, key, holder_dead)
            for _ in itertools.islice(steps, self.steps_done):
                pass
            raise
        self.hurried.append(hurry())
        replies = []
        for reply in self._renewal(target, generation, key, holder_dead):
            replies.append(reply)
            await self._step_done()
        return replies[-1]

    async def _step_done(self) -> None:
        """A step of a renewal, and not yet its reply."""

    @staticmethod
    def _renewal(
        slot: ModelledSlot, generation: int, key: SlotKey, holder_dead: bool
    ) -> Iterator[WardenReply]:
        """Do it step by step, and give each one's reply; the last is the renewal's."""
        status = slot.clear(generation)
        yield _reply(slot, status, step=RenewStep.CLEAR)
        if not status:
            found = _result(slot)
            status = slot.repair(generation, holder_dead=holder_dead)
            yield _reply(slot, status, entered=status != EBUSY, found=found, step=RenewStep.REPAIR)
            if status or found.cssa or found.word & 0xFF != SlotWord.FREE:
                return
            status = slot.reset()
            yield _reply(slot, status, step=RenewStep.RESET)
            if status:
                return
        elif slot.word != (key.generation << 8 | SlotWord.ARMED):
            return
        yield _reply(slot, slot.arm(key.generation, key.key), step=RenewStep.ARM)

    def lose(self) -> None:
        """The host was suspended: no key opens anything any more, and the warden's entries say why."""
        self.gone = "its EPC is empty"
        for slot in self._slots.values():
            slot.key = b""

    async def close(self) -> None:
        """The enclave is destroyed."""

    def statistics(self) -> WardenStatistics:
        """What was asked so far."""
        return WardenStatistics(pid=None, requests=self._requests, started=1, killed=0, failed=0, contended=0)


def _result(slot: ModelledSlot) -> ControlResult:
    return ControlResult(
        cssa=slot.cssa, word=slot.word, calls=0, exitinfo=0, rip=0, maddr=0, abi_version=1, length=0, data=b""
    )


def _reply(
    slot: ModelledSlot,
    status: int,
    *,
    entered: bool = True,
    found: ControlResult | None = None,
    step: RenewStep = RenewStep.NONE,
) -> WardenReply:
    return WardenReply(
        id=0, status=status, entered=entered, vector=None, repaired=0, contended=False,
        result=found or _result(slot), text="", step=step,
    )  # fmt: skip
