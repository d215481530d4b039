"""A worker: serves the supervisor's sockets until it is told to end, or the supervisor has."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio
from hypercorn.config import Config
from structlog.typing import FilteringBoundLogger

import teemate
from teemate.functions._trio import AsyncFunctions

from .app import Functions, Gateway
from .log import configure_log
from .places import Places
from .serving import serve
from .settings import Settings

__all__ = ["READY", "main"]

READY = b"ready"
KEEP_ALIVE_SECONDS = 30.0
Ping = Callable[[], Awaitable[None]]


async def _serve(
    settings: Settings,
    listeners: list[socket.socket],
    control: socket.socket,
    places: Places,
    log: FilteringBoundLogger,
) -> None:
    config = Config()
    config.errorlog = logging.getLogger("teemate.gateway.hypercorn")
    config.loglevel = "WARNING"
    config.include_server_header = False
    config.graceful_timeout = settings.grace
    config.keep_alive_timeout = KEEP_ALIVE_SECONDS
    config.h2_max_concurrent_streams = settings.slots + settings.queue
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with open_functions(settings) as (functions, ping):
            loopback = any(sock.family != socket.AF_UNIX for sock in listeners)
            gateway = Gateway(functions, settings, log, ping=ping, loopback=loopback, places=places)
            stop = trio.Event()

            async def trigger() -> None:
                await stop.wait()
                gateway.draining = True

            async def await_signal() -> None:
                async for _ in signals:
                    stop.set()

            async def await_supervisor() -> None:
                await trio.lowlevel.wait_readable(control)
                log.warning("stopping", reason="the supervisor has ended")
                stop.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(await_signal)
                nursery.start_soon(await_supervisor)
                async with trio.open_nursery() as serving:
                    await serving.start(partial(serve, gateway, config, listeners, log, stop=trigger))
                    control.send(READY)
                nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_functions(settings: Settings) -> AsyncGenerator[tuple[Functions, Ping], None]:
    """Connect to the broker for as long as the block runs."""
    async with (
        teemate.open_broker(settings.broker, client="gateway") as broker,
        trio.open_nursery() as nursery,
    ):
        functions = broker.functions_of(settings.enclave)
        functions.sync.idle = None  # the task below does it, and no request waits for that
        nursery.start_soon(_give_back, functions, settings.idle)
        yield functions, broker.ping
        nursery.cancel_scope.cancel()


async def _give_back(functions: AsyncFunctions, idle: float) -> None:
    """Have the broker get slots again that are not needed."""
    while True:
        await trio.sleep(idle / 2)
        with contextlib.suppress(teemate.Error):  # whoever invokes next hears of it
            await functions.give_back(idle)


def main() -> None:
    """What the supervisor starts: ``python -m teemate.gateway.worker``."""
    parser = argparse.ArgumentParser(prog="teemate-gateway worker")
    parser.add_argument("--settings", required=True)
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--listeners", required=True)
    parser.add_argument("--places", type=int, required=True)
    parser.add_argument("--log-format", required=True)
    parser.add_argument("--number", type=int, required=True)
    given = parser.parse_args()
    log = configure_log(given.log_format, worker=given.number, pid=os.getpid())
    listeners = [socket.socket(fileno=int(fd)) for fd in given.listeners.split(",")]
    control = socket.socket(fileno=given.control)
    settings = Settings.from_json(given.settings)
    places = Places(
        given.places,
        workers=settings.workers,
        count=settings.places,
        own=settings.slots,
        number=given.number,
    )
    os.close(given.places)
    try:
        trio.run(_serve, settings, listeners, control, places, log)
    except* teemate.Error as group:
        for error in group.exceptions:
            log.error("ended", reason=str(error))  # noqa: TRY400 - what it says is all there is to know
        sys.exit(1)


if __name__ == "__main__":
    main()
