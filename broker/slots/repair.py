"""Bringing one slot back to its initial state, whatever its holder left in it, and on to its next key.

The key is taken away, the warden undoes what was interrupted there, and the enclave scrubs the slot:
its locks become owner-dead, half-done operations are completed, stacks and saved state are wiped.
Each step can be repeated, so a repair that was cut short is simply done again.

Nearly every slot comes back clean.  Then all steps, the arming too, are one request to the warden; what was
not clean is told, and goes on step by step.
"""

from __future__ import annotations

import enum
import errno

from structlog.typing import FilteringBoundLogger

from teemate.broker.enclaves.control import ControlOp, ControlResult, SlotKey, SlotWord
from teemate.broker.enclaves.enclave import Enclave
from teemate.broker.slots.interruption import describe_interruption
from teemate.broker.wardens.protocol import RenewStep, WardenReply
from teemate.broker.wardens.warden import Warden, WardenError

__all__ = ["Repair", "UnrepairableError", "renew_slot", "repair_slot", "require_done"]

_DOING = {
    RenewStep.CLEAR: "clear its key",
    RenewStep.REPAIR: "undo what was interrupted in it",
    RenewStep.RESET: "reset it",
    RenewStep.ARM: "take a new key",
}


class Repair(enum.Enum):
    """How an attempt to repair a slot ended."""

    ARMED = "armed"
    """Nothing of its holder was left in it, and its next key opens it."""
    REPAIRED = "repaired"
    """Nothing of its holder is left in it, and no key opens it: it can be armed."""
    BUSY = "busy"
    """A thread runs in it, or no SSA frame is left: to be tried again when the holder has left or ended."""


class UnrepairableError(WardenError):
    """Why the slot cannot be handed out again."""


async def repair_slot(
    enclave: Enclave, index: int, *, holder_dead: bool, log: FilteringBoundLogger
) -> Repair:
    """Repair one slot; `holder_dead` says that the process that held it has ended.

    Raises
    ------
    UnrepairableError
        The enclave refused a step, or there is nothing in it that could do one.
    WardenError
        Two wardens failed at the same step; EnclaveGoneError: its EPC is empty.

    """
    warden = _warden(enclave)
    generation = enclave.slot_keys[index].generation
    require_done(await warden.control(ControlOp.CLEAR, index, generation=generation), RenewStep.CLEAR)
    undone = await warden.repair(index, generation, holder_dead=holder_dead)
    return await _scrub(warden, enclave, index, undone, log)


async def renew_slot(
    enclave: Enclave, index: int, key: SlotKey, *, holder_dead: bool, log: FilteringBoundLogger
) -> Repair:
    """Repair one slot, and arm it with `key` when it was left clean; raises what :func:`repair_slot` does."""
    warden = _warden(enclave)
    generation = enclave.slot_keys[index].generation
    reply = await warden.renew(
        index, generation, key, holder_dead=holder_dead, hurry=lambda: enclave.slots.is_wanted(index)
    )
    if reply.step is RenewStep.REPAIR:
        return await _scrub(warden, enclave, index, reply, log)
    require_done(reply, reply.step)
    return Repair.ARMED


def _warden(enclave: Enclave) -> Warden:
    if enclave.warden is None:
        raise UnrepairableError("the image was built without the SDK: nothing can scrub its slots")
    return enclave.warden


async def _scrub(
    warden: Warden, enclave: Enclave, index: int, undone: WardenReply, log: FilteringBoundLogger
) -> Repair:
    """Go on where a REPAIR was answered with `undone`."""
    if not undone.entered and undone.status == -errno.EBUSY:
        return Repair.BUSY
    require_done(undone, RenewStep.REPAIR)
    await _report(enclave, index, enclave.slot_keys[index].generation, undone.result, log)
    require_done(await warden.control(ControlOp.RESET, index), RenewStep.RESET)
    return Repair.REPAIRED


async def _report(
    enclave: Enclave, index: int, generation: int, found: ControlResult, log: FilteringBoundLogger
) -> None:
    """Count what was more than clean, and say in the log what had to be undone."""
    word = SlotWord.of(found.word)
    if found.cssa:
        cause = await describe_interruption(enclave, found)
        left = f"interrupted (CSSA {found.cssa}, {word.name.lower()}){cause}"
    elif word is SlotWord.INSIDE:
        # Only ERESUME lowers CSSA, and the gate would have told that the call ended.
        log.warning(
            "slot stolen", enclave=enclave.name, slot=index, generation=generation,
            reason="somebody else resumed the call that was interrupted in it: CSSA 0, inside",
        )  # fmt: skip
        left = "stolen (CSSA 0, inside)"
    elif word is SlotWord.PARKED:
        left = "parked in an OCALL"
    else:
        return
    enclave.repaired += 1
    log.info("slot repaired", enclave=enclave.name, slot=index, generation=generation, left=left)


def require_done(reply: WardenReply, step: RenewStep) -> None:
    """Raise :class:`UnrepairableError` when `step` was not done."""
    what = _DOING[step]
    if reply.entered and reply.status != 0:
        raise UnrepairableError(f"the enclave answered {reply.status} when asked to {what}")
    if reply.status != 0:
        raise UnrepairableError(
            f"the warden could not {what}: {reply.text or errno.errorcode.get(-reply.status, reply.status)}"
        )
