"""The ``teemate-broker`` command."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import click
import trio
from structlog.typing import FilteringBoundLogger

from teemate import errors
from teemate.broker.install import install
from teemate.broker.policy.check import DEFAULT_CONFIG, check_config, read_policy
from teemate.broker.policy.rules import Policy, PolicyError
from teemate.broker.restart.descriptor_store import DescriptorStore
from teemate.broker.restart.heartbeat import beat, status_text
from teemate.broker.restart.keeper import KEEPER_FD_NAME, REFUSED
from teemate.broker.restart.kept import FIRST_FD, LISTENER
from teemate.broker.restart.restoration import Found, read_found
from teemate.broker.restart.service_manager import (
    Inherited,
    await_turn,
    inherited_descriptors,
    notify,
    notify_address,
    notify_soon,
)
from teemate.broker.restart.snapshot import SnapshotError
from teemate.broker.server import Server, bind, listens
from teemate.broker.service import Service
from teemate.broker.telemetry.audit import configure_log
from teemate.broker.telemetry.log_file import LogFile
from teemate.broker.telemetry.metrics_server import serve_metrics
from teemate.broker.wardens import spawner

__all__ = ["main"]


_LOG_AGAIN = 1.0
"""Seconds after which records that nobody read are written again."""


@final
@dataclass(slots=True)
class _Start:
    """What this broker was started with."""

    policy: Policy
    load: Callable[[], Policy]
    """Reads the policy again."""
    log: FilteringBoundLogger
    listeners: list[socket.socket]
    bound: bool
    """Whether the listener is our own, and not the service manager's."""
    store: DescriptorStore | None
    keeper: int | None
    """A pipe whose other end closes with our keeper."""
    found: Found
    """What the last broker left."""
    discard: bool
    """Whether that is to be thrown away."""
    log_file: LogFile


async def _reload(service: Service) -> None:
    with contextlib.suppress(errors.Unsupported):  # its log has said why
        await service.reloading.reload()


async def _heed_signals(
    signals: AsyncIterator[int], nursery: trio.Nursery, service: Service, start: _Start
) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            nursery.start_soon(_reload, service)
            continue
        # With a store SIGTERM makes way for the next broker, which goes on with everything.
        service.leaving = start.store is not None and number == signal.SIGTERM
        if not service.leaving:
            service.say_farewell("the broker was told to end, and keeps nothing")
        start.log.info("stopping", signal=signal.Signals(number).name, kept=service.leaving)
        nursery.cancel_scope.cancel()


async def _stop_without_keeper(service: Service, start: _Start) -> None:
    """What the keeper kept is gone with it, and what it left behind is removed here.

    At once, as a kill would: an orderly end takes grants back, and the calls that are under way in the
    enclaves go on (the wardens end with our sockets).
    """
    assert start.keeper is not None
    await trio.lowlevel.wait_readable(start.keeper)
    start.log.error("stopping", reason="the keeper has ended, and with it what it kept: start it again")
    service.say_farewell("the broker's keeper has ended, and with it what was kept")
    shutil.rmtree(os.path.dirname(notify_address()), ignore_errors=True)
    if start.bound:
        _unlink(start.listeners[0].getsockname())
    sys.stderr.flush()
    os._exit(1)


async def _keep_logging(log_file: LogFile) -> None:
    """Write what was kept while nobody read the log, also when nothing new is logged."""
    while True:
        await trio.sleep(_LOG_AGAIN)
        log_file.try_again()


