"""How functions fail, beside what every call into an enclave can end with (``teemate.errors``)."""

from __future__ import annotations

from collections.abc import Mapping

from teemate.errors import Error

__all__ = [
    "BadArgument",
    "FunctionCrashed",
    "FunctionError",
    "FunctionExists",
    "FunctionFailed",
    "FunctionLimit",
    "FunctionTrapped",
    "ModuleInvalid",
    "SealRefused",
]


class FunctionError(Error):
    """Base of what is about functions only."""

    code = "function-error"


class BadArgument(FunctionError, ValueError):
    """A name, a string or a limit that cannot be: the message says which and what may be."""

    code = "function-argument"


class FunctionExists(FunctionError):
    """There is a function of that name: deploy with ``replace``, or under another name."""

    code = "function-exists"


class ModuleInvalid(FunctionError):
    """These bytes are no module that can run here: the message says why."""

    code = "module-invalid"


class SealRefused(FunctionError):
    """A sealed upload was not made, or not taken: the message says which, and what to do."""

    code = "seal-refused"


class FunctionTrapped(FunctionError):
    """WebAssembly ended the invocation (out of bounds, division by zero, unreachable): mend the function."""

    code = "function-trapped"


class FunctionFailed(FunctionError):
    """The function ended with an exit code other than 0; ``stderr`` has the end of what it wrote there."""

    code = "function-failed"

    def __init__(self, message: str, exit_code: int, stderr: bytes, detail: Mapping[str, object]) -> None:
        super().__init__(message, {**detail, "exit_code": exit_code})
        self.exit_code = exit_code
        self.stderr = stderr


class FunctionLimit(FunctionError):
    """The invocation met a limit, and was ended: ``limit`` says which."""

    code = "function-limit"

    def __init__(self, message: str, limit: str, maximum: int, detail: Mapping[str, object]) -> None:
        super().__init__(message, detail)
        self.limit = limit
        """``memory``, ``fuel``, ``time``, ``output``, ``stack``, ``heap`` or ``stream``."""
        self.maximum = maximum
        """What it is: bytes, fuel, nanoseconds; 0 where it has no number."""
        self.detail["limit"] = limit
        if maximum:
            self.detail["maximum"] = maximum


class FunctionCrashed(FunctionError):
    """The engine gave up on this invocation, a bug in it: others go on; please report it with the module."""

    code = "function-crashed"
