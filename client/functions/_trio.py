"""The same on trio: each call in a worker thread, and cancellable as any call into an enclave is."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import trio

from teemate.functions._client import Functions
from teemate.functions._trio_streams import AsyncStreams
from teemate.functions._types import FunctionInfo, FunctionLimits, FunctionLog, FunctionUsage

if TYPE_CHECKING:
    from teemate.functions._sealing import Sealing, Upload

__all__ = ["AsyncFunctions"]

_Result = TypeVar("_Result")


class AsyncFunctions:
    """The caller's functions in one enclave: :class:`teemate.functions.Functions`.

    Cancelling an invocation gives its call up, which costs its slot; a `timeout` does not.
    """

    def __init__(self, functions: Functions, limiter: trio.CapacityLimiter) -> None:
        self.sync = functions
        """The same in the synchronous API."""
        self._limiter = limiter

    async def _run(self, function: Callable[[], _Result]) -> _Result:
        return await trio.to_thread.run_sync(function, limiter=self._limiter)

    async def deploy(
        self,
        name: str,
        module: bytes,
        *,
        limits: FunctionLimits | None = None,
        env: Mapping[str, str] | None = None,
        replace: bool = False,
        sealed: bool | Sealing = False,
        grants: Iterable[str] = (),
    ) -> FunctionInfo:
        """See :meth:`Functions.deploy`."""
        check = trio.from_thread.check_cancelled
        return await self._run(
            lambda: self.sync._deploy(name, module, limits, env, replace, sealed, grants, check)
        )

    async def deploy_sealed(
        self, name: str, upload: Upload, *, nonce: bytes | None = None, target: bytes = b""
    ) -> FunctionInfo:
        """See :meth:`Functions.deploy_sealed`; `upload` is called in a worker thread."""
        check = trio.from_thread.check_cancelled
        return await self._run(lambda: self.sync._deploy_sealed(name, upload, nonce, target, check))

    async def invoke(
        self,
        name: str,
        payload: bytes = b"",
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the same meaning as in the synchronous API
    ) -> bytes:
        """See :meth:`Functions.invoke`."""
        check = trio.from_thread.check_cancelled
        return await self._run(lambda: self.sync._invoke(name, payload, args, env, timeout, check))

    async def stream(
        self,
        name: str,
        source: AsyncIterable[bytes],
        sink: Callable[[bytes], Awaitable[object]],
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the same meaning as in the synchronous API
    ) -> None:
        """See :meth:`Functions.stream`; cancelled while it waits for `source` or `sink`, the slot is kept."""
        streams = AsyncStreams(source, sink)
        await self._run(
            lambda: streams.run(
                lambda ocalls: self.sync._stream(name, ocalls, args, env, timeout, streams.check)
            )
        )

    async def list(self) -> list[FunctionInfo]:
        """See :meth:`Functions.list`."""
        return await self._run(lambda: self.sync._list(trio.from_thread.check_cancelled))

    async def describe(self, name: str) -> FunctionInfo:
        """See :meth:`Functions.describe`."""
        return await self._run(lambda: self.sync._describe(name, trio.from_thread.check_cancelled))

    async def logs(self, name: str, *, after: int = 0) -> Sequence[FunctionLog]:
        """See :meth:`Functions.logs`."""
        return await self._run(lambda: self.sync._logs(name, after, trio.from_thread.check_cancelled))

    async def remove(self, name: str) -> None:
        """See :meth:`Functions.remove`."""
        await self._run(lambda: self.sync._remove(name, trio.from_thread.check_cancelled))

    async def limits(self, name: str, limits: FunctionLimits) -> FunctionInfo:
        """See :meth:`Functions.limits`."""
        return await self._run(lambda: self.sync._limits(name, limits, trio.from_thread.check_cancelled))

    async def clear_keys(self) -> None:
        """See :meth:`Functions.clear_keys`."""
        await self._run(lambda: self.sync._clear_keys(trio.from_thread.check_cancelled))

    async def give_back(self, idle: float) -> int:
        """See :meth:`Functions.give_back`."""
        return await self._run(lambda: self.sync._release(idle, trio.from_thread.check_cancelled))

    async def usage(self) -> FunctionUsage:
        """See :meth:`Functions.usage`."""
        return await self._run(lambda: self.sync._usage(trio.from_thread.check_cancelled))