async def run(start: _Start) -> None:
    """Run the broker until SIGTERM or SIGINT; SIGHUP has it read its policy again."""
    policy, log = start.policy, start.log
    # Outside of the nursery: a second signal must not end us while wardens are being ended.
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        service = Service(policy, log, start.store, start.found)
        service.reloading.load = start.load
        if service.choice.wanted == "auto":
            why = {"why_not_sgx": service.choice.reason} if service.choice.reason else {}
            log.info("backend chosen by auto", backend=service.backend, **why)
        if service.backend == "sim":
            log.warning(
                "the sim backend protects nothing: enclaves are ordinary memory that root, their owner"
                " and every client can read; use it to develop and test, never for secrets"
            )
        if start.store is not None and start.bound and LISTENER not in start.store:
            await start.store.put(LISTENER, start.listeners[0].fileno())
        if start.discard:
            await service.state.drop_all()
        await service.state.begin()
        async with trio.open_nursery() as keeping:
            async with trio.open_nursery() as serving:
                serving.start_soon(_keep_logging, start.log_file)
                serving.start_soon(_heed_signals, signals, serving, service, start)
                if start.keeper is not None:
                    serving.start_soon(_stop_without_keeper, service, start)
                serving.start_soon(Server(service).run, start.listeners)
                await keeping.start(service.run)
                log.info(
                    "ready", policy=policy.source, backend=service.backend,
                    sockets=[str(listener.getsockname()) for listener in start.listeners],
                )  # fmt: skip
                gc.freeze()  # modules and enclaves stay: collections need not look at them again and again
                notify(f"READY=1\nSTATUS={status_text(service)}")
                serving.start_soon(beat, service)
                serving.start_soon(serve_metrics, service)
            # Only now: clients that leave give their slots back to what is kept.
            # Who should hear it may have ended, or read nothing, which keeps nobody from ending.
            notify_soon("STOPPING=1")
            keeping.cancel_scope.cancel()


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="teemate", prog_name="teemate-broker")
@click.option("--config", type=click.Path(path_type=Path), help=f"Policy file [default: {DEFAULT_CONFIG}].")
@click.option("--socket", "socket_path", help="Where to listen, instead of the policy's socket.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "sim", "sgx"]),
    help="How enclaves are made, instead of the policy's.",
)
@click.option(
    "--log-format",
    type=click.Choice(["auto", "text", "json", "journal"]),
    default="auto",
    show_default=True,
    help="auto: with fields where standard error is systemd's journal, else text.",
)
@click.option(
    "--keeper",
    is_flag=True,
    help="Run under a small parent that starts the broker again when it dies: enclaves and grants live on.",
)
@click.option(
    "--discard-state",
    is_flag=True,
    help="Begin anew: throw away what an earlier broker left in the descriptor store.",
)
@click.option("--successor", is_flag=True, hidden=True)
@click.pass_context
def main(
    context: click.Context,
    config: Path | None,
    socket_path: str | None,
    backend: str | None,
    log_format: str,
    keeper: bool,
    discard_state: bool,
    successor: bool,
) -> None:
    """Own enclaves and lend them to the processes that connect."""
    if context.invoked_subcommand is not None:
        return
    if keeper:
        arguments = [argument for argument in sys.argv[1:] if argument != "--keeper"]
        os.execv(  # noqa: S606 - our own interpreter, which has to get rid of this program's modules
            sys.executable, [sys.executable, "-m", "teemate.broker.restart.keeper", *arguments]
        )
    # Where it was when the watchdog or a fault ended it: function names, nothing of its memory.
    faulthandler.enable()
    log_file = LogFile(sys.stderr.fileno())
    log = configure_log(log_format, log_file)
    log_file.tell_lost = lambda count: log.warning(
        "log records lost", count=count, reason="whoever reads the log was too slow, or did not"
    )
    if successor:  # everything is loaded; nothing of the host is looked at before it is our turn
        with socket.socket(fileno=FIRST_FD) as keepers:
            os.set_inheritable(FIRST_FD, False)
            inherited = await_turn(keepers)
        if not inherited:
            sys.exit(0)
    else:
        inherited = inherited_descriptors()

    def load() -> Policy:
        policy = read_policy(config)
        settings = policy.broker
        settings = replace(
            settings, socket=socket_path or settings.socket, backend=backend or settings.backend
        )
        return replace(policy, broker=settings)

    try:
        policy = load()
    except PolicyError as error:
        raise click.ClickException(str(error)) from error

    # Every client costs two descriptors, its socket and its pidfd.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    spawner.begin()  # before there is a client
    with contextlib.ExitStack() as cleanup:
        start = _take_over(policy, load, log, log_file, inherited, cleanup, discard_state)
        for number in (signal.SIGTERM, signal.SIGINT):  # what holds again when trio's receiver is gone
            signal.signal(number, signal.SIG_IGN)
        try:
            trio.run(run, start)
        except* errors.Unsupported as group:
            raise click.ClickException("; ".join(str(error) for error in group.exceptions)) from None
    sys.exit(0)


main.add_command(check_config)
main.add_command(install)


def _take_over(
    policy: Policy,
    load: Callable[[], Policy],
    log: FilteringBoundLogger,
    log_file: LogFile,
    inherited: list[Inherited],
    cleanup: contextlib.ExitStack,
    discard: bool,
) -> _Start:
    """Sort what we were started with, and listen if nothing of it listens yet."""
    settings = policy.broker
    listeners: list[socket.socket] = []
    kept: list[Inherited] = []
    keeper: int | None = None
    for name, fd in inherited:
        if listens(fd):
            listeners.append(cleanup.enter_context(socket.socket(fileno=fd)))
        elif name == KEEPER_FD_NAME:
            keeper = fd
        else:
            kept.append(Inherited(name, fd))
    names = {name for name, _ in inherited}
    bound = not listeners or LISTENER in names
    store = DescriptorStore.of_environment(names & ({LISTENER} | {name for name, _ in kept}))
    found = Found()
    if discard:
        for _, fd in kept:
            os.close(fd)
    else:
        found = _read_found(kept, log)
    if not listeners:
        try:
            listener = bind(settings.socket, mode=settings.socket_mode, gid=settings.socket_gid)
        except OSError as error:
            raise click.ClickException(f"cannot listen at {settings.socket}: {error.strerror}") from error
        listeners.append(cleanup.enter_context(listener))
        if store is None:  # else the next broker goes on listening
            cleanup.callback(_unlink, settings.socket)
    return _Start(policy, load, log, listeners, bound, store, keeper, found, discard, log_file)


def _read_found(kept: list[Inherited], log: FilteringBoundLogger) -> Found:
    """Read what the last broker left, or end: its enclaves stay in the store, ungoverned."""
    try:
        return read_found(kept)
    except SnapshotError as error:
        log.critical(
            "state refused", reason=str(error),
            kept=[name for name, _ in kept],
            advice="nothing is lost yet: enclaves and their clients go on, and their descriptors are still in"
            " the store; start the version of the broker that wrote this, or begin anew with"
            " `teemate-broker --discard-state`, which ends every grant",
        )  # fmt: skip
        sys.exit(REFUSED)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


if __name__ == "__main__":
    main()
