"""A value that is read and written in parts."""

from __future__ import annotations

import operator
import os
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from teemate.db import _errors
from teemate.db._errors import error_of
from teemate.db._wire import Batch, Stored, encode_execute, encode_set

if TYPE_CHECKING:
    from teemate.db._connection import Connection

__all__ = ["Blob"]

_ABORT, _READONLY = 4, 8
_LONGEST = 2**31 - 1


class Blob:
    """What ``connection.blobopen()`` gives: a blob or text, as a file and as a sequence of bytes.

    The enclave has statements and nothing else, so each part is read by a SELECT and written by an
    UPDATE, which fires triggers and copies the value in there: only the part goes to and fro.
    """

    def __init__(
        self, connection: Connection, table: str, column: str, row: int, name: str, readonly: bool
    ) -> None:
        self._connection = connection
        self._readonly = readonly
        self._row = row
        self._table = f"{_quoted(name)}.{_quoted(table)}"
        # Never a bare "name": SQLite takes one that it does not know for a string.
        self._column = f"{_quoted(table)}.{_quoted(column)}"
        self._target = _quoted(column)
        self._bytes = f"CAST({self._column} AS BLOB)"
        self._rowid = f"{_quoted(table)}.rowid"
        self._at = 0
        self._closed = False
        self._life = connection._life
        rows = self._run(
            f"SELECT typeof({self._column}), length({self._bytes}) FROM {self._table} WHERE {self._rowid} = ?"
        )
        if not len(rows):
            raise error_of(1, f"no such rowid: {row}")
        kind, length = rows.row()
        assert isinstance(kind, bytes)
        self._kind = kind.decode()
        if self._kind not in ("blob", "text") or not isinstance(length, int):
            raise error_of(1, f"cannot open value of type {self._kind}")
        self._length = length

    def __enter__(self) -> Self:
        """Return itself."""
        self._check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self._check()
        self.close()

    def close(self) -> None:
        """Have it not used any more."""
        self._connection._check()
        self._closed = True

    def read(self, length: int = -1, /) -> bytes:
        """Return `length` bytes from where it is, or all that are left if that is less, or negative."""
        self._check()
        left = self._length - self._at
        count = left if length < 0 else min(length, left)
        data = self._part(self._at, count)
        self._at += count
        return data

    def write(self, data: Any, /) -> None:
        """Write `data` where it is; the blob does not grow."""
        self._check()
        raw = memoryview(data).tobytes()  # its items may have more than a byte each
        self._put(self._at, raw)
        self._at += len(raw)

    def seek(self, offset: int, origin: int = os.SEEK_SET, /) -> None:
        """Go to `offset` from the beginning, from where it is (``os.SEEK_CUR``) or from the end."""
        self._check()
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}
        if origin not in starts:
            raise ValueError("'origin' should be os.SEEK_SET, os.SEEK_CUR, or os.SEEK_END")
        to = starts[origin] + offset
        if to > _LONGEST:
            raise OverflowError("seek offset results in overflow")
        if not 0 <= to <= self._length:
            raise ValueError("offset out of blob range")
        self._at = to

    def tell(self) -> int:
        """Return where it is."""
        self._check()
        return self._at

    # ---- as a sequence --------------------------------------------------------------------

    # Going through it would be a statement for each byte.
    __iter__ = None

    def __contains__(self, value: object) -> bool:
        """Refuse, as sqlite3 does."""
        raise TypeError("argument of type 'Blob' is not iterable")

    def __len__(self) -> int:
        """How many bytes it has."""
        self._check()
        return self._length

    def __getitem__(self, index: int | slice) -> Any:
        """Return the byte at a position, or the bytes of a slice."""
        self._check()
        if isinstance(index, slice):
            start, stop, step = _indices(index, self._length)
            if step == 1:
                return self._part(start, max(0, stop - start))
            positions = range(start, stop, step)
            if not positions:
                return b""
            low, high = min(positions), max(positions)
            part = self._part(low, high - low + 1)
            return bytes(part[position - low] for position in positions)
        return self._part(self._position(index), 1)[0]

    def __setitem__(self, index: int | slice, value: Any) -> None:
        """Write the byte at a position, or as many bytes as a slice has."""
        self._check()
        if not isinstance(index, slice):
            position = self._position(index)
            byte = operator.index(value)
            if not 0 <= byte <= 255:
                raise ValueError("byte must be in range(0, 256)")
            self._put(position, bytes([byte]))
            return
        start, stop, step = _indices(index, self._length)
        positions = range(start, stop, step)
        view = memoryview(value)
        if not view.c_contiguous:
            raise BufferError("underlying buffer is not C-contiguous")
        data = view.tobytes()
        if len(data) != len(positions):
            raise IndexError("Blob slice assignment is wrong size")
        if not positions:
            return
        low, high = min(positions), max(positions)
        if step != 1:
            part = bytearray(self._part(low, high - low + 1))
            for position, byte in zip(positions, data, strict=True):
                part[position - low] = byte
            data = bytes(part)
        self._put(low, data)

    def __delitem__(self, index: object) -> None:
        """Refuse: a blob does not shrink."""
        raise TypeError("Blob object doesn't support item or slice deletion")

    # ---- inside ----------------------------------------------------------------------------

    def _check(self) -> None:
        self._connection._check()
        if self._closed or self._life != self._connection._life:
            raise _errors.ProgrammingError("Cannot operate on a closed blob.")

    def _position(self, index: object) -> int:
        if not hasattr(index, "__index__"):
            raise TypeError("Blob indices must be integers")
        position = operator.index(index)
        if not -(2**63) <= position < 2**63:
            raise IndexError("cannot fit 'int' into an index-sized integer")
        if not -self._length <= position < self._length:
            raise IndexError("Blob index out of range")
        return position % self._length

    def _run(self, statement: str, *values: Stored) -> Batch:
        """Execute `statement`, whose last parameter is the row's number."""
        with self._connection._locked():
            parameters = encode_set((*values, self._row))
            return self._connection._run(
                encode_execute(statement.encode(), [parameters], parameters=len(values) + 1, rows=1)
            )

    def _same(self) -> str:
        """What holds of the value while nobody has put another kind or length in its place."""
        return f"(typeof({self._column}) = '{self._kind}' AND length({self._bytes}) = {self._length})"

    def _part(self, start: int, count: int) -> bytes:
        rows = self._run(
            f"SELECT substr({self._bytes}, {start + 1}, {count}) FROM {self._table} "
            f"WHERE {self._same()} AND {self._rowid} = ?"
        )
        (data,) = rows.row() if len(rows) else (None,)
        if not isinstance(data, bytes):
            raise _changed()
        return data

    def _put(self, start: int, data: bytes) -> None:
        if len(data) > self._length - start:
            raise ValueError("data longer than blob")
        if self._readonly:
            raise error_of(_READONLY, "attempt to write a readonly database: the blob was opened so")
        end = start + len(data) + 1
        joined = f"substr({self._bytes}, 1, {start}) || ? || substr({self._bytes}, {end})"
        done = self._run(
            f"UPDATE {self._table} SET {self._target} = CAST({joined} AS {self._kind}) "
            f"WHERE {self._same()} AND {self._rowid} = ?",
            data,
        )
        if not done.changes:
            raise _changed()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _changed() -> _errors.Error:
    return error_of(_ABORT, "the row was changed or deleted since the blob was opened: open it again")


def _indices(index: slice, length: int) -> tuple[int, int, int]:
    for part in (index.start, index.stop, index.step):
        if part is not None and not hasattr(part, "__index__"):
            raise TypeError("Blob indices must be integers or slices")
    return index.indices(length)
