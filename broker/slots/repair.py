"""Bringing one slot back to its initial state, whatever its holder left in it.

The key is taken away, the warden undoes what was interrupted there, and the enclave scrubs the slot:
its locks become owner-dead, half-done operations are completed, stacks and saved state are wiped.
Each step can be repeated, so a repair that was cut short is simply done again.
"""

from __future__ import annotations

import enum
import errno

from structlog.typing import FilteringBoundLogger

from teemate.broker.enclaves.control import ControlOp, ControlResult, SlotWord
from teemate.broker.enclaves.enclave import Enclave
from teemate.broker.slots.interruption import describe_interruption
from teemate.broker.wardens.protocol import WardenReply
from teemate.broker.wardens.warden import WardenError

__all__ = ["Repair", "UnrepairableError", "repair_slot"]


class Repair(enum.Enum):
    """How an attempt to repair a slot ended."""

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
    warden = enclave.warden
    if warden is None:
        raise UnrepairableError("the image was built without the SDK: nothing can scrub its slots")
    generation = enclave.slot_keys[index].generation
    _require(await warden.control(ControlOp.CLEAR, index, generation=generation), "clear its key")
    reply = await warden.repair(index, generation, holder_dead=holder_dead)
    if not reply.entered and reply.status == -errno.EBUSY:
        return Repair.BUSY
    _require(reply, "undo what was interrupted in it")
    await _report(enclave, index, generation, reply.result, log)
    _require(await warden.control(ControlOp.RESET, index), "reset it")
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


def _require(reply: WardenReply, what: str) -> None:
    if reply.entered and reply.status != 0:
        raise UnrepairableError(f"the enclave answered {reply.status} when asked to {what}")
    if reply.status != 0:
        raise UnrepairableError(
            f"the warden could not {what}: {reply.text or errno.errorcode.get(-reply.status, reply.status)}"
        )
