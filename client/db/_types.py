"""What Python's types are stored as, and what columns come back as: the rules of the sqlite3 module."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any

from teemate.db._errors import ProgrammingError

__all__ = [
    "PARSE_COLNAMES",
    "PARSE_DECLTYPES",
    "Binary",
    "Date",
    "DateFromTicks",
    "PrepareProtocol",
    "Time",
    "TimeFromTicks",
    "Timestamp",
    "TimestampFromTicks",
    "adapt",
    "adapted",
    "adapters",
    "converter_of",
    "converters",
    "register_adapter",
    "register_converter",
    "shown_name",
]

PARSE_DECLTYPES = 1
"""For `detect_types`: the declared type of a column names its converter."""
PARSE_COLNAMES = 2
"""For `detect_types`: ``[name]`` in a column's name does."""

Date = datetime.date
Time = datetime.time
Timestamp = datetime.datetime
Binary = memoryview


def DateFromTicks(ticks: float) -> datetime.date:  # noqa: N802  its name in PEP 249
    """Return the local date of `ticks`, seconds since 1970."""
    return Date(*time.localtime(ticks)[:3])


def TimeFromTicks(ticks: float) -> datetime.time:  # noqa: N802
    """Return the local time of day of `ticks`, seconds since 1970."""
    return Time(*time.localtime(ticks)[3:6])


def TimestampFromTicks(ticks: float) -> datetime.datetime:  # noqa: N802
    """Return the local date and time of `ticks`, seconds since 1970."""
    return Timestamp(*time.localtime(ticks)[:6])


class PrepareProtocol:
    """What ``__conform__`` is asked for when a value is to become a parameter."""


adapters: dict[tuple[type, Any], Callable[[Any], object]] = {}
"""By type and protocol: what makes a value one that SQLite has."""
converters: dict[str, Callable[[bytes], object]] = {}
"""By name, in capitals: what makes a column's bytes a value."""

_PLAIN = frozenset({int, float, str, bytes, bytearray, type(None)})
_MISSING = object()


def register_adapter(kind: type, adapter: Callable[[Any], object], /) -> None:
    """Have values of exactly this `kind` stored as what `adapter` returns for them."""
    adapters[(kind, PrepareProtocol)] = adapter


def register_converter(name: str, converter: Callable[[bytes], object], /) -> None:
    """Have columns of type `name` come back as what `converter` makes of their bytes (see `detect_types`)."""
    converters[name.upper()] = converter


def adapt(value: Any, protocol: Any = PrepareProtocol, alternative: Any = _MISSING, /) -> Any:
    """Return `value` as `protocol` wants it; else `alternative`, else raises :class:`ProgrammingError`."""
    adapter = adapters.get((type(value), protocol))
    if adapter is not None:
        return adapter(value)
    for owner, name, about in ((protocol, "__adapt__", value), (value, "__conform__", protocol)):
        ask = getattr(owner, name, None)
        if ask is None:
            continue
        try:
            answer = ask(about)
        except TypeError:
            continue
        if answer is not None:
            return answer
    if alternative is not _MISSING:
        return alternative
    raise ProgrammingError("can't adapt")


def adapted(value: object) -> object:
    """Return what is stored for `value`, which may be of any type."""
    kind = type(value)
    if kind in _PLAIN and (kind, PrepareProtocol) not in adapters:
        return value
    return adapt(value, PrepareProtocol, value)


def converter_of(name: str, declared: str | None, detect_types: int) -> Callable[[bytes], object] | None:
    """Return the converter for a column, by ``[type]`` in its name first, then by its declared type."""
    if detect_types & PARSE_COLNAMES:
        _, bracket, rest = name.partition("[")
        kind, end, _ = rest.partition("]")
        if bracket and end:
            found = converters.get(kind.upper())
            if found is not None:
                return found
    if detect_types & PARSE_DECLTYPES and declared:
        return converters.get(declared.partition(" ")[0].partition("(")[0].upper())
    return None


def shown_name(name: str, detect_types: int) -> str:
    """Return a column's name as `description` has it: without ``[type]`` where that was looked for."""
    if detect_types & PARSE_COLNAMES and "[" in name:
        return name.partition("[")[0].removesuffix(" ")
    return name


# ---- the types that sqlite3 knows from the start ---------------------------------------------


def _date(raw: bytes) -> datetime.date:
    return datetime.date(*map(int, raw.split(b"-")))


def _timestamp(raw: bytes) -> datetime.datetime:
    day, _, clock = raw.partition(b" ")
    whole, _, fraction = clock.partition(b".")
    year, month, number = map(int, day.split(b"-"))
    hour, minute, second = map(int, whole.split(b":"))
    return datetime.datetime(year, month, number, hour, minute, second, int(fraction[:6].ljust(6, b"0")))


register_adapter(datetime.date, datetime.date.isoformat)
register_adapter(datetime.datetime, lambda value: value.isoformat(" "))
register_converter("date", _date)
register_converter("timestamp", _timestamp)
