"""Databases on trio: statements are done in worker threads, and cancelling ends them in the enclave.

::

    async with db.open_connection("db", "ledger") as connection:
        async with connection.transaction():
            await connection.execute("INSERT INTO person VALUES (?, ?)", ("Ada", 1815))
        async for name, born in await connection.execute("SELECT * FROM person"):
            print(name, born)

A task whose scope is cancelled interrupts the statement that runs for it and waits until it has ended, which
takes microseconds; the connection is as usable afterwards as after :meth:`Connection.interrupt`: of an
INSERT, UPDATE or DELETE the whole transaction is rolled back (:attr:`AsyncConnection.in_transaction` tells).
A statement that has ended by then has been done, and its task goes on to its next checkpoint.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar, final

import trio

from teemate import _trio
from teemate._enclave import Enclave
from teemate.db import _copying
from teemate.db._attached import slot_of
from teemate.db._codes import NUMBERS
from teemate.db._connection import Connection, connect
from teemate.db._copying import Progress
from teemate.db._cursor import Cursor, Parameters
from teemate.db._wire import Access, Description, Listing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from teemate._slot import Slot

__all__ = [
    "AsyncConnection",
    "AsyncCursor",
    "async_databases",
    "async_delete",
    "async_import_file",
    "open_connection",
]

_Result = TypeVar("_Result")
_Source: TypeAlias = _trio.AsyncEnclave | Enclave | str
_INTERRUPT = NUMBERS["SQLITE_INTERRUPT"]


class _ByName:
    """Where connect() takes its slot: of an enclave that is attached by name; waiting can be cancelled."""

    def __init__(self, name: str) -> None:
        self._name = name

    def slot(self) -> AbstractContextManager[Slot]:
        return slot_of(self._name, trio.from_thread.check_cancelled)


class _Held:
    """The same of a slot that is there already."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        yield self._slot


@asynccontextmanager
async def open_connection(
    enclave: _Source,
    database: str | bytes | os.PathLike[str] | os.PathLike[bytes] = ":memory:",
    **options: Any,
) -> AsyncGenerator[AsyncConnection, None]:
    """Open a database for the time of the block: :func:`connect`, whose options these are, for trio.

    Tasks may share the connection; their statements are done one after the other, and a transaction is
    everybody's.  At the end what was not committed is rolled back, and a statement that still runs for
    another task is interrupted.
    """
    limiter = trio.CapacityLimiter(math.inf)
    options["check_same_thread"] = False
    if isinstance(enclave, _trio.AsyncEnclave):
        async with enclave.slot() as slot:
            async with _opened(_Held(slot._slot), database, options, limiter) as connection:
                yield connection
    else:
        source = _ByName(enclave) if isinstance(enclave, str) else enclave
        async with _opened(source, database, options, limiter) as connection:
            yield connection


@asynccontextmanager
async def _opened(
    source: Any, database: Any, options: dict[str, Any], limiter: trio.CapacityLimiter
) -> AsyncGenerator[AsyncConnection, None]:
    connection: Connection = await trio.to_thread.run_sync(
        lambda: connect(source, database, **options), limiter=limiter
    )
    opened = AsyncConnection(connection, limiter)
    try:
        yield opened
    finally:
        opened._closing = True
        connection._stop()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(connection.close, limiter=limiter)


