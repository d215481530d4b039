"""What the programs have in common that measure attacks: options, a table or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

_Figures = TypeVar("_Figures")


def main(
    description: str | None,
    attacks: Iterable[str],
    run: Callable[[argparse.Namespace], Sequence[_Figures]],
    heading: str,
    row: Callable[[_Figures], str],
    *,
    seconds: float,
    flags: Sequence[str] = (),
    words: Sequence[str] | None = None,
) -> None:
    """Run what the command line names, and print it; `flags` are options beside those that all have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attack", choices=list(attacks), action="append")
    parser.add_argument("--seconds", type=float, default=seconds, help="of attack, and of its control run")
    parser.add_argument("--attackers", type=int, default=2, choices=range(1, 9))
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    options.attack = options.attack or list(attacks)
    figures = run(options)
    if options.json:
        print(json.dumps([_plain(each) for each in figures]))
        return
    print(heading)
    for each in figures:
        print(row(each))


def _plain(figures: object) -> dict[str, Any]:
    assert is_dataclass(figures)
    assert not isinstance(figures, type)
    return asdict(figures)
