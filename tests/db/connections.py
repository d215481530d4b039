"""Connections to databases in an enclave, at the level of its ECALLs (native/enclaves/db/db.h)."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

import teemate

VERSION = 1
READONLY, CREATE, MEMORY, UNCACHED = 1, 2, 4, 8
EXECUTE, FETCH, END, SCRIPT = 1, 2, 3, 4
NAMED, DESCRIBE, ONCE = 1, 2, 4
MORE, TRANSACTION, READS, CHANGES = 1, 2, 4, 8
TAMPERED, PARAMETERS, STATEMENTS, CURSOR, CURSORS, ROOM, TIME, REQUEST = range(-1, -9, -1)
BUSY, INTERRUPTED, CONSTRAINT = 5, 9, 19
MAX_REPLY = 65536

_OPEN = struct.Struct("<IIIIQII")
_OPENED = struct.Struct("<QIIII")
_RUN = struct.Struct("<IIQ")
_OPERATION = struct.Struct("<BBBBHHIIIII")
_ROWS = struct.Struct("<BBHIIIIIqq")
_ERROR = struct.Struct("<BBHiiIII")

Value = None | int | float | str | bytes


def database_image() -> Path:
    """The image that is installed with the package; without SQLite's source there is none.

    TEEMATE_TEST_DATABASE names another: the emulated machine has a smaller one, which is built sooner.
    """
    installed = Path(teemate.__file__).parent / "images" / "db.sgxs"
    image = Path(os.environ.get("TEEMATE_TEST_DATABASE") or installed)
    if not image.exists():
        pytest.skip("the database enclave was not built: SQLite's source was not to be had (build log)")
    return image


class SqlError(Exception):
    """What an operation failed with."""

    def __init__(self, code: int, text: str, offset: int = -1, row: int = 0, needed: int = 0) -> None:
        super().__init__(f"{code}: {text}")
        self.code, self.text, self.offset, self.row, self.needed = code, text, offset, row, needed


@dataclass(frozen=True)
class Result:
    """One DB_ROWS."""

    flags: int
    width: int
    cursor: int
    columns: tuple[tuple[str, str | None], ...]
    rows: list[tuple[Value, ...]]
    changes: int
    last_rowid: int


class Caller(Protocol):
    """What of a slot is needed."""

    def call(
        self, name: str, payload: bytes = b"", timeout: float | None = None, *, max_reply: int = 65536
    ) -> bytes:
        """Do an ECALL."""


def values(row: Sequence[Value]) -> bytes:
    """Encode one row of parameters."""
    types, fields, data = bytearray(), bytearray(), bytearray()
    for value in row:
        if value is None:
            types.append(0)
            fields += bytes(8)
        elif isinstance(value, int):
            types.append(1)
            fields += value.to_bytes(8, "little", signed=True)
        elif isinstance(value, float):
            types.append(2)
            fields += struct.pack("<d", value)
        else:
            raw = value.encode() if isinstance(value, str) else value
            types.append(3 if isinstance(value, str) else 4)
            fields += len(raw).to_bytes(8, "little")
            data += raw
    return bytes(types + fields + data)


def names(keys: Sequence[str]) -> bytes:
    """Encode the names of named parameters."""
    return b"".join(len(key).to_bytes(2, "little") + key.encode() for key in keys)


def operation(
    kind: int,
    text: str = "",
    sets: Sequence[Sequence[Value]] = (),
    *,
    flags: int = 0,
    begin: int = 0,
    rows: int = 1 << 20,
    cursor: int = 0,
    keys: Sequence[str] = (),
) -> bytes:
    """Encode one operation."""
    sql = text.encode()
    tail = names(keys) + b"".join(values(row) for row in sets)
    flags |= NAMED if keys else 0
    count = len(sets[0]) if sets else 0
    head = _OPERATION.pack(kind, flags, begin, 0, count, 0, len(sets), rows, cursor, len(sql), len(tail))
    return head + sql + tail


def _row(data: bytes, at: int, width: int) -> tuple[tuple[Value, ...], int]:
    types = data[at : at + width]
    fields = at + width
    end = fields + 8 * width
    row: list[Value] = []
    for number, kind in enumerate(types):
        field = data[fields + 8 * number : fields + 8 * number + 8]
        if kind == 0:
            row.append(None)
        elif kind == 1:
            row.append(int.from_bytes(field, "little", signed=True))
        elif kind == 2:
            row.append(struct.unpack("<d", field)[0])
        else:
            raw = data[end : end + int.from_bytes(field, "little")]
            end += len(raw)
            row.append(raw.decode() if kind == 3 else raw)
    return tuple(row), end


def _columns(data: bytes) -> tuple[tuple[str, str | None], ...]:
    texts: list[str | None] = []
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 2], "little")
        at += 2
        texts.append(None if length == 65535 else data[at : at + length].decode())
        at += 0 if length == 65535 else length
    return tuple((str(name), kind) for name, kind in zip(texts[::2], texts[1::2], strict=True))


def error(data: bytes, at: int = 0) -> SqlError:
    """Decode a struct db_error."""
    _kind, _flags, _reserved, code, offset, number, needed, length = _ERROR.unpack_from(data, at)
    text = data[at + _ERROR.size : at + _ERROR.size + length].decode(errors="replace")
    return SqlError(code, text, offset, number, needed)


class Connection:
    """A database that is open in a slot."""

    def __init__(
        self,
        slot: Caller,
        name: str = "",
        *,
        flags: int | None = None,
        busy_ms: int = 0,
        cursors: int = 0,
        memory: int = 0,
        statement_ms: int = 0,
        take_files: bool = True,
    ) -> None:
        self.slot = slot
        if flags is None:
            flags = CREATE if name else MEMORY
        raw = name.encode()
        request = _OPEN.pack(VERSION, flags, busy_ms, cursors, memory, statement_ms, len(raw)) + raw
        try:
            reply = slot.call("db_open", request)
        except teemate.CallFailed as failed:
            if failed.status != 1:
                raise
            raise error(failed.reply) from failed
        self.number, self.index, self.version, self.access, self.files = _OPENED.unpack(reply)
        if self.files and take_files:
            granted: Any = slot  # of a broker whose policy has io = "client"
            for file in (name, f"{name}-wal")[: self.files]:
                granted._enclave.open_file(slot, file, writable=self.access > 1)
            slot.call("db_direct")

    def run(self, *operations: bytes, max_reply: int = MAX_REPLY, interrupt: int = 0) -> list[Result]:
        """Do operations; raises the error of the first that fails."""
        payload = _RUN.pack(len(operations), 0, interrupt) + b"".join(operations)
        reply = self.slot.call("db_run", payload, max_reply=max_reply)
        results: list[Result] = []
        at = 0
        while at < len(reply):
            if reply[at] == 2:
                raise error(reply, at)
            _kind, flags, width, count, cursor, described, length, _reserved, changes, rowid = (
                _ROWS.unpack_from(reply, at)
            )
            at += _ROWS.size
            columns = _columns(reply[at : at + described])
            at += described
            end = at + length
            rows = []
            for _ in range(count):
                row, at = _row(reply, at, width)
                rows.append(row)
            assert at == end
            results.append(Result(flags, width, cursor, columns, rows, changes, rowid))
        return results

    def sql(self, text: str, *parameters: Value, max_reply: int = MAX_REPLY) -> list[tuple[Value, ...]]:
        """Do one statement and return all its rows."""
        (result,) = self.run(
            operation(EXECUTE, text, [parameters] if parameters else ()), max_reply=max_reply
        )
        rows = result.rows
        while result.flags & MORE:
            (result,) = self.run(operation(FETCH, cursor=result.cursor))
            rows += result.rows
        return rows

    def script(self, text: str) -> None:
        """Do statements without parameters."""
        self.run(operation(SCRIPT, text))

    def close(self) -> None:
        """Close it; what is open is rolled back."""
        self.slot.call("db_close")
