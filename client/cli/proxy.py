"""`teemate proxy` and `teemate decode`: what clients and a broker say, seen from between, or afterwards."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, final

import click

from ._traffic import filter_options, json_lines_option, show_entry, wanted

if TYPE_CHECKING:
    from ..traffic.description import Described, Filter
    from ..traffic.recording import Entry, Recorder

__all__ = ["decode", "proxy"]


def _mode(_ctx: click.Context, _param: click.Parameter, value: str) -> int:
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"{value!r} is no mode such as 600")
    return mode


@click.command()
@click.option("--listen", "path", required=True, type=click.Path(), help="Where clients connect to.")
@click.option("--to", required=True, type=click.Path(), help="The broker's socket.")
@click.option("--record", type=click.Path(), help="Write everything to this new file.")
@click.option("--mode", callback=_mode, default="600", help="Of the socket: who may connect. Default: 600.")
@click.option("--quiet", is_flag=True, help="Print no messages.")
@filter_options
@json_lines_option
def proxy(
    path: str,
    to: str,
    record: str | None,
    mode: int,
    quiet: bool,
    enclave: str | None,
    client: int | None,
    op: str | None,
    error: str | None,
    as_json: bool,
) -> int:
    """Pass everything on between clients and a broker, descriptors too, and show it as `monitor` does.

    For who cannot be administrator: clients that are told TEEMATE_SOCKET=PATH go through it. The broker
    sees this proxy then, and not them. What is printed can be chosen; what is recorded is everything, without
    keys, tokens and MACs, for Wireshark, `teemate decode` and `teemate replay`.
    """
    import trio

    from ..traffic.proxy import Proxy, listen, require_broker, this_process
    from ..traffic.recording import Recorder, create

    require_broker(to)
    us = this_process()
    about = (
        f"Recorded by process {us.pid} of uid {us.uid} between clients at {path} and the broker at {to}. "
        f"The broker saw that process ({us}), not the clients."
    )
    chosen = wanted(enclave, client, op, error)
    with ExitStack() as stack:
        listening = stack.enter_context(listen(path, mode))
        recorder = Recorder(stack.enter_context(create(record)), about) if record is not None else None
        witness = _Witness(recorder, record or "", None if quiet else chosen, as_json)
        click.echo(
            f"The broker at {to} sees this proxy ({us}), not the clients: its policy's rules and limits, and "
            "`teemate status`, are about the proxy; grants end with it, and `revoke_kill` kills it.",
            err=True,
        )
        click.echo(f"Listening at {path}; Ctrl-C ends it.", err=True)
        interrupted = False

        async def serve() -> None:
            nonlocal interrupted
            async with trio.open_nursery() as nursery:
                with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    nursery.start_soon(Proxy(to, witness, _complain).run, listening)
                    async for number in signals:
                        interrupted = number == signal.SIGINT
                        nursery.cancel_scope.cancel()
                        break

        trio.run(serve)
    return 1 if witness.failed else 130 if interrupted else 0


def _complain(what: str) -> None:
    click.echo(f"teemate proxy: {what}", err=True)


@final
class _Witness:
    """Prints and records."""

    def __init__(self, recorder: Recorder | None, path: str, chosen: Filter | None, as_json: bool) -> None:
        self._recorder = recorder
        self._path = path
        self._chosen = chosen
        self._as_json = as_json
        self.failed = False

    def __call__(self, entry: Entry, described: Described | None) -> None:
        if self._recorder is not None:
            try:
                self._recorder.write(entry, described)
            except OSError as error:
                self._recorder, self.failed = None, True
                _complain(f"recording to {self._path} has ended: {error.strerror}; the clients go on")
        if self._chosen is None:
            return
        try:
            show_entry(entry, described, self._chosen, as_json=self._as_json)
            sys.stdout.flush()
        except (OSError, ValueError) as error:  # whatever is wrong with what we print to, the clients go on
            self._chosen = None
            if not isinstance(error, BrokenPipeError):  # else nobody reads any more, which is no failure
                self.failed = True
                _complain(f"printing has ended: {error}; the clients go on")
            with suppress(OSError, ValueError):  # what is left in its buffer would fail once more at our end
                os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())


@click.command()
@click.argument("file", type=click.Path())
@filter_options
@json_lines_option
def decode(
    file: str,
    enclave: str | None,
    client: int | None,
    op: str | None,
    error: str | None,
    as_json: bool,
) -> None:
    """Print a recording of `teemate proxy --record`, as `teemate monitor` prints what it sees.

    Wireshark and tshark open it too; the comment at its beginning says how they take messages apart.
    """
    from ..traffic.diagnostic import printable
    from ..traffic.recording import Tracker, read_recording

    chosen = wanted(enclave, client, op, error)
    tracker = Tracker()
    with open(file, "rb") as recorded:
        for entry in read_recording(recorded):
            if isinstance(entry, str):
                if not as_json:
                    click.echo("\n".join(map(printable, entry.split("\n"))), err=True)
            else:
                show_entry(entry, tracker.describe(entry), chosen, as_json=as_json)
