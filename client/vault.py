"""The vault, a confidential key-value store for many processes, as its users see it.

The mirror of native/enclaves/vault/vault.h::

    with broker.attach("vault") as enclave, enclave.slot() as slot:
        vault = Vault(slot)
        version = vault.put(b"key", b"value")
        vault.get(b"key").value
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from teemate.errors import CallFailed, ProtocolError
from teemate.report import REPORT_SIZE, TARGET_SIZE, Rejection, Report, ReportRejected

__all__ = ["KEY_MAX", "PRIVATE", "SHARED", "VALUE_MAX", "Changed", "Entry", "Listed", "Vault"]

PRIVATE = 0
"""Seen by callers of the same identity only."""
SHARED = 1
"""Seen by everybody who is attached."""
KEY_MAX = 256
VALUE_MAX = 65536

_NAME = struct.Struct("<BBHI")
_PUT = struct.Struct("<BBHIQQ")
_VERSION = struct.Struct("<Q")
_VALUE = struct.Struct("<QQ")
_SCAN = struct.Struct("<BBHIQ")
_PAGE = struct.Struct("<QII")
_RECORD = struct.Struct("<HHIQQ")
_IMPORT = struct.Struct("<B7x")
_NOT_FOUND = 1
_CHANGED = 2
_REJECTIONS = {3: Rejection.FORGED, 4: Rejection.FOREIGN}
_REASONS = {
    Rejection.FORGED: "it was made for another enclave or on another computer, or changed on the way",
    Rejection.FOREIGN: "it is of another platform: a report holds on the sim, or the computer, that made it",
}
_REPLY_MAX = _VALUE.size + VALUE_MAX
_PAGE_MAX = 1 << 20


class Caller(Protocol):
    """What of a slot is needed: its ``call``."""

    def call(
        self, name: str, payload: bytes = b"", timeout: float | None = None, *, max_reply: int = 65536
    ) -> bytes:
        """Do an ECALL."""


class Entry(NamedTuple):
    """A value and its version; versions grow with every change of a key."""

    value: bytes
    version: int
    expires: int
    """Nanoseconds since 1970; 0: never."""


class Listed(NamedTuple):
    """What a list tells of one key."""

    key: bytes
    length: int
    """Bytes of its value."""
    version: int
    expires: int


class Changed(NamedTuple):
    """A compare-and-swap met another version: this is what is there, None for nothing."""

    entry: Entry | None


class Vault:
    """Calls of one slot in one space.  Values are at most 64 KiB, keys 1 to 256 bytes.

    Besides what ``slot.call`` raises: :class:`teemate.CallFailed` with status -1 for a key or value
    that is too long.
    """

    def __init__(self, slot: Caller, space: int = SHARED) -> None:
        self._slot = slot
        self._space = space

    def put(self, key: bytes, value: bytes, *, ttl_ms: int = 0) -> int:
        """Set `key`; returns its new version.  `ttl_ms`: milliseconds that it lives, 0 for ever."""
        return self._version(self._slot.call("put", self._pack(key, value, ttl_ms, 0)))

    def get(self, key: bytes) -> Entry | None:
        """Return what `key` holds, None when there is nothing."""
        try:
            reply = self._slot.call("get", self._name(key), max_reply=_REPLY_MAX)
        except CallFailed as error:
            if error.status == _NOT_FOUND:
                return None
            raise
        return self._entry(reply)

    def delete(self, key: bytes) -> bool:
        """Forget `key`; whether it was there."""
        try:
            self._slot.call("delete", self._name(key))
        except CallFailed as error:
            if error.status == _NOT_FOUND:
                return False
            raise
        return True

    def compare_and_swap(self, key: bytes, expected: int, value: bytes, *, ttl_ms: int = 0) -> int | Changed:
        """Set `key` if its version is `expected` (0: if it is not there).

        Returns the new version, or :class:`Changed` with what is there.
        """
        try:
            reply = self._slot.call(
                "compare_and_swap", self._pack(key, value, ttl_ms, expected), max_reply=_REPLY_MAX
            )
        except CallFailed as error:
            if error.status != _CHANGED:
                raise
            entry = self._entry(error.reply)
            return Changed(entry if entry.version else None)
        return self._version(reply)

    def list(self, prefix: bytes = b"") -> Iterator[Listed]:
        """Yield the keys that begin with `prefix`; those that come or go meanwhile may be left out."""
        cursor = 0
        while True:
            request = _SCAN.pack(self._space, 0, len(prefix), 0, cursor) + prefix
            reply = self._slot.call("list", request, max_reply=_PAGE_MAX)
            cursor, count, _ = _PAGE.unpack_from(reply)
            position = _PAGE.size
            for _ in range(count):
                key_length, _, length, version, expires = _RECORD.unpack_from(reply, position)
                position += _RECORD.size
                yield Listed(reply[position : position + key_length], length, version, expires)
                position += key_length
            if not cursor:
                return

    def export(self, prefix: bytes = b"") -> Iterator[bytes]:
        """Yield sealed blobs with all entries under `prefix`, for :meth:`import_`."""
        cursor = 0
        while True:
            request = _SCAN.pack(self._space, 0, len(prefix), 0, cursor) + prefix
            reply = self._slot.call("export", request, max_reply=_PAGE_MAX)
            cursor, _, _ = _PAGE.unpack_from(reply)
            yield reply[_PAGE.size :]
            if not cursor:
                return

    def import_(self, blob: bytes) -> int:
        """Take the entries of a sealed blob over; returns how many."""
        reply = self._slot.call("import", _IMPORT.pack(self._space) + blob)
        return int(_PAGE.unpack(reply)[1])

    def report(self, data: bytes = b"", target: bytes = b"") -> bytes:
        """Return a report by this enclave over at most 64 bytes of `data`, 432 bytes.

        It is for the enclave of `target` (512 bytes, :meth:`teemate.report.Report.target`) and for
        nobody else; without one, for this enclave itself.
        """
        if len(data) > 64:
            raise ProtocolError(f"a report has 64 bytes of data, and not {len(data)}")
        if len(target) not in (0, TARGET_SIZE):
            raise ProtocolError(f"a TARGETINFO has {TARGET_SIZE} bytes, this one {len(target)}")
        reply = self._slot.call("report", data.ljust(64, b"\0") + target)
        if len(reply) != REPORT_SIZE:
            raise ProtocolError(f"a REPORT has {REPORT_SIZE} bytes, this one {len(reply)}")
        return reply

    def verify(self, report: bytes) -> Report:
        """Let the enclave check a report that was made for it, and return what it says.

        This tells that an enclave on this computer made it, unchanged, and not which one: compare
        ``mrenclave`` or ``mrsigner``, ``debug`` and ``data`` with what they have to be.  Raises
        :class:`~teemate.report.ReportRejected`.
        """
        parsed = Report.parse(report)
        try:
            self._slot.call("verify", report)
        except CallFailed as error:
            reason = _REJECTIONS.get(error.status)
            if reason is None:
                raise
            raise ReportRejected(
                f"the report was rejected: {_REASONS[reason]}", error.status, reason
            ) from None
        return parsed

    def mrenclave(self) -> bytes:
        """Return MRENCLAVE as the processor reports it inside."""
        return Report.parse(self.report()).mrenclave

    def _name(self, key: bytes) -> bytes:
        return _NAME.pack(self._space, 0, self._length(key), 0) + key

    def _pack(self, key: bytes, value: bytes, ttl_ms: int, expected: int) -> bytes:
        return _PUT.pack(self._space, 0, self._length(key), len(value), ttl_ms, expected) + key + value

    @staticmethod
    def _length(key: bytes) -> int:
        if len(key) > 0xFFFF:  # the request has no room for it; less is for the enclave to refuse
            raise CallFailed(f"a key of {len(key)} bytes: {KEY_MAX} are possible", -1)
        return len(key)

    @staticmethod
    def _version(reply: bytes) -> int:
        return int(_VERSION.unpack(reply)[0])

    @staticmethod
    def _entry(reply: bytes) -> Entry:
        version, expires = _VALUE.unpack_from(reply)
        return Entry(reply[_VALUE.size :], version, expires)
