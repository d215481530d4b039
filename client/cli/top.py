"""`teemate top`: what goes on, on the whole screen, or once."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING

import click

from ._output import json_option, print_json
from ._socket import socket_option

if TYPE_CHECKING:
    from ..top._model import View

__all__ = ["top"]

_SORTS = ("calls", "inside", "slots", "waiting", "held", "uid", "pid")


@click.command()
@click.option("--once", is_flag=True, help="Print once and end; so it does when its output is no terminal.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1, max=3600),
    default=2.0,
    show_default=True,
    help="Seconds between two looks; printed once, rates are of one such interval.",
)
@click.option(
    "--sort", type=click.Choice(_SORTS), default="calls", show_default=True, help="Clients by that."
)
@click.option("--filter", "wanted", default="", help="Only clients with this text: a name, 'uid 1000', …")
@socket_option
@json_option
def top(once: bool, interval: float, sort: str, wanted: str, path: str | None, as_json: bool) -> None:
    """Show enclaves and clients as they work: slots, queue, calls a second, time inside.

    Calls a second of an enclave are counted by its gate. Those of a client, and how many of its threads are
    inside on average (IN), are its own claim: it begins to count when somebody looks. SLOT-S is slot time in
    seconds, by the broker's clock. On the whole screen: s sorts, / filters, r revokes, d drains, q ends.
    """
    if once or as_json or not sys.stdout.isatty():
        _print_once(path, interval, sort, wanted, as_json=as_json)
        return
    try:
        from ..top._app import TopApp
    except ImportError as error:
        raise click.ClickException(
            f"the full-screen view needs textual ({error}): pip install 'teemate[top]', or teemate top --once"
        ) from None
    TopApp(path, interval, sort, wanted).run()


def _print_once(path: str | None, interval: float, sort: str, wanted: str, *, as_json: bool) -> None:
    from .. import connect
    from ..top._model import Observer, select
    from ..top._text import lines

    with connect(path, client="teemate top") as broker:
        observer = Observer(broker)
        view: View = observer.look()
        if not view.note:  # the first look has clients begin to count, the second one finds counts
            for _ in range(2):
                time.sleep(interval / 2)
                view = observer.look()
    if as_json:
        print_json(
            {
                "enclaves": [row._asdict() for row in view.enclaves],
                "clients": [row._asdict() for row in select(view.clients, sort, wanted)],
            }
        )
        return
    width = shutil.get_terminal_size((80, 24)).columns
    for line in lines(view, sort=sort, wanted=wanted, width=width):
        click.echo(line)
