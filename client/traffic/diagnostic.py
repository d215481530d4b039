"""CBOR as text that people read and type: diagnostic notation.

RFC 8949, section 8, with the extensions of RFC 8610, appendix G, that help: comments between slashes.
What a terminal could take for a command is escaped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import cbor2

__all__ = ["DiagnosticError", "Show", "parse", "printable", "text", "write"]

Show = Callable[[str, object], "str | None"]
"""Returns how a value under a key is to be written, None for as usual."""

_MAX_DEPTH = 32
_LITERALS: dict[str, object] = {
    "true": True,
    "false": False,
    "null": None,
    "undefined": cbor2.undefined,
    "NaN": math.nan,
    "Infinity": math.inf,
    "-Infinity": -math.inf,
}
_TOKEN = re.compile(
    r"""(?P<space>\s+|/[^/]*/|\#[^\n]*)
    |(?P<text>"(?:[^"\\]|\\.)*")
    |(?P<bytes>h'[0-9A-Fa-f\s]*')
    |(?P<number>-?(?:0x[0-9A-Fa-f]+|[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?))
    |(?P<word>-?[A-Za-z]+)
    |(?P<mark>[\[\]{}(),:])""",
    re.VERBOSE,
)


def text(value: str) -> str:
    """Return `value` in quotes, without anything that a terminal would not simply print."""
    return printable(json.dumps(value, ensure_ascii=False))


def printable(value: str) -> str:
    """Return `value` as it is, but for what a terminal would not simply print."""
    if value.isprintable():
        return value
    return "".join(char if char.isprintable() else _escaped(char) for char in value)


def _escaped(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def write(value: object, show: Show = lambda _name, _value: None, name: str = "") -> str:
    """Return `value` in diagnostic notation, in one line; `name` is the key that it is under."""
    shown = show(name, value)
    if shown is not None:
        return shown
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write(k)}: {write(v, show, str(k))}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(write(item, show, name) for item in value) + "]"
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bytes):
        return f"h'{value.hex()}'"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        if math.isfinite(value):
            return repr(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, cbor2.CBORTag):
        return f"{value.tag}({write(value.value, show, name)})"
    if isinstance(value, cbor2.CBORSimpleValue):
        return f"simple({value.value})"
    return "undefined" if value is cbor2.undefined else text(repr(value))


class DiagnosticError(ValueError):
    """What was typed is no diagnostic notation; the text says where and why."""


def parse(typed: str) -> Any:
    """Return the value that `typed` stands for.

    Raises
    ------
    DiagnosticError

    """
    parser = _Parser(typed)
    value = parser.value(0)
    parser.expect_end()
    return value


class _Parser:
    def __init__(self, typed: str) -> None:
        self._typed = typed
        self._tokens: list[tuple[str, str, int]] = []
        position = 0
        while position < len(typed):
            found = _TOKEN.match(typed, position)
            if found is None:
                raise self._wrong("this is no number, text, array or map", position)
            if found.lastgroup != "space":
                self._tokens.append((found.lastgroup or "", found.group(), position))
            position = found.end()
        self._next = 0

    def _wrong(self, reason: str, position: int) -> DiagnosticError:
        return DiagnosticError(f"{reason}, at character {position + 1} of {self._typed!r}")

    def _take(self) -> tuple[str, str, int]:
        if self._next == len(self._tokens):
            raise self._wrong("something is missing", len(self._typed))
        self._next += 1
        return self._tokens[self._next - 1]

    def _taken(self, mark: str) -> bool:
        if self._next < len(self._tokens) and self._tokens[self._next][1] == mark:
            self._next += 1
            return True
        return False

    def _expect(self, mark: str) -> None:
        if not self._taken(mark):
            position = self._tokens[self._next][2] if self._next < len(self._tokens) else len(self._typed)
            raise self._wrong(f"here should be {mark!r}", position)

    def expect_end(self) -> None:
        if self._next < len(self._tokens):
            raise self._wrong("the value has ended before", self._tokens[self._next][2])

    def value(self, depth: int) -> Any:
        kind, word, position = self._take()
        if depth > _MAX_DEPTH:
            raise self._wrong("too deep", position)
        if kind == "text":
            try:
                return json.loads(word)
            except ValueError:
                raise self._wrong("an escape that is none", position) from None
        if kind == "bytes":
            try:
                return bytes.fromhex(word[2:-1])
            except ValueError:
                raise self._wrong("half a byte", position) from None
        if kind == "number":
            return self._number(word, position, depth)
        if word == "simple":
            self._expect("(")
            _, number, where = self._take()
            self._expect(")")
            try:
                return cbor2.CBORSimpleValue(int(number))
            except (ValueError, TypeError):
                raise self._wrong("simple values are 0 to 19 and 32 to 255", where) from None
        if word in _LITERALS:
            return _LITERALS[word]
        if word == "[":
            return self._items("]", lambda: self.value(depth + 1))
        if word == "{":
            return dict(self._items("}", lambda: self._pair(depth + 1)))
        raise self._wrong("this stands for nothing", position)

    def _number(self, token: str, position: int, depth: int) -> Any:
        if "." in token or ("e" in token.lower() and not token.startswith(("0x", "-0x"))):
            return float(token)
        number = int(token, 0 if "x" in token else 10)
        if not self._taken("("):
            return number
        value = self.value(depth + 1)
        self._expect(")")
        if number < 0:
            raise self._wrong("a tag is not negative", position)
        return cbor2.CBORTag(number, value)

    def _pair(self, depth: int) -> tuple[Any, Any]:
        _, _, position = self._tokens[self._next] if self._next < len(self._tokens) else ("", "", 0)
        key = self.value(depth)
        if isinstance(key, (dict, list)):
            raise self._wrong("a key cannot be an array or a map here", position)
        self._expect(":")
        return key, self.value(depth)

    def _items(self, end: str, item: Callable[[], Any]) -> list[Any]:
        items: list[Any] = []
        if self._taken(end):
            return items
        while True:
            items.append(item())
            if self._taken(end):
                return items
            self._expect(",")
