"""Turn what the C library reports into errors: errno and diag, faults of enclave code."""

from __future__ import annotations

import errno
import os
from typing import Any

from teemate._native import ffi, lib
from teemate.errors import (
    AddressInUse,
    Busy,
    CallFailed,
    Denied,
    EnclaveFault,
    EnclaveLost,
    Error,
    ImageError,
    InternalError,
    LimitReached,
    NotAttached,
    NotFound,
    Unsupported,
)

__all__ = ["describe_fault", "native_error", "new_diag", "status_error", "vector_name"]

# SDM volume 3A, table 6-1; those that an enclave's code can raise.
_VECTORS = {
    0: ("#DE", "divide error"),
    1: ("#DB", "debug exception"),
    3: ("#BP", "breakpoint"),
    5: ("#BR", "bound range exceeded"),
    6: ("#UD", "illegal instruction"),
    13: ("#GP", "general protection"),
    14: ("#PF", "page fault"),
    16: ("#MF", "x87 floating-point error"),
    17: ("#AC", "alignment check"),
    19: ("#XM", "SIMD floating-point exception"),
}
_EENTER = 2

_IMAGE_STEPS = frozenset(
    (
        lib.TEEMATE_STEP_READ,
        lib.TEEMATE_STEP_PARSE,
        lib.TEEMATE_STEP_SIGSTRUCT,
        lib.TEEMATE_STEP_ECREATE,
        lib.TEEMATE_STEP_EADD,
        lib.TEEMATE_STEP_EINIT,
    )
)
_STEP_NAMES = {
    lib.TEEMATE_STEP_READ: "read",
    lib.TEEMATE_STEP_PARSE: "parse",
    lib.TEEMATE_STEP_SIGSTRUCT: "sigstruct",
    lib.TEEMATE_STEP_ECREATE: "ecreate",
    lib.TEEMATE_STEP_EADD: "eadd",
    lib.TEEMATE_STEP_EINIT: "einit",
    lib.TEEMATE_STEP_MAP: "map",
    lib.TEEMATE_STEP_ENTER: "enter",
    lib.TEEMATE_STEP_CONTROL: "control",
    lib.TEEMATE_STEP_SIGNALS: "signals",
}

FORKED = (
    "this process is a child of fork(): the enclave is its parent's, and the slot keys do not come along: "
    "connect and attach here"
)


_DIAG = ffi.typeof("struct teemate_diag *")


def new_diag() -> Any:
    """Return an empty ``struct teemate_diag *``."""
    return ffi.new(_DIAG)


def native_error(error: int, diag: Any, doing: str) -> Error:
    """Return the error for a negative errno and its diag (None when the function has none)."""
    number = -error
    text = ""
    detail: dict[str, object] = {"errno": errno.errorcode.get(number, str(number))}
    step = 0
    if diag is not None and diag.step:
        step = diag.step
        text = ffi.string(diag.text).decode(errors="replace")
        detail |= {"step": _STEP_NAMES.get(step, str(step)), "offset": diag.offset, "code": diag.code}
    message = f"{doing}: {text or os.strerror(number)}"
    if number == errno.EEXIST:
        return AddressInUse(message, detail)
    if number == errno.ENOTCONN:
        return NotAttached(FORKED, detail)
    if number == errno.ESTALE and step == 0:
        return EnclaveLost(message, detail)
    if number in (errno.EBUSY, errno.EDEADLK):
        return Busy(message, detail)
    if number in (errno.EACCES, errno.EPERM) and (step in _IMAGE_STEPS or step == lib.TEEMATE_STEP_MAP):
        return Denied(message, detail)
    if number in (errno.ENODEV, errno.ENOTSUP):
        return Unsupported(message, detail)
    if number in (errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE):
        return LimitReached(message, detail)
    if step in _IMAGE_STEPS:
        return ImageError(message, detail)
    return InternalError(message, detail)


def status_error(status: int, enclave: str, name: str, length: int, reply: bytes) -> Error:
    """Return the error for a status other than 0 that a call of `name` gave (enum tm_status).

    `length`: of its output, of which `reply` is what fitted.
    """
    where = f"{enclave}: call {name!r}"
    if status > 0:
        return CallFailed(f"{where} answered status {status}: see the image's documentation", status, reply)
    detail: dict[str, object] = {"status": status, "call": name}
    if status == -2:
        return NotFound(f"{where}: the image has no ECALL of that name", detail)
    if status == -6:
        return LimitReached(f"{where}: the enclave's heap is full: build the image with more --heap", detail)
    if status == -7:
        return LimitReached(
            f"{where}: the answer has {length} bytes: give the call max_reply={length} or more",
            {**detail, "needed": length},
        )
    if status == -8:
        text = f"{where}: a lock inside the enclave was not free within its patience"
        if len(reply) == 16:  # struct tm_holder
            detail["holder"] = holder = int.from_bytes(reply[:4], "little")
            text += f" (slot {holder} has it)"
        return Busy(f"{text}: try again", detail)
    if status in (-3, -4):
        return Denied(
            f"{where}: the enclave does not accept this slot's identity (status {status}): "
            "release the slot and acquire another",
            detail,
        )
    reasons = {
        -1: "the enclave refuses an argument: a range is in the enclave, too long, or a field is wrong",
        -5: "the slot is of another generation: release it and acquire another",
        -9: "the holder of a lock died; its data may need repair",
        -10: "an OCALL of it was refused or failed",
        -11: "the enclave has not been started yet",
        -12: "a report is of another platform: the sim, another computer, or other microcode",
    }
    reason = reasons.get(status, f"status {status}")
    return CallFailed(f"{where}: {reason}", status, reply, {"call": name})


def vector_name(vector: int) -> str:
    """Return the field's name of an exception vector: ``#PF (page fault)``."""
    short, long = _VECTORS.get(vector, (f"#{vector}", "exception"))
    return f"{short} ({long})"


def describe_fault(
    run: Any, enclave: str, doing: str, base: int, size: int, place: tuple[int, str] | None
) -> EnclaveFault:
    """Return the error for an exception inside; `place`: the instruction's offset and name."""
    vector = int(run.exception_vector)
    address = int(run.exception_addr)
    detail: dict[str, object] = {
        "vector": vector,
        "name": _VECTORS.get(vector, ("", ""))[0],
        "error_code": int(run.exception_error_code),
        "address": address,
        "entered": run.function != _EENTER,
    }
    text = f"{enclave}: {doing}: {vector_name(vector)}"
    if vector == 14:
        where = f"base + {address - base:#x}" if base <= address < base + size else f"{address:#x}"
        text += f" in the page at {where}"  # the processor clears the low 12 bits
    if run.function == _EENTER:
        text += (
            " while entering: the TCS is busy or has no SSA frame left, or the enclave's memory is gone: "
            "release the slot and acquire another"
        )
    else:
        if place is not None:
            offset, known = place
            detail["rip"] = offset
            text += f", in {known}" if known else f", instruction at base + {offset:#x}"
            if known:
                detail["where"] = known
        text += "; the slot is out of use"
    return EnclaveFault(text, detail)
