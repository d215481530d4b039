"""Read TOML so that a mistake is told with file, line and key.

The standard parser forgets where a value stood.  :class:`Table` finds the place again, only
when there is something to complain about, and keeps count of the keys that were asked for:
a key that nobody asked for is a mistake too, since a misspelt rule must not be ignored.
"""

from __future__ import annotations

import grp
import pwd
import re
import tomllib
from pathlib import Path
from typing import final

__all__ = ["PolicyError", "Table", "read_toml"]

_MISSING = object()
_HEADER = re.compile(r"\s*(\[\[?)\s*([A-Za-z0-9_.\- \"']+?)\s*\]\]?\s*(?:#.*)?$")
_SIZE = re.compile(r"(\d+)\s*(KiB|MiB|GiB)?")
_UNITS = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_MAX_ID = 0xFFFFFFFE


class PolicyError(Exception):
    """The policy file is wrong: the message has file, line, key, and what is expected there."""

    def __init__(self, source: str, line: int | None, key: str, message: str) -> None:
        where = f"{source}:{line}" if line else source
        super().__init__(f"{where}: {key}: {message}" if key else f"{where}: {message}")
        self.source = source
        self.line = line
        self.key = key


@final
class Table:
    """One table of the file, whose values are taken out one by one with the type they must have.

    `path` holds the table's names from the top; the n-th of an array of tables is (name, n).
    """

    def __init__(
        self, source: str, text: str, path: tuple[str | int, ...], values: dict[str, object]
    ) -> None:
        self._source = source
        self._text = text
        self._path = path
        self._values = values
        self._asked: set[str] = set()

    # -- complaints ------------------------------------------------------------

    @property
    def name(self) -> str:
        """The header as the file has it, for messages."""
        names = [str(part) for part in self._path if isinstance(part, str)]
        return ".".join(names)

    def error(self, key: str, message: str) -> PolicyError:
        """Return the complaint about `key` of this table."""
        full = f"{self.name}.{key}".strip(".")
        return PolicyError(self._source, self.line_of(key), full, message)

    def line_of(self, key: str) -> int | None:
        """Line of `key` in this table, of the table's header when the key is not there."""
        counts: dict[tuple[str | int, ...], int] = {}
        current: tuple[str | int, ...] = ()
        header_line: int | None = None
        assignment = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]")
        for number, line in enumerate(self._text.splitlines(), 1):
            header = _HEADER.match(line)
            if header:
                current = ()
                names = [name.strip(" \"'") for name in header[2].split(".")]
                for depth, name in enumerate(names):
                    current += (name,)
                    last = depth == len(names) - 1
                    if last and header[1] == "[[":
                        counts[current] = counts.get(current, -1) + 1
                    if current in counts:
                        current += (counts[current],)
                if current == self._path:
                    header_line = number
                elif current[: len(self._path) + 1] == (*self._path, key):
                    return number
            elif current == self._path and assignment.match(line):
                return number
        return header_line

    def finish(self) -> None:
        """Complain about a key that nobody asked for."""
        for key in self._values:
            if key not in self._asked:
                known = ", ".join(sorted(self._asked))
                raise self.error(key, f"there is no such setting; known here: {known}")

    # -- values ----------------------------------------------------------------

    def has(self, key: str) -> bool:
        """Whether the file has `key`."""
        self._asked.add(key)
        return key in self._values

    def _take(self, key: str, default: object) -> object:
        self._asked.add(key)
        value = self._values.get(key, default)
        if value is _MISSING:
            raise self.error(key, "is missing")
        return value

    def text(self, key: str, default: object = _MISSING) -> str:
        """Return a string that is not empty."""
        value = self._take(key, default)
        if value is default:
            return str(value)
        if not isinstance(value, str) or not value:
            raise self.error(key, f"expected a string, not {value!r}")
        return value

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        """Return one of `allowed`."""
        value = self._take(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, f"expected one of {', '.join(allowed)}, not {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, not {value!r}")
        return value

    def whole(self, key: str, default: int, minimum: int = 0, maximum: int = 2**63 - 1) -> int:
        """Return a whole number; sizes may be written as "64MiB"."""
        value = self._take(key, default)
        if isinstance(value, str) and (size := _SIZE.fullmatch(value)):
            value = int(size[1]) * _UNITS[size[2]]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"expected a whole number, not {value!r}")
        if not minimum <= value <= maximum:
            raise self.error(key, f"expected a number from {minimum} to {maximum}, not {value}")
        return value

    def number(self, key: str, default: float, minimum: float = 0.0, maximum: float = 1e9) -> float:
        """Return a number, for seconds and rates."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"expected a number, not {value!r}")
        if not minimum <= value <= maximum:
            raise self.error(key, f"expected a number from {minimum} to {maximum}, not {value}")
        return float(value)

    def octal(self, key: str, default: int) -> int:
        """Return a file mode, written as the string "0660"."""
        value = self._take(key, None)
        if value is None:
            return default
        if not isinstance(value, str) or not re.fullmatch("0?[0-7]{3}", value):
            raise self.error(key, 'expected a mode as a string, "0660"')
        return int(value, 8)

    def _list(self, key: str) -> list[object] | None:
        value = self._take(key, None)
        if value is None:
            return None
        return value if isinstance(value, list) else [value]

    def texts(self, key: str) -> tuple[str, ...] | None:
        """Return a string or a list of them, None when the key is not there."""
        values = self._list(key)
        if values is None:
            return None
        if not values or not all(isinstance(value, str) and value for value in values):
            raise self.error(key, "expected a string or a list of strings")
        return tuple(str(value) for value in values)

    def uids(self, key: str) -> frozenset[int] | None:
        """Return user numbers; names are looked up now.  None when the key is not there."""
        return self._ids(key, "user", lambda name: pwd.getpwnam(name).pw_uid)

    def gids(self, key: str) -> frozenset[int] | None:
        """Return group numbers; names are looked up now.  None when the key is not there."""
        return self._ids(key, "group", lambda name: grp.getgrnam(name).gr_gid)

    def _ids(self, key: str, kind: str, look_up: object) -> frozenset[int] | None:
        values = self._list(key)
        if values is None:
            return None
        found: set[int] = set()
        for value in values:
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_ID:
                found.add(value)
            elif isinstance(value, str):
                try:
                    found.add(look_up(value))  # type: ignore[operator]
                except KeyError:
                    raise self.error(key, f"this host has no {kind} {value!r}") from None
            else:
                raise self.error(key, f"expected a {kind}'s number or name, not {value!r}")
        if not found:
            raise self.error(key, f"names no {kind}")
        return frozenset(found)

    # -- tables inside ------------------------------------------------------------

    def table(self, key: str) -> Table:
        """Return the table `key`, empty when it is not there."""
        value = self._take(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"expected a table [{key}]")
        return Table(self._source, self._text, (*self._path, key), value)

    def tables(self, key: str) -> list[Table]:
        """Return the tables of the array `key`."""
        value = self._take(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(key, f"expected tables [[{self.name}.{key}]]".replace("[[.", "[["))
        return [
            Table(self._source, self._text, (*self._path, key, index), item)
            for index, item in enumerate(value)
        ]


def read_toml(path: Path) -> Table:
    """Return the file's top table.

    Raises
    ------
    PolicyError
        The file cannot be read or is not TOML.

    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(str(path), None, "", f"cannot be read: {error}") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        raise PolicyError(str(path), int(found[1]) if found else None, "", str(error)) from error
    return Table(str(path), text, (), values)
