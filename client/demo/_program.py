"""One program of the demonstration as the one who leads it sees it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Self

import trio

from teemate.demo._prepare import end_process
from teemate.errors import CallTimeout, InternalError, from_code

__all__ = ["Program"]


class Program:
    """A fresh interpreter that runs ``teemate.demo.client``, and its messages."""

    def __init__(self, process: trio.Process, name: str) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._buffer = b""

    @classmethod
    async def start(cls, name: str, arguments: list[str]) -> Self:
        """Start it; whoever calls has to :meth:`end` it."""
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "teemate.demo.client", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for who leads; it ends the programs
        )
        return cls(process, name)

    async def tell(self, word: str) -> None:
        """Give the word for the next phase."""
        if self._process.stdin is None:
            raise InternalError(f"{self.name} has no input")
        # When it has ended already, what it said last tells why.
        with contextlib.suppress(trio.BrokenResourceError):
            await self._process.stdin.send_all(word.encode() + b"\n")

    async def hear(
        self, event: str, limit: float, progress: Callable[[int], None] = lambda _done: None
    ) -> dict[str, Any]:
        """Return its next message, which has to be `event`; progress reports on the way are passed on."""
        with trio.move_on_after(limit):
            while True:
                message = await self._message()
                if message["event"] == event:
                    return message
                if message["event"] != "progress":
                    break
                progress(message["calls"])
            if message["event"] == "error":
                raise from_code(message["code"], f"{self.name}: {message['message']}")
            raise InternalError(f"{self.name} said {message['event']!r} instead of {event!r}")
        raise CallTimeout(f"{self.name} did not get to {event!r} within {limit:g} s")

    async def finish(self, limit: float) -> None:
        """Wait for its end, which has to be a good one."""
        with trio.move_on_after(limit):
            status = await self._process.wait()
            if status:
                raise InternalError(f"{self.name} ended with status {status}")
            return
        raise CallTimeout(f"{self.name} did not end within {limit:g} s")

    async def end(self) -> None:
        """End it in any case."""
        await end_process(self._process, grace=2.0)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with trio.CancelScope(shield=True):
                    await stream.aclose()

    async def _message(self) -> dict[str, Any]:
        if self._process.stdout is None:
            raise InternalError(f"{self.name} has no output")
        while b"\n" not in self._buffer:
            data = await self._process.stdout.receive_some(65536)
            if not data:
                status = await self._process.wait()
                raise InternalError(f"{self.name} ended with status {status}, without saying why")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
