"""As much of a list as fits into a reply: a message has 64 KiB, and users and enclaves are any number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

from teemate import wire

__all__ = ["Page", "fill_page"]

_BYTES = 20 * 1024
"""Of a message that has two lists, and what is no list besides."""
K = TypeVar("K", int, str)


class Page(NamedTuple, Generic[K]):
    """Entries in the order of their keys; `last` is the key from which it goes on."""

    entries: list[Mapping[str, object]]
    last: K | None
    more: bool


def fill_page(entries: Iterable[tuple[K, Mapping[str, object]]], *, after: K | None) -> Page[K]:
    """Return the entries whose keys come after `after`, as many as there is room for, and one at least."""
    room = _BYTES
    taken: list[Mapping[str, object]] = []
    last = after
    for key, entry in sorted(entries, key=lambda pair: pair[0]):
        if after is not None and key <= after:
            continue
        room -= len(wire.encode(entry))
        if room < 0 and taken:
            return Page(taken, last, True)
        taken.append(entry)
        last = key
    return Page(taken, last, False)
