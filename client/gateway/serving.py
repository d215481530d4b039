"""Accepts connections and serves them, until told to stop; hypercorn speaks HTTP on each.

All workers accept from the same sockets, and the kernel gives a connection to whichever comes first.  Who
has no slot free leaves it to the others for as long as one of them has: else it would wait here beside a
worker that does nothing.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import final

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from structlog.typing import FilteringBoundLogger

from .admission import Admission
from .app import Gateway
from .connection import Connection

__all__ = ["Listener", "serve"]

HEAD_START = 0.5
"""Seconds that a connection is left to others: who has a slot free takes it at once, unless it is held up."""
_LOOKS = 25
"""How often a worker looks meanwhile: none tells another that its slots are taken."""
_OWN_ERRORS = {
    *(errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM),  # trio makes a pause after these
    *(errno.EBADF, errno.EINVAL, errno.ENOTSOCK),
}
"""What accept(2) fails with for a reason of ours; all else it tells of a connection that is no more."""


@final
class Listener(trio.abc.Listener[trio.SocketStream]):
    """A socket that all workers accept from, which stays the caller's."""

    def __init__(self, sock: socket.socket, admission: Admission) -> None:
        self._sock = sock
        self._admission = admission
        sock.setblocking(False)

    async def accept(self) -> trio.SocketStream:
        """Return the next connection that nobody else has taken."""
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            await trio.lowlevel.checkpoint()  # the one before counts as arrived when its task has begun
            for _ in range(_LOOKS):
                if not self._admission.gives_way():
                    break
                await trio.sleep(HEAD_START / _LOOKS)
            try:
                connection, _ = self._sock.accept()
            except OSError as error:
                if error.errno in _OWN_ERRORS:
                    raise
                continue  # somebody else has it, or it has failed already, or a filter wants none of it
            return trio.SocketStream(trio.socket.from_stdlib_socket(connection))

    async def aclose(self) -> None:
        """Accept no more; the socket is others' too."""
        await trio.lowlevel.checkpoint()


async def serve(
    gateway: Gateway,
    config: Config,
    listeners: Sequence[socket.socket],
    log: FilteringBoundLogger,
    *,
    stop: Callable[[], Awaitable[None]],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `stop` returns, and for the grace of `config` what is under way then."""
    context = WorkerContext(None)
    handler = partial(
        Connection, log, gateway.admission, ASGIWrapper(gateway), config, context, ConnectionState({})
    )
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(
                partial(
                    trio.serve_listeners,
                    handler,
                    [Listener(sock, gateway.admission) for sock in listeners],
                    handler_nursery=connections,
                )
            )
            with gateway.admission.accepting():
                task_status.started()
                await stop()
            accepting.cancel_scope.cancel()
        await context.terminated.set()
        connections.cancel_scope.deadline = trio.current_time() + config.graceful_timeout
