"""`teemate doctor`: what works on this host, and what to do about the rest."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

import click

from ._output import json_option, print_json
from ._socket import socket_option

if TYPE_CHECKING:
    from rich.console import Console

    from ..doctor import Check, Diagnosis

__all__ = ["doctor"]

_HEADINGS = {"sgx": "Backend sgx", "sim": "Backend sim", "host": "Both backends", "broker": "Broker"}
_TEXT = 30
"""Column where a check's text begins."""
_LABELS = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "problem": ("PROBLEM", "bold red"),
    "unknown": ("unknown", "cyan"),
    "not-applicable": ("-", "dim"),
}


@click.command()
@socket_option
@json_option
def doctor(path: str | None, as_json: bool) -> None:
    """Check this host, and say what to do.

    Looks at processor, firmware, kernel, device nodes, memory and broker, and runs a tiny enclave on
    each backend. Needs no rights and no broker, and changes nothing. The exit status is 0 when at
    least one backend works, 1 when none does.
    """
    from ..doctor import diagnose

    diagnosis = diagnose(socket=path)
    if as_json:
        print_json(diagnosis.as_json())
    else:
        _show(diagnosis)
    if not diagnosis.good:
        sys.exit(1)


def _show(diagnosis: Diagnosis) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for name, heading in _HEADINGS.items():
        checks = [check for check in diagnosis.checks if check.group.value == name]
        style = "bold"
        if name in diagnosis.backends:
            works = diagnosis.backends[name]
            heading += " works" if works else " does not work"
            style = "bold green" if works else "bold red"
            if name == "sim" and works:
                heading += " (a model for tests: it protects nothing)"
        console.print(heading, style=style, markup=False)
        _table(console, checks)
    working = [name for name, works in diagnosis.backends.items() if works]
    if working:
        console.print(f"Works: {', '.join(working)}.", style="bold green", end=" ", markup=False)
    else:
        console.print("No backend works here.", style="bold red", end=" ", markup=False)
    if diagnosis.auto:
        console.print(f'"auto" takes {diagnosis.auto}.', markup=False)
    else:
        console.print('"auto" finds none.', markup=False)


def _table(console: Console, checks: list[Check]) -> None:
    from rich.text import Text

    # Not rich's Table: it fills every line with spaces, which whoever copies this would get.
    width = max(min(console.width, 100) - _TEXT, 30)
    for check in checks:
        label, style = _LABELS[check.status.value]
        lines = textwrap.wrap(check.found, width, break_on_hyphens=False) or [""]
        advice = textwrap.wrap(
            check.advice, width, initial_indent="-> ", subsequent_indent="   ", break_on_hyphens=False
        )
        head = Text("  ").append(f"{label:<8}", style=style).append(f"{check.title:<20}")
        dim = "dim" if check.status.value == "not-applicable" else ""
        console.print(head.append(lines[0], style=dim), soft_wrap=True)
        for line in lines[1:]:
            console.print(Text(" " * _TEXT + line, style=dim), soft_wrap=True)
        for line in advice:
            console.print(Text(" " * _TEXT + line, style="italic"), soft_wrap=True)
    console.print()
