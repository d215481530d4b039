"""The ``teemate-gateway`` command."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

import click
import trio

from ..cli._output import SIZE
from .listening import inherited, listen
from .log import configure_log
from .settings import GatewayError, Settings

__all__ = ["main"]

_DEFAULT = Settings()
_AT_LEAST_1 = click.IntRange(1)
_SECONDS = click.FloatRange(0, min_open=True)


if TYPE_CHECKING:  # newer versions of click have it generic, older ones do not
    _IntType = click.ParamType[int]
else:
    _IntType = click.ParamType


class _ModeType(_IntType):
    """Permissions in octal."""

    name = "mode"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            mode = value if isinstance(value, int) else int(str(value), 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            self.fail(f"{value!r} is no mode such as 660", param, ctx)
        return mode


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="teemate", prog_name="teemate-gateway")
@click.option(
    "--listen", "places", multiple=True, metavar="unix:PATH|HOST:PORT",
    help="Where: a Unix socket, or a loopback address and port. Default: what the service manager passes.",
)  # fmt: skip
@click.option("--socket-mode", type=_ModeType(), default="660", show_default=True, help="Of a Unix socket.")
@click.option("--workers", type=_AT_LEAST_1, default=2, show_default=True, help="Processes that serve.")
@click.option(
    "--slots",
    type=_AT_LEAST_1,
    default=_DEFAULT.slots,
    show_default=True,
    help="Functions at once, a worker.",
)
@click.option(
    "--concurrency", type=_AT_LEAST_1, default=None,
    help="Requests under way for one function; more get 429. Default: as many as all slots and the queue.",
)  # fmt: skip
@click.option(
    "--queue", type=click.IntRange(0), default=_DEFAULT.queue, show_default=True,
    help="Requests that may wait for a slot; more get 503.",
)  # fmt: skip
@click.option(
    "--max-body", type=SIZE, default="8M", show_default=True, help="A request's body; more gets 413."
)
@click.option(
    "--timeout", type=_SECONDS, default=_DEFAULT.timeout, show_default=True,
    help="Deadline of requests without TeeMate-Timeout, in seconds.",
)  # fmt: skip
@click.option(
    "--max-timeout", type=_SECONDS, default=_DEFAULT.max_timeout, show_default=True,
    help="Longest deadline that a request may name.",
)  # fmt: skip
@click.option(
    "--idle", type=_SECONDS, default=_DEFAULT.idle, show_default=True,
    help="Slots that are not needed for so long go back to the broker, in seconds.",
)  # fmt: skip
@click.option(
    "--grace", type=_SECONDS, default=_DEFAULT.grace, show_default=True,
    help="How long requests may take when the gateway stops.",
)  # fmt: skip
@click.option(
    "--socket", "broker", type=click.Path(), envvar="TEEMATE_SOCKET", show_envvar=True, help="The broker's."
)
@click.option("--enclave", default=_DEFAULT.enclave, show_default=True, help="Which has the functions.")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="Of the records on standard error.",
)  # fmt: skip
def main(
    places: tuple[str, ...],
    socket_mode: int,
    workers: int,
    slots: int,
    concurrency: int | None,
    queue: int,
    max_body: int,
    timeout: float,
    max_timeout: float,
    idle: float,
    grace: float,
    broker: str | None,
    enclave: str,
    log_format: str,
) -> None:
    """Serve functions over HTTP: POST /fn/NAME, GET /healthz, GET /openapi.json.

    Whoever can connect may invoke the functions of the user that this runs as.
    """
    try:
        from .supervisor import ENDING, Supervisor
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}: pip install 'teemate[gateway]'") from None
    try:
        settings = Settings(
            broker=broker,
            enclave=enclave,
            workers=workers,
            slots=slots,
            concurrency=concurrency or workers * slots + queue,
            queue=queue,
            max_body=max_body,
            timeout=timeout,
            max_timeout=max_timeout,
            idle=idle,
            grace=grace,
        )
        with contextlib.ExitStack() as cleanup:
            listeners = [cleanup.enter_context(sock) for sock in inherited()]
            for place in places:
                listeners.append(cleanup.enter_context(listen(place, socket_mode)))
                if place.startswith("unix:"):
                    cleanup.callback(_unlink, place.removeprefix("unix:"))
            if not listeners:
                raise click.UsageError("say where to listen: --listen unix:PATH, or 127.0.0.1:PORT")
            log = configure_log(log_format, pid=os.getpid())
            log.info("listening", sockets=[_name(sock) for sock in listeners])
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until the supervisor hears them
            for number in ENDING:  # what holds again when trio's receiver is gone
                signal.signal(number, lambda *_: None)  # SIG_IGN would drop what is blocked
            trio.run(Supervisor(settings, listeners, log, log_format).run)
    except GatewayError as error:
        raise click.ClickException(str(error)) from error
    sys.exit(0)


def _name(sock: socket.socket) -> str:
    name = sock.getsockname()
    return f"unix:{name}" if isinstance(name, str) else f"{name[0]}:{name[1]}"


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


if __name__ == "__main__":
    main()
