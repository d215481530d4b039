"""Functions: WebAssembly modules that run inside a shared enclave, each invocation in an instance of its own.

::

    with teemate.connect() as broker:
        broker.functions.deploy("hello", Path("hello.wasm").read_bytes())
        broker.functions.invoke("hello", b"payload")     # stdin in, stdout out

``open_broker()`` has the same on trio.  Functions belong to who deployed them, as the broker knows
this user: nobody else sees that they are there.
"""

from __future__ import annotations

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
)
from teemate.functions._types import FunctionInfo, FunctionLimits, FunctionLog, FunctionUsage

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
]
