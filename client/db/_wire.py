"""What goes to the database enclave and what comes back, in bytes: the mirror of native/enclaves/db/db.h.

Results are not decoded before somebody wants their rows: a batch keeps the bytes and where it is in
them, and texts stay UTF-8 until it is known what the program wants them as.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from teemate.errors import ProtocolError

__all__ = [
    "CREATE",
    "DB_FAILED",
    "MEMORY",
    "PAGE",
    "PAGES",
    "READONLY",
    "REPLY_MIN",
    "STOP_LATE",
    "UNCACHED",
    "Access",
    "Batch",
    "CopyKind",
    "Description",
    "Failure",
    "Grantee",
    "Listing",
    "Opened",
    "Right",
    "Stored",
    "Text",
    "decode",
    "decode_copying",
    "decode_failure",
    "decode_listed",
    "encode_copied",
    "encode_copy",
    "encode_end",
    "encode_execute",
    "encode_fetch",
    "encode_limit",
    "encode_list",
    "encode_open",
    "encode_pages",
    "encode_run",
    "encode_script",
    "encode_set",
]

VERSION: Final = 1
READONLY, CREATE, MEMORY, UNCACHED = 1, 2, 4, 8
STOP_LATE: Final = 2
"""What the word that ends a statement is when its time is over."""
DB_FAILED: Final = 1
"""The status of an ECALL whose answer is a struct db_error."""
REPLY_MIN: Final = 1024
PAGE: Final = 4096
"""Bytes of a page."""
PAGES: Final = 64
"""Pages that one call of db_pages moves at most."""
_EXECUTE, _FETCH, _END, _SCRIPT = 1, 2, 3, 4
_NAMED, _DESCRIBE = 1, 2
_MORE, _TRANSACTION, _READS, _CHANGES = 1, 2, 4, 8
_NULL, _INTEGER, _REAL, _TEXT, _BLOB = range(5)
_ROWS, _ERROR_KIND = 1, 2

_OPEN = struct.Struct("<IIIIQII")
_OPENED = struct.Struct("<QIIII")
_RUN = struct.Struct("<IIQ")
_OPERATION = struct.Struct("<BBBBHHIIIII")
_RESULT = struct.Struct("<BBHIIIIIqq")
_ERROR = struct.Struct("<BBHiiIII")
_RIGHT = struct.Struct("<IBBH")
_DESCRIPTION = struct.Struct("<IIIIQQ")
_LIST = struct.Struct("<Q")
_LISTING = struct.Struct("<II56s")
_LIMIT = struct.Struct("<Q")
_COPY = struct.Struct("<IIQ")
_PAGES = struct.Struct("<II")
_COPYING = struct.Struct("<QQ")
_COPIED = struct.Struct("<IIQ")
_INTEGER_FIELD = struct.Struct("<q")
_REAL_FIELD = struct.Struct("<d")
_LENGTH = struct.Struct("<H")
_NO_NAME = 0xFFFF


class Access(enum.IntEnum):
    """What somebody may do with a database."""

    NONE = 0
    READ = 1
    WRITE = 2
    OWNER = 3


class Grantee(enum.IntEnum):
    """Whom a right is granted to."""

    UID = 1
    GID = 2


class CopyKind(enum.IntEnum):
    """Where pages go: out of the enclave, to a new database in it, or in from outside."""

    OUT = 1
    TO = 2
    IN = 3


class Text(bytes):
    """The UTF-8 of a text, which tells it from a blob."""

    __slots__ = ()


Stored = None | int | float | Text | bytes
"""A value as SQLite has it."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A connection in the enclave."""

    connection: int
    slot: int
    sqlite_version: int
    access: Access
    """How it is open: not more than its owner has granted, nor than what was asked for."""
    files: int
    """How many descriptors this client needs before it goes on: of the database's file, and of its log."""

    @classmethod
    def parse(cls, reply: bytes) -> Opened:
        """Decode a struct db_opened."""
        if len(reply) != _OPENED.size:
            raise ProtocolError(f"db_opened has {_OPENED.size} bytes, this one {len(reply)}")
        connection, slot, version, access, files = _OPENED.unpack(reply)
        if files > 2:
            raise ProtocolError(f"a database has 2 files that a client may have, not {files}")
        return cls(connection, slot, version, Access(access), files)


