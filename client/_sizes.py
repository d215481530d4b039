"""Sizes as people write them: ``64M``, ``64MiB``, ``4096``."""

from __future__ import annotations

import re

__all__ = ["about_size", "format_size", "parse_size"]

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:iB|B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that `text` means; units are powers of 1024 (K, M, G, T; KiB and so on are the same).

    Raises ValueError with a sentence for people.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a size: write bytes, or a number with K, M, G or T (64M, 64MiB)")
    size = int(found[1]) << _UNITS[found[2].upper()]
    if size >= 1 << 63:
        raise ValueError(f"{text!r} is more than an address space holds")
    return size


def format_size(size: int) -> str:
    """Return `size` (bytes) in the largest unit that divides it."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift} {unit}"
    return f"{size} B"


def about_size(size: int) -> str:
    """Return `size` (bytes) with one digit after the point, where the exact number tells nobody anything."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.1f} {unit}"
    return f"{size} B"
