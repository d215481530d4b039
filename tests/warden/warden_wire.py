"""The warden's messages as the test sees them: a mirror of native/warden/protocol.h of its own."""

from __future__ import annotations

import ctypes
import hashlib
import hmac

PROTOCOL_VERSION = 1
START, CONTROL, PROBE, REPAIR, PING, RENEW = range(1, 7)
STEP_CLEAR, STEP_REPAIR, STEP_RESET, STEP_ARM = range(1, 5)

SET_KEY, ARM, CLEAR, CTL_PROBE, RESET, SSA, REWRITE, REINIT, TIME, AUTHOR, REPORT = range(1, 12)

FREE, ARMED, INSIDE, PARKED = range(4)

SEGMENTS = 128


class Identity(ctypes.Structure):
    """struct tm_identity."""

    _fields_ = [
        ("principal", ctypes.c_uint8 * 32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("grant", ctypes.c_uint64),
    ]


class Bind(ctypes.Structure):
    """struct tm_bind."""

    _fields_ = [("generation", ctypes.c_uint64), ("identity", Identity), ("mac", ctypes.c_uint8 * 32)]


class Control(ctypes.Structure):
    """struct tm_control."""

    _fields_ = [
        ("op", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("slot", ctypes.c_uint64),
        ("generation", ctypes.c_uint64),
        ("argument", ctypes.c_uint64),
        ("key", ctypes.c_uint8 * 16),
        ("sequence", ctypes.c_uint64),
        ("result", ctypes.c_uint64),
        ("mac", ctypes.c_uint8 * 32),
        ("data", ctypes.c_uint8 * 256),
    ]


class ControlResult(ctypes.Structure):
    """struct tm_control_result."""

    _fields_ = [
        ("cssa", ctypes.c_uint64),
        ("word", ctypes.c_uint64),
        ("calls", ctypes.c_uint64),
        ("exitinfo", ctypes.c_uint64),
        ("rip", ctypes.c_uint64),
        ("maddr", ctypes.c_uint64),
        ("abi_version", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("data", ctypes.c_uint8 * 448),
    ]


class WardenSegment(ctypes.Structure):
    """struct warden_segment."""

    _fields_ = [
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("prot", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
    ]


class StartBody(ctypes.Structure):
    """body.start of struct warden_request."""

    _fields_ = [
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("backend", ctypes.c_uint32),
        ("segment_count", ctypes.c_uint32),
        ("control_key", ctypes.c_uint8 * 16),
        ("segments", WardenSegment * SEGMENTS),
    ]


class RepairBody(ctypes.Structure):
    """body.repair of struct warden_request."""

    _fields_ = [
        ("slot", ctypes.c_uint64),
        ("generation", ctypes.c_uint64),
        ("holder_dead", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]


class RenewBody(ctypes.Structure):
    """body.renew of struct warden_request."""

    _fields_ = [
        ("clear", Control),
        ("reset", Control),
        ("arm", Control),
        ("holder_dead", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]


class Body(ctypes.Union):
    """body of struct warden_request."""

    _fields_ = [("start", StartBody), ("control", Control), ("repair", RepairBody), ("renew", RenewBody)]


class WardenRequest(ctypes.Structure):
    """struct warden_request."""

    _fields_ = [
        ("version", ctypes.c_uint32),
        ("op", ctypes.c_uint32),
        ("id", ctypes.c_uint64),
        ("body", Body),
    ]


class WardenReply(ctypes.Structure):
    """struct warden_reply."""

    _fields_ = [
        ("id", ctypes.c_uint64),
        ("status", ctypes.c_int32),
        ("entered", ctypes.c_uint32),
        ("vector", ctypes.c_uint32),
        ("repaired", ctypes.c_uint32),
        ("contended", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("result", ControlResult),
        ("text", ctypes.c_char * 128),
    ]


#: C name of each structure, and what its fields are called there where that differs.
STRUCTURES: dict[str, tuple[type[ctypes.Structure], dict[str, str]]] = {
    "tm_identity": (Identity, {}),
    "tm_bind": (Bind, {}),
    "tm_control": (Control, {}),
    "tm_control_result": (ControlResult, {}),
    "warden_segment": (WardenSegment, {}),
    "warden_request": (WardenRequest, {}),
    "warden_reply": (WardenReply, {}),
}


def mac_key(control_key: bytes) -> bytes:
    """Derive the key of MACs from the control key."""
    return hmac.digest(control_key, b"teemate mac key".ljust(16, b"\0"), "sha256")


def sign(control_key: bytes, control: Control) -> None:
    """Fill in the MAC of a request."""
    raw = bytes(control)
    text = b"teemate control".ljust(16, b"\0") + raw[: Control.result.offset] + raw[Control.data.offset :]
    ctypes.memmove(control.mac, hmac.digest(mac_key(control_key), text, "sha256"), 32)


def bind(control_key: bytes, *, slot: int, generation: int, principal: str, uid: int) -> bytes:
    """Return a struct tm_bind as the broker makes it."""
    identity = Identity(uid=uid, gid=uid, grant=1)
    ctypes.memmove(identity.principal, hashlib.sha256(principal.encode()).digest(), 32)
    text = (
        b"teemate bind".ljust(16, b"\0")
        + slot.to_bytes(8, "little")
        + generation.to_bytes(8, "little")
        + bytes(identity)
    )
    result = Bind(generation=generation, identity=identity)
    ctypes.memmove(result.mac, hmac.digest(mac_key(control_key), text, "sha256"), 32)
    return bytes(result)
