"""What commands share: parameter types, and printing for people and for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

__all__ = ["NUMBER", "SIZE", "json_option", "print_json"]

if TYPE_CHECKING:  # newer versions of click have it generic, older ones do not
    _IntType = click.ParamType[int]
else:
    _IntType = click.ParamType


class NumberType(_IntType):
    """A number, also in hexadecimal (0x8086)."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return int(str(value), 0)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)


class SizeType(_IntType):
    """A size such as 64M or 64MiB; the value is bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from .._sizes import parse_size

        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


NUMBER = NumberType()
SIZE = SizeType()

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")


def print_json(value: Mapping[str, object]) -> None:
    """Print `value` as one JSON object."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
