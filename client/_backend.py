"""Which backend is taken, and the one reason that everybody gives who wants sgx and cannot have it."""

from __future__ import annotations

from typing import NamedTuple

from teemate._native import ffi, lib
from teemate.errors import Unsupported

__all__ = ["BackendChoice", "choose_backend"]

_NUMBERS = {"auto": lib.TEEMATE_AUTO, "sim": lib.TEEMATE_SIM, "sgx": lib.TEEMATE_SGX}
_NAMES = {lib.TEEMATE_SIM: "sim", lib.TEEMATE_SGX: "sgx"}


class BackendChoice(NamedTuple):
    """What a backend's name means on this host."""

    backend: str
    """``sgx`` or ``sim``."""
    wanted: str
    """``auto``, or the same."""
    reason: str
    """Why ``auto`` did not take sgx, and what to do; else empty."""


def choose_backend(wanted: str) -> BackendChoice:
    """Return what `wanted` means for this process: what libteemate takes, so nothing falls back.

    Raises
    ------
    Unsupported
        `wanted` cannot be had here: the message says why, and what to do.

    """
    if wanted not in _NUMBERS:
        raise Unsupported(f"no backend {wanted!r}: it is auto, sim or sgx", {"backend": wanted})
    diag = ffi.new("struct teemate_diag *")
    number = lib.teemate_backend_choose(_NUMBERS[wanted], diag)
    said = ffi.string(diag.text).decode(errors="replace")
    if number >= 0 and (number == lib.TEEMATE_SGX or wanted == "sim"):
        return BackendChoice(_NAMES[number], wanted, "")
    if wanted == "sim":
        raise Unsupported(f'backend "sim" does not work here: {said}', {"backend": wanted})
    from teemate.doctor import why_not_sgx  # late: who gets what it wants need not load it

    reason = why_not_sgx(said)
    if number >= 0:
        return BackendChoice(_NAMES[number], wanted, reason)
    raise Unsupported(
        f'backend "{wanted}" does not work here: {reason}', {"backend": wanted, "reason": reason}
    )
