"""What is told of functions."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FunctionInfo", "FunctionLimits", "FunctionLog", "FunctionUsage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionLimits:
    """What one invocation may use; None takes the default, or leaves a limit as it is."""

    memory: int | None = None
    """Bytes of linear memory; 16 MiB unless set, a quarter of the enclave's heap at most."""
    fuel: int | None = None
    """Work, about one for each instruction; 10,000,000,000 unless set."""
    time: float | None = None
    """Seconds by the clock that the host tells the enclave several times a second; 10 unless set."""
    output: int | None = None
    """Bytes of stdout; 1 MiB unless set, 16 MiB at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionInfo:
    """One function of the caller's."""

    name: str
    owner: str
    """Who deployed it: the principal's SHA-256, as the broker asserts it to the enclave, in hexadecimal."""
    digest: str
    """SHA-256 of the module, in hexadecimal."""
    size: int
    """Bytes of the module."""
    version: int
    """1 at first, and one more whenever the function is replaced."""
    deployed: float
    """Seconds since 1970 by the host's clock; 0: it had not been told."""
    invocations: int
    failures: int
    """Invocations that did not end with exit code 0."""
    fuel: int
    """That all invocations together have used."""
    limits: FunctionLimits
    grants: tuple[str, ...] = ()
    """What it may do besides: ``keys``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionLog:
    """An invocation that wrote to stderr, or did not end with exit code 0."""

    invocation: int
    """Its number: 1 for the first after the function was deployed."""
    time: float
    """When it ended, in seconds since 1970; 0: unknown."""
    outcome: str
    """``ok``, ``trapped``, ``failed``, ``limit`` or ``crashed``."""
    limit: str
    """Which, when it met one."""
    exit_code: int
    text: bytes
    """What it wrote to stderr: the last 16 KiB."""
    dropped: int
    """Bytes before these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionUsage:
    """What the caller's functions take up, and how full the enclave is."""

    functions: int
    size: int
    """Bytes of their modules."""
    maximum: int
    """What these may be."""
    heap: int
    heap_used: int
    blocks_owned: int
    """Blocks of the heap that belong to slots with holders: what runs, and modules that are kept ready."""
    heap_ready: int
    """Bytes of the heap for modules, of whomever, that were made ready in slots which have no holder yet."""
    keys: int
    """That the caller's functions have put."""
    keys_size: int
    """Bytes of these, with their values, and 72 for each."""
    keys_maximum: int
    """What these may be."""
