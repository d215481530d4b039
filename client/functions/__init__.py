"""Functions: WebAssembly modules that run inside a shared enclave, each invocation in an instance of its own.

::

    with teemate.connect() as broker:
        broker.functions.deploy("hello", Path("hello.wasm").read_bytes())
        broker.functions.invoke("hello", b"payload")     # stdin in, stdout out

``open_broker()`` has the same on trio.  Functions belong to who deployed them, as the broker knows
this user: nobody else sees that they are there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from teemate.functions._client import Functions
from teemate.functions._errors import (
    BadArgument,
    FunctionCrashed,
    FunctionError,
    FunctionExists,
    FunctionFailed,
    FunctionLimit,
    FunctionTrapped,
    ModuleInvalid,
    SealRefused,
)
from teemate.functions._types import FunctionInfo, FunctionLimits, FunctionLog, FunctionUsage

if TYPE_CHECKING:
    from teemate.functions._sealing import Offer, Sealing, seal

__all__ = [
    "BadArgument",
    "FunctionCrashed",
    "FunctionError",
    "FunctionExists",
    "FunctionFailed",
    "FunctionInfo",
    "FunctionLimit",
    "FunctionLimits",
    "FunctionLog",
    "FunctionTrapped",
    "FunctionUsage",
    "Functions",
    "ModuleInvalid",
    "Offer",
    "SealRefused",
    "Sealing",
    "seal",
]


def __getattr__(name: str) -> Any:
    """Import what seals when it is asked for: a start that seals nothing does without."""
    if name not in ("Offer", "Sealing", "seal"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from teemate.functions import _sealing

    return getattr(_sealing, name)