@dataclass(frozen=True, slots=True)
class Failure:
    """What an operation failed with."""

    code: int
    """SQLite's extended result code, or a negative one of the enclave's own."""
    message: str
    offset: int
    """Where in the SQL, in bytes; -1 when that is not known."""
    set: int
    """Which set of parameters; for ROOM the cursor to fetch from."""
    needed: int
    transaction: bool


@dataclass(frozen=True, slots=True)
class Listing:
    """A database that this client may use."""

    name: str
    owner: int
    """The uid that has made it."""
    access: Access
    """What this client may do."""


@dataclass(frozen=True, slots=True)
class Right:
    """What one user or group was granted."""

    grantee: Grantee
    id: int
    """A uid, or a gid."""
    access: Access

    def encode(self) -> bytes:
        """Encode a struct db_right; NONE takes it back."""
        return _RIGHT.pack(self.id, self.grantee, self.access, 0)


@dataclass(frozen=True, slots=True)
class Description:
    """Whose a database is, and who may use it."""

    owner: int
    """The uid that has made it."""
    access: Access
    """What this client may do."""
    rights: tuple[Right, ...]
    """What others were granted; only its owner is told."""
    size: int
    """Bytes, what is in the log not counted."""
    size_limit: int
    """Bytes that it may grow to; 0: as many as the enclave's storage has room for."""

    @classmethod
    def parse(cls, reply: bytes) -> Description:
        """Decode a struct db_description and its rights."""
        try:
            owner, access, count, _, pages, most = _DESCRIPTION.unpack_from(reply)
            rights = tuple(
                Right(Grantee(grantee), number, Access(granted))
                for number, grantee, granted, _ in _RIGHT.iter_unpack(reply[_DESCRIPTION.size :])
            )
        except (struct.error, ValueError) as error:
            raise ProtocolError(f"the database enclave's description is none: {error}") from None
        if len(rights) != count:
            raise ProtocolError(f"{count} rights were announced, and {len(rights)} came")
        return cls(owner, Access(access), rights, pages * PAGE, most * PAGE)


class Batch:
    """The rows of one result, decoded one by one."""

    __slots__ = (
        "_at",
        "_data",
        "_left",
        "changes",
        "columns",
        "counts_changes",
        "cursor",
        "last_rowid",
        "names",
        "reads",
        "transaction",
    )

    def __init__(self, data: bytes, at: int) -> None:
        kind, flags, columns, count, cursor, described, length, _, changes, last_rowid = _RESULT.unpack_from(
            data, at
        )
        at += _RESULT.size
        if kind != _ROWS or len(data) - at < described + length:
            raise ProtocolError("the database enclave's answer is not one")
        self.columns: int = columns
        self.cursor: int = cursor if flags & _MORE else 0
        """To fetch more rows from; 0 when these are the last."""
        self.transaction = bool(flags & _TRANSACTION)
        self.reads = bool(flags & _READS)
        self.counts_changes = bool(flags & _CHANGES)
        self.changes: int = changes
        self.last_rowid: int = last_rowid
        self.names = tuple(_names(data[at : at + described]))
        """Name and declared type of each column, if that was asked for."""
        self._data = data
        self._at = at + described
        self._left: int = count

    def __len__(self) -> int:
        """How many rows are not read yet."""
        return self._left

    def row(self) -> list[Stored]:
        """Decode the next row."""
        width = self.columns
        data, fields = self._data, self._at + width
        end = fields + 8 * width
        row: list[Stored] = []
        for kind in data[self._at : fields]:
            if kind == _NULL:
                row.append(None)
            elif kind == _REAL:
                row.append(_REAL_FIELD.unpack_from(data, fields)[0])
            else:
                (field,) = _INTEGER_FIELD.unpack_from(data, fields)
                if kind == _INTEGER:
                    row.append(field)
                else:
                    if not 0 <= field <= len(data) - end:
                        raise ProtocolError("the database enclave's answer ends within a value")
                    raw = data[end : end + field]
                    end += field
                    row.append(Text(raw) if kind == _TEXT else raw)
            fields += 8
        self._at = end
        self._left -= 1
        return row


