"""The keys of one enclave, and what is signed with them.

The formats are those of ``native/include/teemate_abi.h``.  The control key opens control ECALLs; the
warden gets it.  MACs use a key derived from it, which never leaves the broker.  Slot keys are drawn
here as well, one per assignment, so no control ECALL ever returns a secret.
"""

from __future__ import annotations

import enum
import hmac
import secrets
import struct
import time
from dataclasses import dataclass, field
from typing import final

__all__ = [
    "BIND_SIZE",
    "CONTROL_SIZE",
    "ControlKey",
    "ControlOp",
    "ControlResult",
    "Lent",
    "SlotKey",
    "SlotWord",
]

BIND_SIZE = 88
CONTROL_SIZE = 352
RESULT_SIZE = 512
_LABEL_SIZE = 16
_MACKEY_LABEL = b"teemate mac key".ljust(_LABEL_SIZE, b"\0")
_BIND_LABEL = b"teemate bind".ljust(_LABEL_SIZE, b"\0")
_CONTROL_LABEL = b"teemate control".ljust(_LABEL_SIZE, b"\0")
_DATA_SIZE = 256
_HEAD = struct.Struct("<IIQQQ16sQ")  # struct tm_control up to `sequence`: what the MAC covers, with data
_BIND = struct.Struct("<QQ32sIIQ")  # slot, generation, struct tm_identity
_RESULT = struct.Struct("<8Q448s")

assert _HEAD.size == 56
assert _RESULT.size == RESULT_SIZE


class ControlOp(enum.IntEnum):
    """enum tm_control_op, as far as the broker asks for it."""

    ARM = 2
    CLEAR = 3
    PROBE = 4
    RESET = 5
    SSA = 6
    AUTHOR = 10
    LENT = 13


_NO_MAC = {ControlOp.PROBE, ControlOp.SSA}


class SlotWord(enum.IntEnum):
    """enum tm_slot_state: what the enclave itself says of a slot."""

    FREE = 0
    ARMED = 1
    INSIDE = 2
    PARKED = 3
    UNKNOWN = 0x7F
    """None of those: on the sim anybody who maps the enclave can write there."""

    @classmethod
    def of(cls, word: int) -> SlotWord:
        """Return the state in a slot word; TM_SLOT_CLEARED (0x80) says that its key is gone already."""
        return cls(word & 0x7F)

    @classmethod
    def _missing_(cls, value: object) -> SlotWord:
        return cls.UNKNOWN


class Lent(enum.IntEnum):
    """enum tm_lent: what an enclave's code lends a slot of a file."""

    NOT = 0
    READ = 1
    WRITE = 2


@final
@dataclass(frozen=True, slots=True)
class SlotKey:
    """What opens a slot's gate for one assignment."""

    generation: int
    key: bytes = field(repr=False)


@final
@dataclass(frozen=True, slots=True)
class ControlResult:
    """struct tm_control_result."""

    cssa: int
    word: int
    calls: int
    exitinfo: int
    rip: int
    maddr: int
    abi_version: int
    length: int
    data: bytes

    @property
    def generation(self) -> int:
        """The generation in the slot word (TM_WORD_GENERATION)."""
        return self.word >> 8

    @classmethod
    def parse(cls, raw: bytes) -> ControlResult:
        """Return what the warden passed on."""
        return cls(*_RESULT.unpack(raw))


@final
class ControlKey:
    """The control key of one enclave and the MACs made with it."""

    __slots__ = ("_key", "_mac_key", "_sequence")

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key or secrets.token_bytes(16)
        self._mac_key = hmac.digest(self._key, _MACKEY_LABEL, "sha256")
        self._sequence = 0

    def __repr__(self) -> str:
        return "<ControlKey>"

    def for_warden(self) -> bytes:
        """Return the key itself: only the first message to a warden may carry it."""
        return self._key

    def mac_key(self) -> bytes:
        """Return what MACs are made with: for the attendant, which binds slots to who gets them."""
        return self._mac_key

    def new_slot_key(self, generation: int) -> SlotKey:
        """Draw a slot key for `generation`."""
        return SlotKey(generation, secrets.token_bytes(16))

    def bind(self, slot: int, generation: int, principal: bytes, uid: int, gid: int, grant: int) -> bytes:
        """Return struct tm_bind: who uses this generation of the slot, and the MAC that proves it."""
        covered = _BIND.pack(slot, generation, principal, uid, gid, grant)
        return covered[8:] + hmac.digest(self._mac_key, _BIND_LABEL + covered, "sha256")

    def control(
        self,
        op: ControlOp,
        slot: int,
        *,
        generation: int = 0,
        argument: int = 0,
        key: bytes = bytes(16),
        data: bytes = b"",
    ) -> bytes:
        """Return struct tm_control, signed when `op` wants it.

        Each has a larger sequence number than all before, so that none can be replayed; the clock
        makes that true after a restart of the broker as well.
        """
        data = data.ljust(_DATA_SIZE, b"\0")
        if op in _NO_MAC:
            return _HEAD.pack(op, 0, slot, generation, argument, key, 0) + bytes(40) + data
        self._sequence = max(self._sequence + 1, time.monotonic_ns())
        head = _HEAD.pack(op, 0, slot, generation, argument, key, self._sequence)
        mac = hmac.digest(self._mac_key, _CONTROL_LABEL + head + data, "sha256")
        return head + bytes(8) + mac + data