@final
class AsyncConnection:
    """A database that is open in a slot, for tasks: what :func:`open_connection` gives."""

    def __init__(self, connection: Connection, limiter: trio.CapacityLimiter) -> None:
        self.sync = connection
        """The connection as the synchronous API has it; not while a task waits for this one."""
        self._limiter = limiter
        self._turn = trio.Lock()
        self._closing = False

    # ---- statements -----------------------------------------------------------------

    def cursor(self) -> AsyncCursor:
        """Return a new cursor."""
        return AsyncCursor(self, self.sync.cursor())

    async def execute(self, sql: str, parameters: Parameters = (), /) -> AsyncCursor:
        """Execute one statement with a new cursor and return that."""
        return await self.cursor().execute(sql, parameters)

    async def executemany(self, sql: str, parameters: Iterable[Parameters], /) -> AsyncCursor:
        """Execute a statement once for each of `parameters` with a new cursor and return that."""
        return await self.cursor().executemany(sql, parameters)

    async def executescript(self, script: str, /) -> AsyncCursor:
        """Execute the statements of `script` with a new cursor and return that."""
        return await self.cursor().executescript(script)

    async def commit(self) -> None:
        """End the transaction that is open, if one is: what it did stays."""
        await self._do(self.sync.commit)

    async def rollback(self) -> None:
        """End the transaction that is open, if one is: what it did is undone."""
        await self._do(self.sync.rollback)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[None, None]:
        """Commit what was done in the block, or roll it back after an exception, cancellation among them."""
        try:
            yield
            await self.commit()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.rollback()
            raise

    def interrupt(self) -> None:
        """End the statement that runs for another task, with an :class:`OperationalError`."""
        self.sync.interrupt()

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self.sync.in_transaction

    @property
    def row_factory(self) -> Callable[..., Any] | None:
        """What makes rows of the cursors that are made from now on."""
        return self.sync.row_factory

    @row_factory.setter
    def row_factory(self, factory: Callable[..., Any] | None) -> None:
        self.sync.row_factory = factory

    async def total_changes(self) -> int:
        """Return how many rows were changed since the connection was opened."""
        return await self._do(lambda: self.sync.total_changes)

    # ---- the database as a whole --------------------------------------------------------

    @property
    def access(self) -> Access:
        """How it is open."""
        return self.sync.access

    async def describe(self) -> Description:
        """See :meth:`Connection.describe`."""
        return await self._do(self.sync.describe)

    async def grant(self, *, uid: int | None = None, gid: int | None = None, readonly: bool = True) -> None:
        """See :meth:`Connection.grant`."""
        await self._do(lambda: self.sync.grant(uid=uid, gid=gid, readonly=readonly))

    async def revoke(self, *, uid: int | None = None, gid: int | None = None) -> None:
        """See :meth:`Connection.revoke`."""
        await self._do(lambda: self.sync.revoke(uid=uid, gid=gid))

    async def limit(self, size: int) -> None:
        """See :meth:`Connection.limit`."""
        await self._do(lambda: self.sync.limit(size))

    async def backup(
        self, target: str, *, pages: int = -1, progress: Callable[[int, int, int], object] | None = None
    ) -> None:
        """See :meth:`Connection.backup`; when it is cancelled nothing is left of `target`."""
        await self._do(lambda: self.sync.backup(target, pages=pages, progress=progress))

    async def export(
        self, path: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None
    ) -> None:
        """See :meth:`Connection.export`; when it is cancelled `path` is what it was."""
        await self._do(lambda: self.sync.export(path, force=force, progress=progress))

    async def iterdump(self, *, filter: str | None = None) -> AsyncGenerator[str, None]:  # noqa: A002
        """See :meth:`Connection.iterdump`."""
        statements = self.sync.iterdump(filter=filter)
        while (statement := await self._do(lambda: next(statements, None))) is not None:
            yield statement

    # ---- for cursors ----------------------------------------------------------------------

    async def _do(self, function: Callable[[], _Result]) -> _Result:
        """Do it in a thread, one at a time; a cancelled scope interrupts it."""
        async with self._turn:
            return await self._interruptible(function)

    async def _interruptible(self, function: Callable[[], _Result]) -> _Result:
        done = stopped = False
        results: list[_Result] = []
        failure: Exception | None = None

        async def watch() -> None:
            nonlocal stopped
            try:
                await trio.sleep_forever()
            except trio.Cancelled:  # raised again below, unless the statement was faster
                if not done:
                    stopped = True
                    self.sync._stop()

        def run() -> None:
            nonlocal failure
            try:
                results.append(function())
            except Exception as error:  # raised outside the nursery, which would wrap it
                failure = error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(run, limiter=self._limiter)
            done = True
            nursery.cancel_scope.cancel()
        if not self._closing:
            self.sync._go_on()
        if failure is None:
            return results[0]
        if stopped and getattr(failure, "sqlite_errorcode", None) == _INTERRUPT:
            await trio.lowlevel.checkpoint_if_cancelled()
        raise failure


