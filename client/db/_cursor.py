"""A statement's way through its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from teemate.db import _errors
from teemate.db._statement import Statement
from teemate.db._types import adapted, converter_of, shown_name
from teemate.db._wire import (
    Batch,
    Stored,
    Text,
    encode_end,
    encode_execute,
    encode_fetch,
    encode_set,
)

if TYPE_CHECKING:
    from teemate.db._connection import Connection

__all__ = ["Cursor"]

FIRST_ROWS = 64
"""Rows that come with the answer to a statement; each later batch asks for four times as many."""
MOST_ROWS = 1 << 20
SETS_BYTES = 1 << 17
"""Parameters of `executemany` that are sent at once."""

Parameters = Sequence[Any] | Mapping[str, Any]


class Cursor:
    """What ``connection.cursor()`` gives: executes statements and reads their rows, in batches."""

    _ready = False

    def __init__(self, connection: Connection, /) -> None:
        from teemate.db._connection import Connection

        if not issubclass(type(connection), Connection):
            raise TypeError(f"a Connection is wanted, not {type(connection).__name__}")
        connection._check()
        self.connection = connection
        self.description: tuple[tuple[Any, ...], ...] | None = None
        """A tuple of 7 for each column: its name and 6 times None."""
        self.rowcount = -1
        """Rows that an INSERT, UPDATE, DELETE or REPLACE has changed; else -1."""
        self.lastrowid: int | None = None
        self.arraysize = 1
        """How many rows :meth:`fetchmany` returns."""
        self.row_factory: Callable[..., Any] | None = connection.row_factory
        self._batch: Batch | None = None
        self._life = 0
        self._rows = FIRST_ROWS
        self._converters: tuple[Callable[[bytes], object] | None, ...] = ()
        self._closed = False
        self._busy = False
        self._ready = True

    def __del__(self) -> None:
        """Have the enclave forget what is not read; it is told with the next statement."""
        if self._ready and self._batch is not None and self._batch.cursor:
            self.connection._forget(self._life, self._batch.cursor)

    # ---- statements -----------------------------------------------------------------

    def execute(self, sql: str, parameters: Parameters = (), /) -> Self:
        """Execute one statement with `parameters`: a sequence for ``?``, a mapping for ``:name``."""
        connection = self._begin()
        with connection._locked():
            statement = connection._statement(sql)
            names, values = _bound(statement, parameters)
            self._reset()
            self.description = None
            self.rowcount = -1
            operation = encode_execute(
                statement.sql,
                [_encoded(values)] if values else [],
                parameters=len(values),
                names=names if values else None,
                begin=connection._begin_for(statement),
                rows=FIRST_ROWS,
            )
            batch = connection._run(operation, trace=statement)
            self._take(batch)
            self.rowcount = batch.changes if statement.changes else -1
            self.lastrowid = batch.last_rowid
        return self

    def executemany(self, sql: str, parameters: Iterable[Parameters], /) -> Self:
        """Execute an INSERT, UPDATE, DELETE or REPLACE once for each of `parameters`; rows are dropped.

        They are sent many at a time.  Where one fails, those before it have been done.
        """
        connection = self._begin()
        with connection._locked():
            statement = connection._statement(sql)
            rows = iter(parameters)
            self._reset()
            self.description = None
            self.rowcount = 0 if statement.changes else -1
            sets: list[bytes] = []
            shape: tuple[tuple[str, ...] | None, int] = (None, 0)
            size = 0
            self._busy = True
            try:
                for row in rows:
                    names, values = _bound(statement, row)
                    encoded = _encoded(values)
                    if sets and (shape != (names, len(values)) or size + len(encoded) > SETS_BYTES):
                        ready, sets, size = sets, [], 0
                        self._send(statement, shape, ready)
                    shape = (names, len(values))
                    sets.append(encoded)
                    size += len(encoded)
            finally:
                self._busy = False
                if sets:
                    self._send(statement, shape, sets)
        return self

    def _send(
        self, statement: Statement, shape: tuple[tuple[str, ...] | None, int], sets: Sequence[bytes]
    ) -> None:
        names, count = shape
        connection = self.connection
        if not count:
            # Without parameters there is nothing that tells the enclave how often.
            operations = [
                encode_execute(statement.sql, begin=connection._begin_for(statement), rows=0) for _ in sets
            ]
        else:
            operations = [
                encode_execute(
                    statement.sql,
                    sets,
                    parameters=count,
                    names=names,
                    begin=connection._begin_for(statement),
                    rows=0,
                )
            ]
        for operation in operations:
            batch = connection._run(operation, trace=statement)
            if batch.reads:
                if batch.cursor:
                    connection._run(encode_end(batch.cursor))
                raise _errors.ProgrammingError("executemany() can only execute DML statements.")
            while batch.cursor:  # one set of a statement with RETURNING
                batch = connection._run(encode_fetch(batch.cursor, MOST_ROWS))
            if statement.changes:
                self.rowcount += batch.changes

    def executescript(self, script: str, /) -> Self:
        """Commit what is open and execute the statements of `script`; their rows are dropped."""
        connection = self._begin()
        with connection._locked():
            connection._script(script)
        return self

    # ---- rows -----------------------------------------------------------------------

    def fetchone(self) -> Any:
        """Return the next row, None when there is none."""
        self._begin()
        return next(self._each(), None)

    def fetchmany(self, size: int | None = None) -> list[Any]:
        """Return the next `size` rows, or as many as there are; :attr:`arraysize` when it is not given."""
        self._begin()
        wanted = self.arraysize if size is None else size
        rows: list[Any] = []
        each = self._each()
        while len(rows) < wanted:
            try:
                rows.append(next(each))
            except StopIteration:
                break
        return rows

    def fetchall(self) -> list[Any]:
        """Return all rows that are left."""
        self._begin()
        self._rows = MOST_ROWS
        return list(self._each())

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> Any:
        """Return the next row."""
        self._begin()
        return next(self._each())

    def close(self) -> None:
        """Forget the rows that are left; the cursor cannot be used any more."""
        if not self._ready:
            raise _errors.ProgrammingError("Base Cursor.__init__ not called.")
        if self._busy:
            raise _errors.ProgrammingError("Recursive use of cursors not allowed.")
        self.connection._check()
        with self.connection._locked():
            batch, self._batch = self._batch, None
            self._closed = True
            if batch is not None and batch.cursor and self._life == self.connection._life:
                self.connection._run(encode_end(batch.cursor))

    def setinputsizes(self, sizes: Any, /) -> None:
        """Do nothing: no size has to be known before."""

    def setoutputsize(self, size: Any, column: Any = None, /) -> None:
        """Do nothing: values of any size are returned."""

    # ---- inside -----------------------------------------------------------------------

    def _begin(self) -> Connection:
        if not self._ready:
            raise _errors.ProgrammingError("Base Cursor.__init__ not called.")
        if self._closed:
            raise _errors.ProgrammingError("Cannot operate on a closed cursor.")
        if self._busy:
            raise _errors.ProgrammingError("Recursive use of cursors not allowed.")
        self.connection._check()
        return self.connection

    def _reset(self) -> None:
        batch, self._batch = self._batch, None
        if batch is not None and batch.cursor:
            self.connection._forget(self._life, batch.cursor)

    def _take(self, batch: Batch) -> None:
        connection = self.connection
        detect = connection._detect_types
        self._life = connection._life
        self._rows = FIRST_ROWS
        self._batch = batch if batch.columns else None
        self.description = None
        self._converters = ()
        if batch.columns:
            self.description = tuple(
                (shown_name(name, detect), None, None, None, None, None, None) for name, _ in batch.names
            )
            if detect:
                self._converters = tuple(
                    converter_of(name, declared, detect) for name, declared in batch.names
                )

    def _each(self) -> Iterator[Any]:
        connection = self.connection
        while self._batch is not None:
            with connection._locked():
                batch = self._batch
                if len(batch):
                    self._busy = True
                    try:
                        values = self._values(batch.row())
                    finally:
                        self._busy = False
                    if not len(batch) and not batch.cursor:
                        self._batch = None
                elif not batch.cursor:
                    self._batch = None
                    return
                else:
                    self._more(batch)
                    continue
            yield values if self.row_factory is None else self.row_factory(self, values)

    def _more(self, batch: Batch) -> None:
        """Replace a batch that is read by the next one."""
        connection = self.connection
        self._batch = None  # a batch that failed is not asked for again
        if self._life != connection._life:
            raise _errors.InterfaceError("the connection was opened anew: its earlier statements are gone")
        self._rows = min(MOST_ROWS, self._rows * 4)
        new = connection._run(encode_fetch(batch.cursor, self._rows))
        new.names = batch.names
        self._batch = new
        if new.counts_changes:
            self.rowcount = new.changes

    def _values(self, row: list[Stored]) -> tuple[Any, ...]:
        factory = self.connection.text_factory
        values: list[Any] = list(row)
        for position, value in enumerate(row):
            converter = self._converters[position] if self._converters else None
            if converter is not None:
                raw = _as_bytes(value)
                values[position] = converter(raw) if raw else None
            elif type(value) is Text:
                values[position] = self._text(value, factory, position)
        return tuple(values)

    def _text(self, value: Text, factory: Any, position: int) -> Any:
        if factory is str:
            try:
                return value.decode()
            except UnicodeDecodeError:
                name = self.description[position][0] if self.description else ""
                shown = value.decode("ascii", "replace")
                raise _errors.OperationalError(
                    f"Could not decode to UTF-8 column '{name}' with text '{shown}'"
                ) from None
        return factory(bytes(value))


def _as_bytes(value: Stored) -> bytes:
    """Return what SQLite makes of a value when bytes are asked for; empty for NULL."""
    if value is None:
        return b""
    if isinstance(value, float):
        text = f"{value:.15g}"
        if "." not in text and "n" not in text:
            whole, exponent, power = text.partition("e")
            text = f"{whole}.0{exponent}{power}"
        return text.encode()
    return str(value).encode() if isinstance(value, int) else bytes(value)


def _encoded(values: Sequence[object]) -> bytes:
    try:
        return encode_set(values)
    except TypeError as error:
        (position,) = error.args
        kind = type(values[position]).__name__
        raise _errors.ProgrammingError(
            f"Error binding parameter {position + 1}: type '{kind}' is not supported"
        ) from None


def _bound(statement: Statement, parameters: Any) -> tuple[tuple[str, ...] | None, list[object]]:
    """Return the values for a statement's parameters, with their names where these count."""
    # As the C API tells a sequence: by its type, dictionaries aside.
    if isinstance(parameters, (tuple, list)) or (
        not isinstance(parameters, dict)
        and hasattr(type(parameters), "__getitem__")
        and not isinstance(parameters, Mapping)
    ):
        given = len(parameters)
        if given != statement.parameters:
            raise _errors.ProgrammingError(
                "Incorrect number of bindings supplied. The current statement uses "
                f"{statement.parameters}, and there are {given} supplied."
            )
        return None, [adapted(parameters[position]) for position in range(given)]
    if not isinstance(parameters, Mapping):
        raise _errors.ProgrammingError("parameters are of unsupported type")
    if statement.unnamed:
        raise _errors.ProgrammingError(
            f"Binding {statement.unnamed} has no name, but you supplied a dictionary (which has only names)."
        )
    values = []
    for name in statement.names:
        try:
            value = parameters[name]
        except LookupError:
            raise _errors.ProgrammingError(
                f"You did not supply a value for binding parameter :{name}."
            ) from None
        values.append(adapted(value))
    return statement.names, values
