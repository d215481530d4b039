"""TeeMate: many processes in one Intel SGX enclave.

A broker owns the enclaves.  :func:`connect` to it, ``attach`` to an enclave by name, take a
``slot`` and ``call`` into the enclave with your own thread::

    import teemate

    with teemate.connect() as broker:
        with broker.attach("vault") as enclave:
            with enclave.slot() as slot:
                answer = slot.call("get", request)

:func:`open_broker` has the same names for trio, :func:`create_enclave` builds an enclave that
belongs to this process alone.  Everything raises subclasses of :class:`Error`.

Importing this package loads next to nothing; each name brings what it needs when it is first
used.  So the image tools work without the C library, and programs that only attach load neither
trio nor the tools' libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from teemate.errors import (
    AddressInUse,
    BuildFailed,
    Busy,
    CallFailed,
    CallTimeout,
    ConnectionLost,
    Denied,
    Draining,
    EnclaveFault,
    EnclaveLost,
    Error,
    ImageError,
    InternalError,
    LimitReached,
    NotAttached,
    NotFound,
    ProtocolError,
    Revoked,
    Unsupported,
)

if TYPE_CHECKING:
    from teemate._broker import Broker, connect
    from teemate._enclave import Enclave
    from teemate._grant import GrantedEnclave
    from teemate._private import create_enclave
    from teemate._slot import Slot
    from teemate._trio import AsyncBroker, AsyncEnclave, AsyncSlot, open_broker
    from teemate._types import (
        ClientInfo,
        Drained,
        EnclaveInfo,
        EnclaveStatistics,
        Exit,
        GrantInfo,
        Revocation,
        SlotCounts,
        Undrained,
        Upgraded,
    )

__all__ = [
    "AddressInUse",
    "AsyncBroker",
    "AsyncEnclave",
    "AsyncSlot",
    "Broker",
    "BuildFailed",
    "Busy",
    "CallFailed",
    "CallTimeout",
    "ClientInfo",
    "ConnectionLost",
    "Denied",
    "Drained",
    "Draining",
    "Enclave",
    "EnclaveFault",
    "EnclaveInfo",
    "EnclaveLost",
    "EnclaveStatistics",
    "Error",
    "Exit",
    "GrantInfo",
    "GrantedEnclave",
    "ImageError",
    "InternalError",
    "LimitReached",
    "NotAttached",
    "NotFound",
    "ProtocolError",
    "Revocation",
    "Revoked",
    "Slot",
    "SlotCounts",
    "Undrained",
    "Unsupported",
    "Upgraded",
    "connect",
    "create_enclave",
    "open_broker",
]

_LATE = {
    "AsyncBroker": "_trio",
    "AsyncEnclave": "_trio",
    "AsyncSlot": "_trio",
    "Broker": "_broker",
    "ClientInfo": "_types",
    "Drained": "_types",
    "Enclave": "_enclave",
    "EnclaveInfo": "_types",
    "EnclaveStatistics": "_types",
    "Exit": "_types",
    "GrantInfo": "_types",
    "GrantedEnclave": "_grant",
    "Revocation": "_types",
    "Slot": "_slot",
    "SlotCounts": "_types",
    "Undrained": "_types",
    "Upgraded": "_types",
    "connect": "_broker",
    "create_enclave": "_private",
    "open_broker": "_trio",
}


def __getattr__(name: str) -> Any:
    """Load a name's module when it is first asked for."""
    if name not in _LATE:
        raise AttributeError(f"module 'teemate' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module("teemate." + _LATE[name]), name)
    globals()[name] = value
    return value
