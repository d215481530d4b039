"""Records for systemd's journal with their fields, over its native protocol.

One datagram per record (systemd: docs/JOURNAL_NATIVE_PROTOCOL.md).  Sending never waits: the broker goes on
when the journal does not keep up or is not there, what could not be sent is counted, and the next record
that can be says how many were dropped.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from collections.abc import Mapping
from typing import final

from structlog.typing import EventDict, WrappedLogger

__all__ = ["MESSAGE_IDS", "Journal", "is_journal", "render"]

ADDRESS = "/run/systemd/journal/socket"
_VALUE_MAX = 16 * 1024
_RECORD_MAX = 128 * 1024
"""Well below net.core.wmem_max: what is larger would have to go through a memfd."""
_PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}
_NAME = re.compile(r"[^A-Z0-9_]")
# Whom and what a record is about, by the same name in every record.
_FIELDS = {
    "uid": "TEEMATE_CLIENT_UID",
    "gid": "TEEMATE_CLIENT_GID",
    "cgroup": "TEEMATE_CLIENT_CGROUP",
    "label": "TEEMATE_CLIENT_LABEL",
    "client": "TEEMATE_CLIENT",
    "slots": "TEEMATE_SLOT",
    "why": "TEEMATE_REASON",
    "missing_rule": "TEEMATE_REASON",
    "exception": "TEEMATE_TRACEBACK",
}
# Events that programs and the catalog (systemd/teemate.catalog) know; an identifier never changes.
MESSAGE_IDS: Mapping[str, str] = {
    "ready": "a4070e20b5f8487792270e85e39b7f8a",
    "stopping": "ff0c008f348c4402b12f3ed2d85d2eaa",
    "policy taken": "f658510d0678487fac9521cda60ac1fc",
    "policy refused": "63352f8cb5a14ef09be482200d6baeb1",
    "state refused": "b6e7058e254c41a88d56ffd35f570c25",
    "enclave built": "91249590e74345639a635f354205732b",
    "enclave not built": "6d7b88dd349749a5a73c18e9027ca33a",
    "enclave lost": "7bd50afc71654775a1c1578b653dfbf8",
    "enclave quarantined": "5237bed268ab4e978478cf4582b7a8e9",
    "slot quarantined": "66c93b577876459eb3808d74f21ae285",
    "warden killed": "4ed21d85045f45fa8f16231ed63c18a4",
    "granted": "8b0c15e50a334d3cbace73724debf3d2",
    "grant ended": "526f1098826946ae8aa206a624d52a72",
    "denied": "e0b89f9ab2fd4d60968e96cb432efb19",
    "revoked": "0ec6c4138a1b449abed40b1497e89307",
    "changed": "5ff6bb3cff8b47bdb3d96b9d3b232e6d",
    "slots withheld": "063aee14b50646e1bb05f993461e4caa",
    "mapping leaked": "2b5e1cd1df674c30921ae7cdf4d97feb",
    "slot stolen": "d1bc5fbecbb04639a40bcca291d29ee7",
    "client broke the protocol": "3a1fc21bf4ca41359f8b45b900b0292c",
    "connection refused": "80234a92bdfb455ca90e709bcc31f474",
    "internal error": "f1ccd356458f4c02b21295ecf20819bb",
    "records dropped": "543f28f04c7d4a6e9be2596871097e71",
}


def is_journal(fd: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written to `fd` goes to the journal: JOURNAL_STREAM has its device and inode."""
    device, _, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def _text(value: object) -> str:
    return value if isinstance(value, str) else repr(value) if isinstance(value, dict) else str(value)


def _field(key: str, *, of_client: bool) -> str:
    if key == "pid":  # a warden's, where the record is about no client
        return "TEEMATE_CLIENT_PID" if of_client else "TEEMATE_PID"
    return _FIELDS.get(key) or "TEEMATE_" + _NAME.sub("_", key.upper())[:56]


def _encode(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "backslashreplace")
    if len(data) > _VALUE_MAX:
        data = data[-_VALUE_MAX:]  # the end of a traceback says most
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"


def render(_logger: WrappedLogger | None, _method: str, record: EventDict) -> bytes:
    """Return the record as one message of the protocol; a structlog processor."""
    about = dict(record)
    event, level = str(about.pop("event", "")), str(about.pop("level", "info"))
    told = " ".join(f"{key}={_text(value)}" for key, value in about.items() if key != "exception")
    parts = [
        _encode("MESSAGE", f"{event} {told}".rstrip()),
        _encode("PRIORITY", str(_PRIORITIES.get(level, 6))),
        _encode("SYSLOG_IDENTIFIER", "teemate-broker"),
        _encode("TEEMATE_EVENT", event),
    ]
    if event in MESSAGE_IDS:
        parts.append(_encode("MESSAGE_ID", MESSAGE_IDS[event]))
    size = sum(map(len, parts))
    of_client = "uid" in about or "client" in about
    for key, value in about.items():
        # A field may be there several times: one of several slots can be asked for.
        for item in value if isinstance(value, list | tuple) else (value,):
            field = _encode(_field(key, of_client=of_client), _text(item))
            size += len(field)
            if size <= _RECORD_MAX:
                parts.append(field)
    return b"".join(parts)


@final
class Journal:
    """Where rendered records go; a logger for structlog."""

    def __init__(self, address: str | None = None) -> None:
        self._address = address or ADDRESS
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._sock.setblocking(False)
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * _RECORD_MAX)
        self._untold = 0
        self.dropped = 0
        """Records that the journal did not take, since the start."""

    def close(self) -> None:
        """Nothing is sent any more."""
        self._sock.close()

    def msg(self, record: bytes) -> None:
        """Send one record, or count it."""
        if self._untold and self._send(
            render(None, "warning", {"event": "records dropped", "level": "warning", "count": self._untold})
        ):
            self._untold = 0
        if not self._send(record):
            self._untold += 1
            self.dropped += 1

    debug = info = warning = error = critical = exception = fatal = err = warn = failure = log = msg

    def _send(self, record: bytes) -> bool:
        try:
            # By name each time: a journal that was started again has another socket.
            self._sock.sendto(record, socket.MSG_NOSIGNAL, self._address)
        except OSError:
            return False
        return True
