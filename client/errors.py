"""Every error that TeeMate raises, by whose turn it is to act.

Each class has the ``code`` that stands for it on the wire; :func:`from_code` finds the
class again.  ``str()`` of an error says what happened, which limit or setting was
met, and what to do; ``detail`` carries the same facts for programs.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "AddressInUse",
    "BuildFailed",
    "Busy",
    "CallFailed",
    "CallTimeout",
    "ConnectionLost",
    "Denied",
    "Draining",
    "EnclaveFault",
    "EnclaveLost",
    "Error",
    "ImageError",
    "InternalError",
    "LimitReached",
    "NotAttached",
    "NotFound",
    "ProtocolError",
    "Revoked",
    "Unsupported",
    "from_code",
]


class Error(Exception):
    """Base of all errors of TeeMate."""

    code = "internal-error"

    def __init__(self, message: str, detail: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.detail: dict[str, object] = dict(detail or {})


class NotFound(Error):
    """No enclave, grant or slot of that name: look at ``teemate status``."""

    code = "not-found"


class Denied(Error):
    """The policy does not allow it: the broker's log names the missing rule."""

    code = "denied"


class Busy(Error):
    """Everything was in use for as long as the request would wait: try again, or ask for more slots."""

    code = "busy"


class LimitReached(Error):
    """A limit of the policy was met: the message names it."""

    code = "limit-reached"


class Revoked(Error):
    """The grant or slot was taken back: attach again if the policy still allows it."""

    code = "revoked"


class Draining(Error):
    """The enclave takes no new clients: wait for its successor."""

    code = "draining"


class AddressInUse(Error):
    """Something is mapped where the enclave has to be: the message names the mapping."""

    code = "address-in-use"


class NotAttached(Error):
    """This process holds no grant (a child of fork() never does): attach first."""

    code = "not-attached"


class ImageError(Error):
    """The image or its SIGSTRUCT is bad: ``detail`` has the step, and the record's offset."""

    code = "image-error"


class EnclaveFault(Error):
    """The enclave's code failed: ``detail`` has vector, address and, where known, function and line."""

    code = "enclave-fault"


class EnclaveLost(Error):
    """The enclave is gone (host suspended, memory error, destroyed): attach to the next generation."""

    code = "enclave-lost"


class CallTimeout(Error):
    """The call took longer than its timeout and was given up; its slot is out of use."""

    code = "call-timeout"


class CallFailed(Error):
    """The enclave answered with a status other than 0: ``status`` has it, positive ones are the image's own.

    ``reply`` is the output that came with it.  Never on the wire, since the broker takes no part in calls.
    """

    code = "call-failed"

    def __init__(
        self, message: str, status: int, reply: bytes = b"", detail: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(message, {**(detail or {}), "status": status})
        self.status = status
        self.reply = reply


class BuildFailed(Error):
    """A function's sources gave no module: the message has what the compiler said, or what to install."""

    code = "build-failed"


class ProtocolError(Error):
    """One side sent what the protocol does not allow."""

    code = "protocol-error"


class Unsupported(Error):
    """The other side does not know this operation or version."""

    code = "unsupported"


class ConnectionLost(Error):
    """The broker is not there (any more): the message says which socket and why."""

    code = "connection-lost"


class InternalError(Error):
    """A bug in TeeMate: please report it with the broker's log."""

    code = "internal-error"


_BY_CODE: dict[str, type[Error]] = {cls.code: cls for cls in Error.__subclasses__() if cls is not CallFailed}


def from_code(code: str, message: str, detail: Mapping[str, object] | None = None) -> Error:
    """Return the error that `code` stands for; an unknown code gives a plain :class:`Error`."""
    error = _BY_CODE.get(code, Error)(message, detail)
    if type(error) is Error:
        error.code = code
    return error
