"""Handing an enclave's state to the one that takes its place, sealed, through both wardens.

The images do it: ``native/enclaves/vault/handover.c`` has the control ECALLs and what they promise.  Here
only sealed pages go from the one to the other; neither warden nor broker can read or change them, or
give the new enclave those of an earlier hand-over.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import trio

from teemate import errors
from teemate.broker.enclaves.control import ControlOp
from teemate.broker.wardens.warden import WardenError

if TYPE_CHECKING:
    from teemate.broker.enclaves.enclave import Enclave

__all__ = ["HandedOver", "hand_over"]

_NAME_SIZE = 64
_INPUT_SIZE = 192
_PIECE = _INPUT_SIZE - 16
_UNKNOWN = -2  # TM_E_UNKNOWN: the image has no such control ECALL
_BUSY = -8  # TM_E_BUSY: somebody holds a lock
_TRIES = 100
_PAUSE = 0.05
_LARGEST_PAGE = 64 << 20


@final
@dataclass(frozen=True, slots=True)
class HandedOver:
    """How much the new enclave has of the old one's: entries, and bytes that were sealed."""

    entries: int
    bytes: int


async def hand_over(old: Enclave, new: Enclave) -> HandedOver:
    """Have `new` take over all that `old` keeps; nobody may be in either.

    Raises
    ------
    Unsupported
        One of the images has no hand-over.
    ImageError
        They are not of the same signer and product, or the new one has no room.
    WardenError
        A warden failed twice.

    """
    nonce = await _ask(new, "handover_begin")
    entries = size = page = cursor = 0
    while True:
        sealed = await _ask(old, "handover_seal", nonce + struct.pack("<QQ", page, cursor))
        length, cursor = struct.unpack("<QQ", sealed)
        if not 0 < length <= _LARGEST_PAGE:
            raise errors.ImageError(f"enclave {old.name!r} wants to hand over {length} bytes at once")
        await _ask(new, "handover_room", struct.pack("<QQ", page, length))
        await _copy(old, new, length)
        count = await _ask(new, "handover_open", struct.pack("<QQ", page, cursor == 0))
        entries += int.from_bytes(count, "little")
        size += length
        page += 1
        if not cursor:
            return HandedOver(entries, size)


async def _copy(old: Enclave, new: Enclave, length: int) -> None:
    offset = 0
    while offset < length:
        piece = await _ask(old, "handover_read", struct.pack("<Q", offset))
        if not piece:
            raise errors.ImageError(f"enclave {old.name!r} hands nothing over at {offset} of {length}")
        for start in range(0, len(piece), _PIECE):
            part = piece[start : start + _PIECE]
            await _ask(new, "handover_write", struct.pack("<QQ", offset + start, len(part)) + part)
        offset += len(piece)


async def _ask(enclave: Enclave, name: str, data: bytes = b"") -> bytes:
    """One control ECALL of the image's author; a lock that is held is waited for."""
    if enclave.warden is None:
        raise errors.Unsupported(f"the image of {enclave.name!r} is without the SDK: it has no hand-over")
    request = name.encode().ljust(_NAME_SIZE, b"\0") + data
    for _ in range(_TRIES):
        reply = await enclave.warden.control(ControlOp.AUTHOR, data=request)
        if reply.status == 0:
            return reply.result.data[: reply.result.length]
        if reply.status == _UNKNOWN:
            raise errors.Unsupported(f"the image of {enclave.name!r} has no control ECALL {name!r}")
        if reply.status != _BUSY:
            raise errors.ImageError(
                f"{name} of enclave {enclave.name!r} (generation {enclave.generation}) failed with status"
                f" {reply.status}: are both images of the same signer and product, and is there room?",
                {"status": reply.status},
            )
        await trio.sleep(_PAUSE)
    raise WardenError(f"{name} of enclave {enclave.name!r}: a lock was held for {_TRIES * _PAUSE:g} s")