# ---- databases that are not open ------------------------------------------------------------


async def async_import_file(
    enclave: _Source, path: str | os.PathLike[str], database: str, *, progress: Progress | None = None
) -> None:
    """See :func:`import_file`; `progress` is called in a worker thread.

    When it is cancelled nothing is left of `database`.  A file whose pages are not of 4096 bytes is copied
    first: until that is done, cancelling waits.
    """
    async with open_connection(enclave) as connection:
        await connection._do(
            lambda: _copying.import_by(connection.sync, Path(path), database, progress=progress)
        )


async def async_delete(enclave: _Source, database: str) -> None:
    """See :func:`delete`."""
    async with open_connection(enclave) as connection:
        await connection._do(lambda: _copying.delete_by(connection.sync, database))


async def async_databases(enclave: _Source) -> list[Listing]:
    """See :func:`databases`."""
    async with open_connection(enclave) as connection:
        return await connection._do(lambda: _copying.databases_by(connection.sync))


@final
class AsyncCursor:
    """A statement's way through its rows, for tasks."""

    def __init__(self, connection: AsyncConnection, cursor: Cursor) -> None:
        self.connection = connection
        self.sync = cursor
        """The cursor as the synchronous API has it."""

    @property
    def description(self) -> tuple[tuple[Any, ...], ...] | None:
        """A tuple of 7 for each column: its name and 6 times None."""
        return self.sync.description

    @property
    def rowcount(self) -> int:
        """Rows that an INSERT, UPDATE, DELETE or REPLACE has changed; else -1."""
        return self.sync.rowcount

    @property
    def lastrowid(self) -> int | None:
        """The last row that was inserted."""
        return self.sync.lastrowid

    async def execute(self, sql: str, parameters: Parameters = (), /) -> Self:
        """Execute one statement with `parameters`: a sequence for ``?``, a mapping for ``:name``."""
        await self.connection._do(lambda: self.sync.execute(sql, parameters))
        return self

    async def executemany(self, sql: str, parameters: Iterable[Parameters], /) -> Self:
        """Execute a statement once for each of `parameters`, which a worker thread iterates over."""
        await self.connection._do(lambda: self.sync.executemany(sql, parameters))
        return self

    async def executescript(self, script: str, /) -> Self:
        """Commit what is open and execute the statements of `script`; their rows are dropped."""
        await self.connection._do(lambda: self.sync.executescript(script))
        return self

    async def fetchone(self) -> Any:
        """Return the next row, None when there is none."""
        return await self._next(self.sync.fetchone)

    async def fetchmany(self, size: int | None = None) -> list[Any]:
        """Return the next `size` rows, or as many as there are."""
        return await self.connection._do(lambda: self.sync.fetchmany(size))

    async def fetchall(self) -> list[Any]:
        """Return all rows that are left."""
        return await self.connection._do(self.sync.fetchall)

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Any:
        """Return the next row."""
        end = object()
        row = await self._next(lambda: next(self.sync, end))
        if row is end:
            raise StopAsyncIteration
        return row

    async def aclose(self) -> None:
        """Forget the rows that are left; the cursor cannot be used any more."""
        with trio.CancelScope(shield=True):
            await self.connection._do(self.sync.close)

    async def _next(self, function: Callable[[], Any]) -> Any:
        """Do what reads one row: without a thread where that is here already."""
        batch = self.sync._batch
        if not batch:
            return await self.connection._do(function)
        async with self.connection._turn:
            row = function()
        await trio.lowlevel.checkpoint()
        return row