def _names(data: bytes) -> Iterator[tuple[str, str | None]]:
    texts: list[str | None] = []
    at = 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length == _NO_NAME:
            texts.append(None)
            continue
        texts.append(data[at : at + length].decode(errors="replace"))
        at += length
    return ((name or "", declared) for name, declared in zip(texts[::2], texts[1::2], strict=True))


# ---- requests --------------------------------------------------------------------------------


def encode_open(
    name: bytes, flags: int, *, busy_ms: int, cursors: int, memory: int, statement_ms: int
) -> bytes:
    """Encode what db_open is asked; 0 for `cursors`, `memory` and `statement_ms`: the enclave's default."""
    return _OPEN.pack(VERSION, flags, busy_ms, cursors, memory, statement_ms, len(name)) + name


def encode_set(values: Iterable[object]) -> bytes:
    """Encode one row of None, int, float, str or bytes-like values; subclasses of them too.

    Raises :class:`OverflowError` for an integer of more than 64 bits, :class:`UnicodeEncodeError` for a
    lone surrogate, :class:`TypeError`, whose argument is the position, for another type.
    """
    types, fields, data = bytearray(), bytearray(), bytearray()
    for position, value in enumerate(values):
        if value is None:
            types.append(_NULL)
            fields += bytes(8)
        elif isinstance(value, int):
            types.append(_INTEGER)
            try:
                fields += _INTEGER_FIELD.pack(value)
            except struct.error:
                raise OverflowError("Python int too large to convert to SQLite INTEGER") from None
        elif isinstance(value, float):
            types.append(_REAL)
            fields += _REAL_FIELD.pack(value)
        elif isinstance(value, str):
            raw = str.encode(value)
            types.append(_TEXT)
            fields += _INTEGER_FIELD.pack(len(raw))
            data += raw
        else:
            try:
                blob = memoryview(value).tobytes()  # type: ignore[arg-type]
            except TypeError:
                raise TypeError(position) from None
            types.append(_BLOB)
            fields += _INTEGER_FIELD.pack(len(blob))
            data += blob
    return bytes(types + fields + data)


def encode_execute(
    sql: bytes,
    sets: Sequence[bytes] = (),
    *,
    parameters: int = 0,
    names: Sequence[str] | None = None,
    begin: int = 0,
    rows: int,
) -> bytes:
    """Encode a statement with `sets` of `parameters` values each, found by their `names` if there are any."""
    head = b""
    if names is not None:
        head = b"".join(_LENGTH.pack(len(raw)) + raw for raw in map(str.encode, names))
    tail = head + b"".join(sets)
    flags = _DESCRIBE | (_NAMED if names is not None else 0)
    return (
        _OPERATION.pack(_EXECUTE, flags, begin, 0, parameters, 0, len(sets), rows, 0, len(sql), len(tail))
        + sql
        + tail
    )


def encode_script(sql: bytes) -> bytes:
    """Encode statements without parameters."""
    return _OPERATION.pack(_SCRIPT, 0, 0, 0, 0, 0, 0, 0, 0, len(sql), 0) + sql


def encode_fetch(cursor: int, rows: int, *, describe: bool = False) -> bytes:
    """Encode that at most `rows` more of `cursor` are wanted, and its columns with them if `describe`."""
    return _OPERATION.pack(_FETCH, _DESCRIBE if describe else 0, 0, 0, 0, 0, 0, rows, cursor, 0, 0)


