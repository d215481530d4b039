"""A row that knows its columns' names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

from teemate.db._cursor import Cursor

__all__ = ["Row"]


def _folded(name: str) -> bytes:
    """Return `name` as SQLite compares names: only ASCII letters have no case."""
    return name.encode(errors="surrogatepass").lower()


class Row(Sequence[Any]):
    """For `row_factory`: a tuple whose values are also found by name, in any case."""

    __slots__ = ("_description", "_values")
    _description: tuple[tuple[Any, ...], ...]
    _values: tuple[Any, ...]

    def __new__(cls, cursor: Cursor, values: tuple[Any, ...], /) -> Row:
        """Return the row with `values` that `cursor` has read."""
        # Not isinstance, which believes what an object says of its class.
        if not issubclass(type(cursor), Cursor):
            raise TypeError(f"a Cursor is wanted, not {type(cursor).__name__}")
        if not isinstance(values, tuple):
            raise TypeError(f"a tuple is wanted, not {type(values).__name__}")
        self = super().__new__(cls)
        self._description = cursor.description or ()
        self._values = values
        return self

    def keys(self) -> list[str]:
        """Return the columns' names."""
        return [column[0] for column in self._description]

    @overload
    def __getitem__(self, index: int | str) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        """Return the value at a position or of a name, or those of a slice."""
        if isinstance(index, str):
            wanted = _folded(index)
            for column, value in zip(self._description, self._values, strict=False):
                if _folded(column[0]) == wanted:
                    return value
            raise IndexError("No item with that key")
        if isinstance(index, (int, slice)):
            return self._values[index]
        raise IndexError("Index must be int or string")

    def __len__(self) -> int:
        """How many values it has."""
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        """Yield the values."""
        return iter(self._values)

    def __eq__(self, other: object) -> bool:
        """Whether names and values are the same."""
        if not isinstance(other, Row):
            return NotImplemented
        return self._description == other._description and self._values == other._values

    def __hash__(self) -> int:
        """Hash names and values."""
        return hash(self._description) ^ hash(self._values)

    def __repr__(self) -> str:
        """Show names and values."""
        shown = ", ".join(f"{name}={value!r}" for name, value in zip(self.keys(), self, strict=False))
        return f"<Row {shown}>"
