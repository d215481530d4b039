"""What interrupted a slot, for the log: the exception, and where the author has to look."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import trio

from teemate._faults import vector_name
from teemate._private import locate

if TYPE_CHECKING:
    from teemate.broker.enclaves.control import ControlResult
    from teemate.broker.enclaves.enclave import Enclave

__all__ = ["describe_interruption"]

_EXITINFO_VALID = 1 << 31  # SDM volume 3D, EXITINFO


async def describe_interruption(enclave: Enclave, found: ControlResult) -> str:
    """Return " by #DE (divide error) at divide (faults.c:41)", as much of it as is known, or "".

    The enclave tells the vector always and the instruction on the sim and in debug images; function
    and line come from the ELF beside the image, where there is one.  `found` is of the last frame,
    the one that counts: those below are of calls that were interrupted before.
    """
    told = ""
    if found.exitinfo & _EXITINFO_VALID:
        told = f" by {vector_name(found.exitinfo & 0xFF)}"
    if not 0 < found.rip < enclave.built.size:
        return told
    elf = _elf_of(enclave)
    place = await trio.to_thread.run_sync(locate, elf, found.rip) if elf is not None else ""
    return f"{told} at {place or f'base + {found.rip:#x}'}"


def _elf_of(enclave: Enclave) -> Path | None:
    image = enclave.policy.image
    elf = image.with_suffix(".elf") if image is not None else None
    return elf if elf is not None and elf.is_file() else None
