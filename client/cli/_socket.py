"""The option that says which broker is meant."""

from __future__ import annotations

import click

__all__ = ["socket_option"]

socket_option = click.option(
    "--socket",
    "path",
    type=click.Path(),
    default=None,
    envvar="TEEMATE_SOCKET",
    show_envvar=True,
    help="The broker's socket. Default: /run/teemate/broker.sock.",
)
