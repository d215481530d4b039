"""`teemate monitor`: the traffic of all clients as it goes by."""

from __future__ import annotations

import sys

import click

from ._socket import socket_option
from ._traffic import filter_options, json_lines_option, show, show_missed, wanted

__all__ = ["monitor"]


@click.command()
@filter_options
@socket_option
@json_lines_option
def monitor(
    enclave: str | None,
    client: int | None,
    op: str | None,
    error: str | None,
    path: str | None,
    as_json: bool,
) -> None:
    """Show each message between the broker and its clients, until Ctrl-C or the broker's end.

    When, whose, in which direction (-> to the broker), how large, how long the answer took, which
    descriptors came along, and what it says in CBOR diagnostic notation. Slot keys, tokens and MACs are
    replaced by a short hash. Clients are not slowed down: who reads too slowly here misses messages, and is
    told how many.
    """
    from ..traffic.description import parse_event
    from ..traffic.plain import PlainConnection, require_no_error

    chosen = wanted(enclave, client, op, error)
    with PlainConnection(path) as broker:
        broker.ask("hello", {"version": 1, "client": "teemate monitor"})
        broker.ask("monitor", {key: value for key, value in chosen._asdict().items() if value is not None}, 1)
        click.echo("Watching; Ctrl-C ends it.", err=True)
        while (message := broker.message()) is not None:
            require_no_error(message)  # why it ends
            if message.get("event") != "traffic":
                continue
            if message["missed"]:
                show_missed(message["missed"], as_json=as_json)
            for described in parse_event(message):
                show(described, as_json=as_json)
            sys.stdout.flush()
        raise broker.ended()
