"""The same names on trio: whatever may wait does so in a worker thread and can be cancelled.

Cancelling a call pauses it and gives it up, which costs its slot, as a time-out does.
Cancelling a request to the broker gives back what it would have granted.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from teemate._broker import DRAIN_DEADLINE, Broker, connect
from teemate._enclave import SLOT_WAIT
from teemate._grant import WAIT, GrantedEnclave
from teemate._slot import MAX_REPLY, OcallHandler, Slot
from teemate._types import (
    ClientInfo,
    Drained,
    EnclaveInfo,
    EnclaveStatistics,
    Exit,
    Revocation,
    Undrained,
    Upgraded,
)

if TYPE_CHECKING:
    from teemate._looking import DenialInfo, Holders
    from teemate.functions._trio import AsyncFunctions

__all__ = ["AsyncBroker", "AsyncEnclave", "AsyncSlot", "open_broker"]

_Result = TypeVar("_Result")


@asynccontextmanager
async def open_broker(
    path: str | os.PathLike[str] | None = None, *, client: str = ""
) -> AsyncGenerator[AsyncBroker, None]:
    """Connect to the broker as :func:`teemate.connect` does, for trio."""
    # As many threads as slots can be inside at once: a limit here would be a deadlock
    # where one call waits in the enclave for another.
    limiter = trio.CapacityLimiter(math.inf)
    broker = await _in_thread(limiter, lambda: connect(path, client=client))
    try:
        yield AsyncBroker(broker, limiter)
    finally:
        await _close(broker, limiter)


class _CancelledError(Exception):
    pass


async def _close(broker: Broker, limiter: trio.CapacityLimiter) -> None:
    """Close in any case; once the task is cancelled, without waiting for a broker that is away."""
    cancelled = False

    async def watch() -> None:
        nonlocal cancelled
        try:
            await trio.sleep_forever()
        except trio.Cancelled:  # our caller's next checkpoint raises it again
            cancelled = True

    def check() -> None:
        if cancelled:
            raise _CancelledError

    failure: Exception | None = None

    def close() -> None:
        nonlocal failure
        try:
            broker._close(check)
        except _CancelledError:
            pass
        except Exception as error:  # raised outside the nursery, which would wrap it
            failure = error

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        with trio.CancelScope(shield=True):
            await _in_thread(limiter, close)
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _in_thread(limiter: trio.CapacityLimiter, function: Callable[[], _Result]) -> _Result:
    return await trio.to_thread.run_sync(function, limiter=limiter)


class AsyncSlot:
    """A slot for one task at a time."""

    def __init__(self, slot: Slot, limiter: trio.CapacityLimiter) -> None:
        self._slot = slot
        self._limiter = limiter

    @property
    def index(self) -> int:
        """Number of the slot in the enclave."""
        return self._slot.index

    @property
    def broken(self) -> str | None:
        """Why the slot cannot be used any more."""
        return self._slot.broken

    async def call(
        self,
        name: str,
        payload: bytes | bytearray | memoryview = b"",
        timeout: float | None = None,  # noqa: ASYNC109 - the same meaning as in the synchronous API
        *,
        ocalls: Mapping[str, OcallHandler] | None = None,
        max_reply: int = MAX_REPLY,
    ) -> bytes:
        """Do the ECALL `name`: :meth:`teemate.Slot.call`.  OCALL handlers run in the worker thread."""
        return await _in_thread(
            self._limiter,
            lambda: self._slot._run(
                name, payload, timeout, ocalls, max_reply, trio.from_thread.check_cancelled
            ),
        )

    async def enter(
        self,
        rdi: int = 0,
        rsi: int = 0,
        rdx: int = 0,
        r8: int = 0,
        r9: int = 0,
        timeout: float | None = None,  # noqa: ASYNC109 - the same meaning as in the synchronous API
    ) -> Exit:
        """Enter once with these registers: :meth:`teemate.Slot.enter`."""
        return await _in_thread(
            self._limiter,
            lambda: self._slot._enter(rdi, rsi, rdx, r8, r9, timeout, trio.from_thread.check_cancelled),
        )


class AsyncEnclave:
    """An enclave of the broker's, mapped into this process."""

    def __init__(self, enclave: GrantedEnclave, limiter: trio.CapacityLimiter) -> None:
        self.sync = enclave
        """The enclave as the synchronous API has it."""
        self._limiter = limiter

    @property
    def name(self) -> str:
        """As the broker calls it."""
        return self.sync.name

    @property
    def mrenclave(self) -> bytes:
        """Its measurement."""
        return self.sync.mrenclave

    @property
    def base(self) -> int:
        """Address, the same in every process."""
        return self.sync.base

    @property
    def size(self) -> int:
        """Bytes of ELRANGE."""
        return self.sync.size

    @property
    def ocalls(self) -> dict[str, OcallHandler]:
        """Handlers for OCALLs by name; they run in worker threads."""
        return self.sync.ocalls

    def statistics(self) -> EnclaveStatistics:
        """Return what was done through this object."""
        return self.sync.statistics()

    @asynccontextmanager
    async def slot(self, wait: float = SLOT_WAIT) -> AsyncGenerator[AsyncSlot, None]:
        """Take a free slot for this task, waiting up to `wait` seconds for one."""
        slot = await _in_thread(
            self._limiter, lambda: self.sync._take(wait, trio.from_thread.check_cancelled)
        )
        try:
            yield AsyncSlot(slot, self._limiter)
        finally:
            with trio.CancelScope(shield=True):
                await _in_thread(self._limiter, lambda: self.sync._give_back(slot))

    async def acquire(self, count: int = 1, wait: float = WAIT) -> None:
        """Get `count` more slots: :meth:`teemate.GrantedEnclave.acquire`."""
        await _in_thread(
            self._limiter, lambda: self.sync._acquire(count, wait, trio.from_thread.check_cancelled)
        )

    async def release(self, count: int = 1) -> None:
        """Give `count` free slots back."""
        await _in_thread(self._limiter, lambda: self.sync._release(count, trio.from_thread.check_cancelled))

    async def detach(self) -> None:
        """Unmap the enclave and give the grant up."""
        with trio.CancelScope(shield=True):
            await _in_thread(self._limiter, self.sync.detach)


