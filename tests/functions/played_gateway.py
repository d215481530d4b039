"""``teemate-gateway`` whose workers play the functions, for what its processes do; a program."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

import teemate
from teemate.gateway import serving, supervisor, worker
from teemate.gateway.app import Functions
from teemate.gateway.settings import Settings

WORKER = "--worker"


class _Played:
    """``echo``, and ``hold``: notes in a folder that it runs, and waits for a writer of the FIFO there."""

    async def invoke(
        self,
        name: str,
        payload: bytes,
        *,
        args: Sequence[str] = (),
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> bytes:
        if name == "hold":
            await trio.to_thread.run_sync(_hold, Path(args[0]), abandon_on_cancel=True)
            return str(os.getpid()).encode()
        return payload

    async def stream(
        self,
        name: str,
        source: AsyncIterable[bytes],
        sink: Callable[[bytes], Awaitable[object]],
        *,
        args: Sequence[str] = (),
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> None:
        """Each piece as it comes; ``hold`` as above.  With NO_STREAMS set none begins."""
        if "NO_STREAMS" in os.environ:
            raise teemate.Unsupported("streams are switched off for this test")
        if name == "hold":
            await sink(await self.invoke(name, b"", args=args, timeout=timeout))
            return
        async for piece in source:
            await sink(piece)


def _hold(folder: Path) -> None:
    (folder / f"{os.getpid()}.{uuid.uuid4()}").touch()
    os.close(os.open(folder / "fifo", os.O_RDONLY))


@asynccontextmanager
async def _play(_settings: Settings) -> AsyncGenerator[tuple[Functions, worker.Ping], None]:
    while os.path.exists(os.environ.get("NOT_READY", "")):  # noqa: ASYNC110, ASYNC240
        await trio.sleep(0.01)
    yield _Played(), trio.lowlevel.checkpoint


if __name__ == "__main__":
    if WORKER in sys.argv:
        sys.argv.remove(WORKER)
        worker.open_functions = _play
        serving.HEAD_START = float(os.environ.get("HEAD_START", serving.HEAD_START))
        worker.main()
    else:
        supervisor.WORKER = (sys.executable, __file__, WORKER)
        from teemate.gateway.main import main

        main()
