"""The ``teemate-broker`` command."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import click
import trio
from structlog.typing import FilteringBoundLogger

from teemate import errors
from teemate.broker.audit import configure_log
from teemate.broker.policy import Policy, PolicyError, load_policy
from teemate.broker.server import Server, bind
from teemate.broker.service import Service
from teemate.broker.service_manager import inherited_sockets, notify

__all__ = ["main"]

_DEFAULT_CONFIG = Path("/etc/teemate/broker.toml")


async def _stop_on_signal(
    signals: AsyncIterator[int], cancel: trio.CancelScope, log: FilteringBoundLogger
) -> None:
    async for number in signals:
        log.info("stopping", signal=signal.Signals(number).name)
        cancel.cancel()


async def run(policy: Policy, log: FilteringBoundLogger, listeners: list[socket.socket]) -> None:
    """Run the broker until SIGTERM or SIGINT."""
    # Outside of the nursery: a second signal must not end us while wardens are being ended.
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        service = Service(policy, log)
        if service.choice.wanted == "auto":
            why = {"why_not_sgx": service.choice.reason} if service.choice.reason else {}
            log.info("backend chosen by auto", backend=service.backend, **why)
        if service.backend == "sim":
            log.warning(
                "the sim backend protects nothing: enclaves are ordinary memory that root, their owner"
                " and every client can read; use it to develop and test, never for secrets"
            )
        async with trio.open_nursery() as keeping:
            async with trio.open_nursery() as serving:
                serving.start_soon(_stop_on_signal, signals, serving.cancel_scope, log)
                serving.start_soon(Server(service).run, listeners)
                await keeping.start(service.run)
                log.info(
                    "ready", policy=policy.source, backend=service.backend,
                    sockets=[str(listener.getsockname()) for listener in listeners],
                )  # fmt: skip
                gc.freeze()  # modules and enclaves stay: collections need not look at them again and again
                notify("READY=1")
            # Only now: clients that leave give their slots back to what is kept.
            notify("STOPPING=1")
            keeping.cancel_scope.cancel()


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help=f"Policy file [default: {_DEFAULT_CONFIG}].")
@click.option("--socket", "socket_path", help="Where to listen, instead of the policy's socket.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "sim", "sgx"]),
    help="How enclaves are made, instead of the policy's.",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
def main(config: Path | None, socket_path: str | None, backend: str | None, log_format: str) -> None:
    """Own enclaves and lend them to the processes that connect."""
    log = configure_log(log_format)
    try:
        if config is None and not _DEFAULT_CONFIG.exists():
            policy = Policy()
        else:
            policy = load_policy(config or _DEFAULT_CONFIG, default_owner=os.geteuid())
    except PolicyError as error:
        raise click.ClickException(str(error)) from error
    settings = policy.broker
    settings = replace(settings, socket=socket_path or settings.socket, backend=backend or settings.backend)
    policy = replace(policy, broker=settings)

    # Every client costs two descriptors, its socket and its pidfd.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    with contextlib.ExitStack() as cleanup:
        listeners = inherited_sockets()
        for listener in listeners:
            cleanup.enter_context(listener)
        if not listeners:
            try:
                listeners = [
                    cleanup.enter_context(
                        bind(settings.socket, mode=settings.socket_mode, gid=settings.socket_gid)
                    )
                ]
            except OSError as error:
                raise click.ClickException(f"cannot listen at {settings.socket}: {error.strerror}") from error
            cleanup.callback(_unlink, settings.socket)
        for number in (signal.SIGTERM, signal.SIGINT):  # what holds again when trio's receiver is gone
            signal.signal(number, signal.SIG_IGN)
        try:
            trio.run(run, policy, log, listeners)
        except* errors.Unsupported as group:
            raise click.ClickException("; ".join(str(error) for error in group.exceptions)) from None
    sys.exit(0)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


if __name__ == "__main__":
    main()
