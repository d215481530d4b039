"""What the commands that show messages share: which ones, and how they are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ._complete import enclaves as known_enclaves
from ._complete import operations

if TYPE_CHECKING:
    from ..traffic.description import Described, Filter
    from ..traffic.recording import Entry

__all__ = ["filter_options", "json_lines_option", "show", "show_entry", "show_missed", "wanted"]

json_lines_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object a line, for programs."
)


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which messages are shown."""
    for option in (
        click.option(
            "--error",
            is_flag=False,
            flag_value="any",
            metavar="[CODE]",
            help="Only errors; with a code, only those.",
        ),
        click.option(
            "--op",
            help="Only this operation's requests and answers, or events of this name.",
            shell_complete=operations,
        ),
        click.option("--client", type=click.IntRange(min=0), help="Only the connection of this number."),
        click.option("--enclave", help="Only what is about this enclave.", shell_complete=known_enclaves),
    ):
        command = option(command)
    return command


def wanted(enclave: str | None, client: int | None, op: str | None, error: str | None) -> Filter:
    """Return the filter that those options stand for."""
    from ..traffic.description import Filter

    return Filter(enclave, client, op, error)


def show(described: Described, *, as_json: bool) -> None:
    """Print one message: two lines, or one for programs."""
    if as_json:
        sys.stdout.write(json.dumps(described.as_json()) + "\n")
    else:
        sys.stdout.write(f"{described.head()}\n    {described.body()}\n")


def show_entry(entry: Entry, described: Described | None, chosen: Filter, *, as_json: bool) -> None:
    """Print what a proxy saw, if it is wanted; beginnings and ends are, unless only some messages are."""
    from ..traffic.description import clock
    from ..traffic.recording import Passed

    if described is not None:
        if chosen.wants(described.client, described.facts):
            show(described, as_json=as_json)
        return
    if isinstance(entry, Passed) or (chosen.enclave, chosen.op, chosen.error) != (None, None, None):
        return
    if chosen.client not in (None, entry.connection):
        return
    if as_json:
        told = {"time": entry.at, "client": entry.connection, **entry.told()}
        sys.stdout.write(json.dumps(told) + "\n")
    else:
        sys.stdout.write(f"{clock(entry.at)} {entry}\n")


def show_missed(count: int, *, as_json: bool) -> None:
    """Say that messages are not here."""
    if as_json:
        sys.stdout.write(json.dumps({"missed": count}) + "\n")
    else:
        sys.stdout.write(f"({count} message{'s' * (count != 1)} missed: this end was too slow)\n")
