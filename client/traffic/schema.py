"""The operations that there are and what they take, as protocol.cddl has it: for who types requests."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

__all__ = ["arguments_of", "operations"]

_SCHEMA = Path(__file__).resolve().parents[1] / "protocol.cddl"
_REQUEST = re.compile(r'^[a-z-]+\s*= \{ "id": id, op: "([a-z.]+)"(?:, \??\s*args: ([a-z-]+))?', re.MULTILINE)
_COMMENT = re.compile(r";[^\n]*")
_KEY = re.compile(r'[{,]\s*(?:\?\s*)?"?([a-z_]+)"?:')


@cache
def _requests() -> dict[str, str]:
    return dict(_REQUEST.findall(_SCHEMA.read_text()))


def operations() -> list[str]:
    """Return the names of all operations."""
    return sorted(_requests())


def arguments_of(operation: str) -> list[str]:
    """Return the keys of the arguments that an operation takes; none for one that is not known."""
    rule = _requests().get(operation)
    if not rule:
        return []
    text = _COMMENT.sub("", _SCHEMA.read_text())
    found = re.search(rf"^{rule}\s*= (\{{.*?\* tstr)", text, re.MULTILINE | re.DOTALL)
    return _KEY.findall(found.group(1)) if found else []