def encode_end(cursor: int) -> bytes:
    """Encode that no more of `cursor` is wanted."""
    return _OPERATION.pack(_END, 0, 0, 0, 0, 0, 0, 0, cursor, 0, 0)


def encode_run(operations: Sequence[bytes], interrupt: int) -> bytes:
    """Encode what db_run is asked; `interrupt`: address of a uint32_t that ends it when it is not 0."""
    return _RUN.pack(len(operations), 0, interrupt) + b"".join(operations)


def encode_list(following: int) -> bytes:
    """Encode what db_list is asked: 0, then what it answered."""
    return _LIST.pack(following)


def encode_limit(size: int) -> bytes:
    """Encode that a database may grow to `size` bytes, whole pages of them; 0: no limit of its own."""
    return _LIMIT.pack(-(-size // PAGE))


def encode_copy(kind: CopyKind, name: bytes = b"", pages: int = 0) -> bytes:
    """Encode what db_copy is asked; `pages` when they come from outside."""
    return _COPY.pack(kind, len(name), pages) + name


def encode_pages(count: int, pages: bytes = b"") -> bytes:
    """Encode what db_pages is asked: the next `count` pages; `pages` when they come from outside."""
    return _PAGES.pack(count, 0) + pages


def encode_copied(*, keep: bool, interrupt: int = 0) -> bytes:
    """Encode that a copy is to be kept, or given up; `interrupt` as for :func:`encode_run`."""
    return _COPIED.pack(keep, 0, interrupt)


# ---- answers ---------------------------------------------------------------------------------


def decode_failure(data: bytes, at: int = 0) -> Failure:
    """Decode a struct db_error."""
    try:
        kind, flags, _, code, offset, set_, needed, length = _ERROR.unpack_from(data, at)
    except struct.error:
        raise ProtocolError("the database enclave's answer ends within an error") from None
    if kind != _ERROR_KIND:
        raise ProtocolError(f"the database enclave's answer is of kind {kind}")
    at += _ERROR.size
    message = data[at : at + length].decode(errors="replace")
    return Failure(code, message, offset, set_, needed, bool(flags & _TRANSACTION))


def decode_listed(reply: bytes) -> tuple[int, list[Listing]]:
    """Decode a struct db_listed: from where to go on, 0 for nowhere, and the databases."""
    try:
        (following,) = _LIST.unpack_from(reply)
        listings = [
            Listing(name.rstrip(b"\0").decode("ascii"), owner, Access(access))
            for owner, access, name in _LISTING.iter_unpack(reply[_LIST.size :])
        ]
    except (struct.error, ValueError) as error:
        raise ProtocolError(f"the database enclave's list is none: {error}") from None
    return following, listings


def decode_copying(reply: bytes) -> tuple[int, int, bytes]:
    """Decode a struct db_copying: pages that are done, pages in all, and what came with it."""
    if len(reply) < _COPYING.size:
        raise ProtocolError("the database enclave's answer about a copy is too short")
    done, pages = _COPYING.unpack_from(reply)
    return done, pages, reply[_COPYING.size :]


def decode(reply: bytes) -> tuple[list[Batch], Failure | None]:
    """Decode what db_run answers: a result for each operation that was done, and what the next failed with.

    Raises :class:`~teemate.ProtocolError` for what no database enclave of this version answers.
    """
    batches: list[Batch] = []
    at = 0
    while at < len(reply):
        if reply[at] == _ERROR_KIND:
            return batches, decode_failure(reply, at)
        if len(reply) - at < _RESULT.size:
            raise ProtocolError("the database enclave's answer ends within a result")
        _, _, _, _, _, described, length, _, _, _ = _RESULT.unpack_from(reply, at)
        batches.append(Batch(reply, at))
        at += _RESULT.size + described + length
    return batches, None