class AsyncBroker:
    """A connection to the broker; tasks may share it."""

    def __init__(self, broker: Broker, limiter: trio.CapacityLimiter) -> None:
        self.sync = broker
        """The connection as the synchronous API has it."""
        self._sync = broker._cancellable(trio.from_thread.check_cancelled)
        """The same for worker threads."""
        self._limiter = limiter

    async def ping(self) -> None:
        """Return when the broker has answered."""
        await self._request("ping")

    async def enclaves(self) -> list[EnclaveInfo]:
        """Return the enclaves that this client may see."""
        return await _in_thread(self._limiter, lambda: self.sync._enclaves(trio.from_thread.check_cancelled))

    @asynccontextmanager
    async def attach(
        self, name: str, slots: int = 1, wait: float = WAIT
    ) -> AsyncGenerator[AsyncEnclave, None]:
        """Attach for the time of the block: :meth:`teemate.Broker.attach`."""
        granted = await _in_thread(
            self._limiter, lambda: self.sync._attach(name, slots, wait, trio.from_thread.check_cancelled)
        )
        enclave = AsyncEnclave(granted, self._limiter)
        try:
            yield enclave
        finally:
            await enclave.detach()

    @property
    def functions(self) -> AsyncFunctions:
        """See :attr:`teemate.Broker.functions`."""
        return self.functions_of("functions")

    def functions_of(self, enclave: str) -> AsyncFunctions:
        """See :meth:`teemate.Broker.functions_of`."""
        from teemate.functions._trio import AsyncFunctions

        return AsyncFunctions(self.sync.functions_of(enclave), self._limiter)

    async def create(
        self,
        name: str,
        image: str | os.PathLike[str],
        sigstruct: bytes | str | os.PathLike[str],
        *,
        backend: str = "auto",
        debug: bool = False,
        owner: int | None = None,
    ) -> EnclaveInfo:
        """Have the broker build an enclave: :meth:`teemate.Broker.create`."""
        return await _in_thread(
            self._limiter,
            lambda: self._sync.create(name, image, sigstruct, backend=backend, debug=debug, owner=owner),
        )

    async def upgrade(
        self,
        name: str,
        image: str | os.PathLike[str],
        sigstruct: bytes | str | os.PathLike[str],
        *,
        deadline: float = DRAIN_DEADLINE,
        force: bool = False,
        lose_state: bool = False,
    ) -> Upgraded:
        """Replace an enclave by one from another image: :meth:`teemate.Broker.upgrade`."""
        return await _in_thread(
            self._limiter,
            lambda: self._sync.upgrade(
                name, image, sigstruct, deadline=deadline, force=force, lose_state=lose_state
            ),
        )

    async def destroy(self, name: str, *, force: bool = False) -> int:
        """Destroy an enclave: :meth:`teemate.Broker.destroy`."""
        return await _in_thread(self._limiter, lambda: self._sync.destroy(name, force=force))

    async def drain(
        self,
        name: str | None = None,
        *,
        deadline: float = DRAIN_DEADLINE,
        force: bool = False,
        reason: str | None = None,
    ) -> list[Drained]:
        """Wait for the holders of an enclave to leave: :meth:`teemate.Broker.drain`."""
        return await _in_thread(
            self._limiter,
            lambda: self._sync.drain(name, deadline=deadline, force=force, reason=reason),
        )

    async def undrain(self, name: str | None = None) -> Undrained:
        """Take drained enclaves into use again: :meth:`teemate.Broker.undrain`."""
        return await _in_thread(self._limiter, lambda: self._sync.undrain(name))

    async def revoke(
        self,
        *,
        grant: int | None = None,
        client: int | None = None,
        enclave: str | None = None,
        grace: float | None = None,
        reason: str | None = None,
    ) -> Revocation:
        """Take grants back: :meth:`teemate.Broker.revoke`."""
        return await _in_thread(
            self._limiter,
            lambda: self._sync.revoke(
                grant=grant, client=client, enclave=enclave, grace=grace, reason=reason
            ),
        )

    async def clients(self, *, activity: bool = False) -> list[ClientInfo]:
        """Return everybody who is connected: :meth:`teemate.Broker.clients`."""
        return await _in_thread(self._limiter, lambda: self._sync.clients(activity=activity))

    async def holders(self, enclave: str, *, calls: bool = False) -> Holders:
        """See :meth:`Broker.holders`."""
        return await _in_thread(self._limiter, lambda: self._sync.holders(enclave, calls=calls))

    async def denials(self, *, uid: int | None = None) -> list[DenialInfo]:
        """See :meth:`Broker.denials`."""
        return await _in_thread(self._limiter, lambda: self._sync.denials(uid=uid))

    async def reload(self) -> None:
        """See :meth:`Broker.reload`."""
        await _in_thread(self._limiter, self._sync.reload)

    async def stats(self) -> dict[str, Any]:
        """Return the broker's statistics, by part."""
        return await _in_thread(self._limiter, self._sync.stats)

    async def _request(self, op: str) -> dict[str, Any]:
        return await _in_thread(
            self._limiter, lambda: self.sync._request(op, check=trio.from_thread.check_cancelled)
        )
