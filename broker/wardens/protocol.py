"""The messages between the broker and a warden: ``native/warden/protocol.h`` in Python."""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from teemate.broker.enclaves.control import CONTROL_SIZE, RESULT_SIZE, ControlResult

__all__ = [
    "REPLY_SIZE",
    "RenewStep",
    "WardenOp",
    "WardenReply",
    "renew_body",
    "repair_body",
    "request",
    "start_body",
]

VERSION = 1
SEGMENTS = 128
_HEAD = struct.Struct("<IIQ")
_START = struct.Struct("<QQII16s")
_SEGMENT = struct.Struct("<QQII")
_REPAIR = struct.Struct("<QQII")
_RENEW_TAIL = struct.Struct("<II")
_BODY_SIZE = _START.size + SEGMENTS * _SEGMENT.size
_REPLY = struct.Struct(f"<QiIIIII{RESULT_SIZE}s128s")
REPLY_SIZE = _REPLY.size

assert _START.size == 40
assert REPLY_SIZE == 32 + 512 + 128


class WardenOp(enum.IntEnum):
    """enum warden_op."""

    START = 1
    CONTROL = 2
    PROBE = 3
    REPAIR = 4
    PING = 5
    RENEW = 6


class RenewStep(enum.IntEnum):
    """enum warden_step: what the reply of a RENEW is about."""

    NONE = 0
    """It did not come to the first, or was no RENEW."""
    CLEAR = 1
    REPAIR = 2
    RESET = 3
    ARM = 4


@final
@dataclass(frozen=True, slots=True)
class WardenReply:
    """struct warden_reply: `status` is the enclave's when `entered`, else a negative errno."""

    id: int
    status: int
    entered: bool
    vector: int | None
    repaired: int
    contended: int
    result: ControlResult
    text: str
    step: RenewStep = RenewStep.NONE

    @classmethod
    def parse(cls, raw: bytes) -> WardenReply:
        """Return what a warden answered.

        Raises
        ------
        ValueError
            It has the wrong length, or a step that there is not.

        """
        if len(raw) != REPLY_SIZE:
            raise ValueError(f"a warden's reply has {REPLY_SIZE} bytes, not {len(raw)}")
        number, status, entered, vector, repaired, contended, step, result, text = _REPLY.unpack(raw)
        return cls(
            id=number,
            status=status,
            entered=bool(entered),
            vector=vector - 1 if vector else None,
            repaired=repaired,
            contended=contended,
            result=ControlResult.parse(result),
            text=text.split(b"\0", 1)[0].decode("utf-8", "replace"),
            step=RenewStep(step),
        )


def request(op: WardenOp, number: int, body: bytes = b"") -> bytes:
    """Return struct warden_request."""
    return _HEAD.pack(VERSION, op, number) + body.ljust(_BODY_SIZE, b"\0")


def start_body(
    base: int, size: int, backend: int, control_key: bytes, segments: Sequence[tuple[int, int, int, int]]
) -> bytes:
    """Return the body of START.

    Raises
    ------
    ValueError
        More segments than the message has room for.

    """
    if len(segments) > SEGMENTS:
        raise ValueError(f"{len(segments)} segments; a warden takes {SEGMENTS}")
    head = _START.pack(base, size, backend, len(segments), control_key)
    return head + b"".join(_SEGMENT.pack(*segment) for segment in segments)


def repair_body(slot: int, generation: int, *, holder_dead: bool) -> bytes:
    """Return the body of REPAIR."""
    return _REPAIR.pack(slot, generation, holder_dead, 0)


def renew_body(clear: bytes, reset: bytes, arm: bytes, *, holder_dead: bool) -> bytes:
    """Return the body of RENEW; three struct tm_control, signed in this order."""
    return clear + reset + arm + _RENEW_TAIL.pack(holder_dead, 0)


assert 3 * CONTROL_SIZE + _RENEW_TAIL.size <= _BODY_SIZE
