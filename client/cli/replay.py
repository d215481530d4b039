"""`teemate replay`: what another broker answers to the same requests."""

from __future__ import annotations

import click

from ._output import json_option, print_json
from ._socket import socket_option

__all__ = ["replay"]


@click.command()
@click.argument("file", type=click.Path())
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(),
    help="What rides on a request that takes a file (create, upgrade), in their order.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds for each answer.",
)
@socket_option
@json_option
def replay(file: str, images: tuple[str, ...], patience: float, path: str | None, as_json: bool) -> int:
    """Play the clients' side of a recording against a broker, and show where its answers differ.

    The recording is one of `teemate proxy --record`. Not compared is what is another one each time: numbers
    of grants, clients and slots, addresses, keys and tokens, inodes, processes, times, and counts that
    move by themselves. The exit status is 1 when something else differs, or could not be sent.
    """
    from ..traffic.description import clock
    from ..traffic.diagnostic import printable
    from ..traffic.recording import read_recording
    from ..traffic.replay import only_entries
    from ..traffic.replay import replay as play

    with open(file, "rb") as recorded:
        entries = list(only_entries(read_recording(recorded)))
    outcome = play(entries, path, images=images, patience=patience)
    if as_json:
        differences = [difference._asdict() for difference in outcome.differences]
        print_json({**outcome._asdict(), "skipped": list(outcome.skipped), "differences": differences})
    else:
        for difference in outcome.differences:
            where = f"client {difference.connection}, {difference.where}"
            click.echo(printable(f"{clock(difference.at)} {where}: {difference.what}"))
        for skipped in outcome.skipped:
            click.echo(printable(f"not sent: {skipped}"))
        count = len(outcome.differences)
        told = "no difference" if not count else f"{count} difference{'s' * (count != 1)}"
        click.echo(f"{outcome.sent} messages sent, {outcome.compared} answers and events compared: {told}")
    return int(bool(outcome.differences or outcome.skipped))
