"""A database that is open in a slot of the enclave."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from teemate import errors as teemate_errors
from teemate._enclave import Enclave
from teemate._private import PrivateEnclave
from teemate.db import _errors
from teemate.db._attached import slot_of
from teemate.db._blob import Blob
from teemate.db._codes import NUMBERS
from teemate.db._cursor import Cursor, Parameters
from teemate.db._dump import dump
from teemate.db._errors import ROOM, error_of
from teemate.db._opening import LEVELS, answered, isolation, named, take_files
from teemate.db._statement import Statement, statement_of
from teemate.db._whole import Whole
from teemate.db._wire import (
    STOP_LATE,
    UNCACHED,
    Access,
    Batch,
    Failure,
    Opened,
    decode,
    encode_end,
    encode_execute,
    encode_fetch,
    encode_open,
    encode_run,
    encode_script,
    encode_set,
)

__all__ = ["Connection", "connect"]

REPLY = 65536
_SQL_LENGTH = NUMBERS["SQLITE_LIMIT_SQL_LENGTH"]
_VARIABLES = NUMBERS["SQLITE_LIMIT_VARIABLE_NUMBER"]
_LIMITS = {_SQL_LENGTH: 1_000_000_000, _VARIABLES: 32766}


class Connection(Whole):
    """A database that is open in a slot of an enclave: what :func:`connect` returns.

    It holds the slot until :meth:`close`, or until nobody has it any more.  Leaving it as a context
    manager commits, or rolls back after an exception, and leaves it open, as with sqlite3.

    A signal handler that raises while a statement runs (Ctrl-C) gives the call up and with it the slot:
    what was not committed is rolled back, and the connection has to be opened anew.
    :meth:`interrupt`, from another thread, ends the statement alone.
    """

    Warning = _errors.Warning
    Error = _errors.Error
    InterfaceError = _errors.InterfaceError
    DatabaseError = _errors.DatabaseError
    DataError = _errors.DataError
    OperationalError = _errors.OperationalError
    IntegrityError = _errors.IntegrityError
    InternalError = _errors.InternalError
    ProgrammingError = _errors.ProgrammingError
    NotSupportedError = _errors.NotSupportedError

    row_factory: Callable[..., Any] | None = None
    text_factory: Any = str
    _ready = False
    _life = 0

    def __init__(
        self,
        enclave: Enclave | str,
        database: str | bytes | os.PathLike[str] | os.PathLike[bytes] = ":memory:",
        timeout: float = 5.0,
        detect_types: int = 0,
        isolation_level: str | None = "",
        check_same_thread: bool = True,
        *,
        readonly: bool = False,
        create: bool = True,
        memory: int = 0,
        cursors: int = 0,
        statement_timeout: float = 0.0,
        uncached: bool = False,
    ) -> None:
        # As sqlite3 has it: __init__ of one that is open opens it anew.
        self._ready = False
        if self._slot is not None:
            self._leave()
        self._level = isolation(isolation_level)
        self._detect_types = detect_types
        self._check_thread = check_same_thread
        self._thread = threading.get_ident()
        self._lock = threading.RLock()
        self._forgotten: deque[int] = deque()
        self._transaction = self._stopped = False
        self._trace: Callable[[str], object] | None = None
        self._functions: set[str] = set()
        self._word = ctypes.c_uint32(0)
        # A private enclave's clock is told by calls: none comes while one statement runs.
        self._own_clock = statement_timeout if isinstance(enclave, PrivateEnclave) else 0.0
        self._limits = dict(_LIMITS)
        self.row_factory = None
        self.text_factory = str
        self._life += 1
        name, flags = named(database, readonly=readonly, create=create)
        request = encode_open(
            name,
            flags | (UNCACHED if uncached else 0),
            busy_ms=int(min(max(0.0, timeout), 86400.0) * 1000),
            cursors=cursors,
            memory=memory,
            statement_ms=int(statement_timeout * 1000),
        )
        self._held = contextlib.ExitStack()
        with contextlib.ExitStack() as held:
            slot = held.enter_context(slot_of(enclave) if isinstance(enclave, str) else enclave.slot())
            reply = answered(lambda: slot.call("db_open", request), f"open {database!r}")
            self._opened = Opened.parse(reply)
            try:
                take_files(slot, name, self._opened)
            except BaseException:
                with contextlib.suppress(teemate_errors.Error):
                    slot.call("db_close")
                raise
            self._held = held.pop_all()
        self._slot = slot
        self._has_file = bool(name)
        self._ready = True

    def __del__(self) -> None:
        """Close it; what is open is rolled back."""
        if self._slot is not None:
            with contextlib.suppress(teemate_errors.Error):
                self._leave()

    def __enter__(self) -> Self:
        """Return itself."""
        self._check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit, or roll back after an exception."""
        if kind is not None:
            self.rollback()
            return
        try:
            self.commit()
        except BaseException:
            self.rollback()
            raise

    # ---- statements ---------------------------------------------------------------------

    def cursor(self, factory: Callable[..., Any] = Cursor) -> Any:
        """Return a new cursor, made by `factory`."""
        self._check()
        cursor = factory(self)
        if not issubclass(type(cursor), Cursor):
            raise TypeError(f"factory must return a cursor, not {type(cursor).__name__}")
        if self.row_factory is not None:
            cursor.row_factory = self.row_factory
        return cursor

    def execute(self, sql: str, parameters: Parameters = (), /) -> Cursor:
        """Execute one statement with a new cursor and return that."""
        cursor: Cursor = self.cursor()
        return cursor.execute(sql, parameters)

    def executemany(self, sql: str, parameters: Iterable[Parameters], /) -> Cursor:
        """Execute a statement once for each of `parameters` with a new cursor and return that."""
        cursor: Cursor = self.cursor()
        return cursor.executemany(sql, parameters)

    def executescript(self, script: str, /) -> Cursor:
        """Execute the statements of `script` with a new cursor and return that."""
        cursor: Cursor = self.cursor()
        return cursor.executescript(script)

    def commit(self) -> None:
        """End the transaction that is open, if one is: what it did stays."""
        self._end("COMMIT")

    def rollback(self) -> None:
        """End the transaction that is open, if one is: what it did is undone."""
        self._end("ROLLBACK")

    def close(self) -> None:
        """Roll back what is open and give the slot back."""
        if not self._ready:
            raise _errors.ProgrammingError("Base Connection.__init__ not called.")
        self._check_here()
        with self._lock:
            if self._slot is not None:
                self._leave()

    def interrupt(self) -> None:
        """End the statement that runs in another thread, with an :class:`OperationalError`."""
        if not self._ready or self._slot is None:
            self._check()
        self._word.value = 1

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        self._check()
        return self._transaction

    @property
    def total_changes(self) -> int:
        """How many rows were changed since the connection was opened."""
        self._check()
        with self._locked():
            (count,) = self._run(encode_execute(b"SELECT total_changes()", rows=1)).row()
        assert isinstance(count, int)
        return count

    @property
    def isolation_level(self) -> str | None:
        """How transactions begin by themselves: "", DEFERRED, IMMEDIATE, EXCLUSIVE; None: they do not."""
        if not self._ready:
            raise _errors.ProgrammingError("Base Connection.__init__ not called.")
        return self._level

    @isolation_level.setter
    def isolation_level(self, level: str | None) -> None:
        self._check()
        self._level = isolation(level)
        if level is None:
            self.commit()

    @property
    def access(self) -> Access:
        """How it is open: READ where only that was granted or asked for, OWNER for who has made it."""
        self._check()
        return self._opened.access

    # ---- what sqlite3 has besides -------------------------------------------------------------

    def blobopen(
        self, table: str, column: str, row: int, /, *, readonly: bool = False, name: str = "main"
    ) -> Blob:
        """Open the blob or text in `column` of `row` of `table`, to read and write it in parts."""
        self._check()
        return Blob(self, table, column, row, name, readonly)

    def getlimit(self, category: int, /) -> int:
        """Return the limit of `category`: SQLITE_LIMIT_SQL_LENGTH or SQLITE_LIMIT_VARIABLE_NUMBER."""
        self._check()
        if category not in NUMBERS.values() or not 0 <= category <= NUMBERS["SQLITE_LIMIT_WORKER_THREADS"]:
            raise _errors.ProgrammingError("'category' is out of bounds")
        if category not in self._limits:
            raise _errors.NotSupportedError("this limit is the image's own, and is not told")
        return self._limits[category]

    def setlimit(self, category: int, limit: int, /) -> int:
        """Set a limit that :meth:`getlimit` tells, and return what it was; statements are held to it here."""
        before = self.getlimit(category)
        if limit >= 0:
            self._limits[category] = min(limit, _LIMITS[category])
        return before

    def set_trace_callback(self, trace: Callable[[str], object] | None, /) -> None:
        """Have `trace` called with each statement before it is sent, not its parameters."""
        self._check()
        self._trace = trace

    def create_function(
        self,
        name: str,
        narg: int,
        func: Callable[..., Any] | None,
        /,
        *,
        deterministic: bool = False,
    ) -> None:
        """Remember that `name` is a function of this program: statements with it are not supported.

        For libraries that register functions which few statements use (SQLAlchemy's ``regexp``).  Instead
        of one that SQLite has itself none can be put.
        """
        self._check()
        with self._locked():
            sql = b"SELECT count(*) FROM pragma_function_list WHERE name = lower(?)"
            known = self._run(encode_execute(sql, [encode_set([name])], parameters=1, rows=1)).row()
            if known != [0]:
                self._unsupported()
            self._functions.add(name.lower())

    def iterdump(self, *, filter: str | None = None) -> Iterator[str]:  # noqa: A002
        """Yield statements that make the database again, in the clear, as the shell's ``.dump`` writes them.

        `filter` is a LIKE pattern that names of tables, indices, views and triggers have to fit.  Within a
        transaction (``BEGIN``) it is one state of the database; without, others may write between two tables.
        """
        self._check()
        return dump(self, filter)

    def _unsupported(self, *_args: object, **_options: object) -> Any:
        self._check()
        raise _errors.NotSupportedError(
            "not with a database in an enclave: nothing of this program is called from inside, and its file "
            "is read by nobody else"
        )

    create_aggregate = create_collation = _unsupported
    create_window_function = deserialize = enable_load_extension = load_extension = _unsupported
    serialize = set_authorizer = set_progress_handler = _unsupported

    # ---- for cursors ---------------------------------------------------------------------------

    def _check_here(self) -> None:
        if self._check_thread and threading.get_ident() != self._thread:
            raise _errors.ProgrammingError(
                "SQLite objects created in a thread can only be used in that same thread. The object was "
                f"created in thread id {self._thread} and this is thread id {threading.get_ident()}."
            )

    def _check(self) -> None:
        if not self._ready:
            raise _errors.ProgrammingError("Base Connection.__init__ not called.")
        self._check_here()
        if self._slot is None:
            raise _errors.ProgrammingError("Cannot operate on a closed database.")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            self._check()
            yield

    def _statement(self, sql: str) -> Statement:
        if not isinstance(sql, str):
            raise TypeError(f"SQL has to be str, not {type(sql).__name__}")
        statement = statement_of(sql)
        self._fits(sql)
        if statement.parameters > self._limits[_VARIABLES]:
            raise _errors.OperationalError("too many SQL variables")
        return statement

    def _fits(self, sql: str) -> None:
        if len(sql) > self._limits[_SQL_LENGTH] or len(sql.encode()) > self._limits[_SQL_LENGTH]:
            raise _errors.DataError("query string is too large")

    def _begin_for(self, statement: Statement) -> int:
        """Return the enum db_begin for `statement`."""
        return LEVELS[self._level] if statement.changes and self._level is not None else 0

    def _forget(self, life: int, cursor: int) -> None:
        """Have the enclave end `cursor` with the next call; what a destructor may do."""
        if life == self._life:
            self._forgotten.append(cursor)

    def _end(self, how: str) -> None:
        self._check()
        with self._locked():
            if how == "ROLLBACK" and self._out_of_use():
                self._transaction = False
            if self._transaction:
                self._run(encode_execute(how.encode(), rows=0), trace=statement_of(how))

    def _script(self, script: str) -> None:
        if not isinstance(script, str):
            raise TypeError(f"SQL has to be str, not {type(script).__name__}")
        if "\0" in script:
            raise ValueError("embedded null character")
        sql = script.encode()
        self._fits(script)
        self._end("COMMIT")
        self._run(encode_script(sql), trace=None)

    def _run(self, operation: bytes, *, trace: Statement | None = None) -> Batch:
        """Do one operation, whose result is all of the answer; under the lock."""
        if trace is not None and self._trace is not None:
            if self._begin_for(trace) and not self._transaction:
                self._trace(f"BEGIN {self._level}")
            self._trace(trace.text)
        ended = [encode_end(self._forgotten.popleft()) for _ in range(len(self._forgotten))]
        room = REPLY
        self._begin_call()
        while True:
            request = encode_run([*ended, operation], ctypes.addressof(self._word))
            try:
                with self._timed():
                    reply = self._slot.call("db_run", request, max_reply=room)
            except teemate_errors.Error as error:
                raise _errors.OperationalError(str(error)) from error
            batches, failure = decode(reply)
            if failure is not None:
                self._transaction = failure.transaction
                if failure.code == ROOM:
                    # The statement is at its first row, which is asked for again with more room.
                    ended, operation, room = [], encode_fetch(failure.set, 1, describe=True), failure.needed
                    continue
                raise self._error(failure)
            if len(batches) == len(ended) + 1:
                self._transaction = batches[-1].transaction
                return batches[-1]
            ended = ended[len(batches) :]

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Have a statement end when its time is over where the enclave's clock stands still meanwhile."""
        if not self._own_clock:
            yield
            return
        timer = threading.Timer(self._own_clock, lambda: setattr(self._word, "value", STOP_LATE))
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _begin_call(self) -> None:
        """Forget an interruption that was for an earlier call, but not one that was for the task."""
        self._word.value = 0
        if self._stopped:
            self._word.value = 1

    def _stop(self) -> None:
        """Interrupt what runs, and whatever it goes on with, until :meth:`_go_on`."""
        self._stopped = True
        self._word.value = 1

    def _go_on(self) -> None:
        self._stopped = False

    def _error(self, failure: Failure) -> _errors.Error:
        error = error_of(failure.code, failure.message)
        name = failure.message.removeprefix("no such function: ")
        if name != failure.message and name.lower() in self._functions:
            return _errors.NotSupportedError(
                f"the function {name} is this program's, and is not called from inside the enclave"
            )
        return error

    def _out_of_use(self) -> bool:
        """Whether the slot is, whose repair rolls back what was open in it."""
        return self._slot.broken is not None or self._slot.revoked is not None

    def _leave(self) -> None:
        gone = self._out_of_use()
        slot, self._slot = self._slot, None
        self._transaction = False
        self._forgotten.clear()
        with self._held:
            if not gone:
                with contextlib.suppress(teemate_errors.Error):
                    slot.call("db_close")


