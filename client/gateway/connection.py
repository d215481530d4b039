"""One client's connection: what goes wrong on it ends it alone, and who does not take an answer is cut off.

hypercorn has a worker end with whatever a connection raises, waits for ever until what it sends is taken,
and cannot be told otherwise, so its class for connections is replaced.
"""

from __future__ import annotations

from typing import Any, final

import trio
from hypercorn.trio.tcp_server import TCPServer
from structlog.typing import FilteringBoundLogger

from .admission import Admission
from .app import SEND_SECONDS
from .streaming import TAKEN_BY

__all__ = ["Connection"]


@final
class Connection(TCPServer):
    """hypercorn's, with bounds."""

    def __init__(self, log: FilteringBoundLogger, admission: Admission, *given: Any) -> None:
        *others, stream = given
        super().__init__(*others, _Stream(stream))
        self._log = log
        self._admission = admission

    async def run(self) -> None:
        """Serve until it is closed."""
        try:
            with self._admission.arrival():
                await super().run()
        except* Exception as group:
            self._log.error("connection failed", exc_info=group)


@final
class _Stream:
    """A stream whose other end has to take each piece in time; no subclass, which trio does not allow."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket
        self.receive_some = stream.receive_some
        self.send_eof = stream.send_eof
        self.aclose = stream.aclose

    async def send_all(self, data: bytes) -> None:
        with trio.move_on_at(min(trio.current_time() + SEND_SECONDS, TAKEN_BY.get())) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            await trio.aclose_forcefully(self._stream)
            raise trio.BrokenResourceError("what was sent was not taken in time")
