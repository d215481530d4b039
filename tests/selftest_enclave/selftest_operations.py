"""The operations of the selftest enclave (enum encl_op_type of its defines.h) through ``slot.enter``."""

from __future__ import annotations

import ctypes
from enum import IntEnum

from teemate import Slot


class Operation(IntEnum):
    """What the enclave does; the numbers after it are in the order of the selftests' structures."""

    PUT_TO_BUFFER = 0
    GET_FROM_BUFFER = 1
    PUT_TO_ADDRESS = 2
    GET_FROM_ADDRESS = 3
    NOP = 4
    EACCEPT = 5
    EMODPE = 6


class Operations:
    """Enter with RDI = the address of an operation in this process's memory."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def _do(self, operation: Operation, *numbers: int) -> list[int]:
        request = (ctypes.c_uint64 * 4)(operation, *numbers)
        left = self._slot.enter(rdi=ctypes.addressof(request))
        assert left.function == 4  # EEXIT
        # The enclave clears what the ABI lets it change before it leaves.
        assert (left.rdi, left.rsi, left.rdx, left.r8, left.r9) == (0, 0, 0, 0, 0)
        return list(request)[1:]

    def put_buffer(self, value: int) -> None:
        """Write to the enclave's buffer."""
        self._do(Operation.PUT_TO_BUFFER, value)

    def get_buffer(self) -> int:
        """Read its buffer."""
        return self._do(Operation.GET_FROM_BUFFER)[0]

    def put(self, address: int, value: int) -> None:
        """Write to an address in the enclave."""
        self._do(Operation.PUT_TO_ADDRESS, value, address)

    def get(self, address: int) -> int:
        """Read an address in the enclave."""
        return self._do(Operation.GET_FROM_ADDRESS, 0, address)[0]

    def nop(self) -> None:
        """Go in and out."""
        self._do(Operation.NOP)

    def accept(self, address: int, flags: int) -> int:
        """EACCEPT with these SECINFO flags; returns its error code."""
        return self._do(Operation.EACCEPT, address, flags, 0xDEAD)[2]

    def extend(self, address: int, flags: int) -> None:
        """EMODPE with these SECINFO flags."""
        self._do(Operation.EMODPE, address, flags)