def connect(
    enclave: Enclave | str,
    database: str | bytes | os.PathLike[str] | os.PathLike[bytes] = ":memory:",
    timeout: float = 5.0,
    detect_types: int = 0,
    isolation_level: str | None = "",
    check_same_thread: bool = True,
    factory: Callable[..., Any] = Connection,
    **options: Any,
) -> Any:
    """Open a database in a slot of an enclave.

    Parameters
    ----------
    enclave
        One that is attached, or the name of one that the broker at ``TEEMATE_SOCKET`` shares: that is
        attached until the last connection by this name is closed.
    database
        ``:memory:``, in EPC and of this connection alone, or a name: 1 to 48 of A-Z a-z 0-9 . _ -,
        beginning with a letter or digit.
    timeout
        Seconds to wait for another connection's lock.
    detect_types, isolation_level, check_same_thread, factory
        As for ``sqlite3.connect``.
    readonly, create
        Whether nothing may be written; whether the database is made when it is not there.
    memory
        Bytes of the enclave's heap that the connection may take, its page cache included; 0: 8 MiB.
    cursors
        Statements that may be half read at a time; 0: 256.
    statement_timeout
        Seconds that a statement may take, a quarter of a second coarse; 0: no limit.
    uncached
        Read what the host has now, instead of pages that the enclave still knows: for ``PRAGMA
        integrity_check``, which then finds what the host has changed.

    Raises
    ------
    OperationalError
        The database cannot be opened.
    Error
        Of :mod:`teemate`: the enclave is not to be had.

    """
    return factory(enclave, database, timeout, detect_types, isolation_level, check_same_thread, **options)
