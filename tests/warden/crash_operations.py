"""What clients do when they are killed at chosen instructions: calls of the vault and of crash.c."""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

FULL = bool(os.environ.get("TEEMATE_TEST_FULL"))
"""Whether to examine each instruction by itself, which takes minutes."""

SHARED = 1
VALUE = b"v" * 40
"""A value's and a block's bytes are written by instructions that count each, so they are few."""


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def put(key: bytes, value: bytes, expected: int = 0) -> bytes:
    return struct.pack("<BBHIQQ", SHARED, 0, len(key), len(value), 0, expected) + key + value


def name(key: bytes) -> bytes:
    return struct.pack("<BBHI", SHARED, 0, len(key), 0) + key


class Operation(NamedTuple):
    before: list[tuple[str, bytes]]
    call: tuple[str, bytes]


OPERATIONS = {
    "malloc": Operation([], ("take", numbers(48))),
    "malloc from the middle": Operation(
        [("take", numbers(200, 48, 200, 48)), ("give", numbers(0, 2))], ("take", numbers(100))
    ),
    "free": Operation([("take", numbers(48))], ("give", numbers(0))),
    "free between free blocks": Operation(
        [("take", numbers(48, 48, 48, 48)), ("give", numbers(0, 2))], ("give", numbers(1))
    ),
    "put of a new key": Operation([], ("put", put(b"new", VALUE))),
    "put over a value": Operation([], ("put", put(b"one", VALUE))),
    "put over a value by a larger one": Operation([], ("put", put(b"two", VALUE * 4))),
    "delete": Operation([], ("delete", name(b"two"))),
    "compare_and_swap": Operation([], ("compare_and_swap", put(b"new", VALUE))),
    "transfer under two locks": Operation([("transfer", numbers(7))], ("transfer", numbers(5))),
    "more blocks than a slot lists": Operation([("hoard", numbers(64, 1))], ("hoard", numbers(2, 1))),
}

if FULL:
    # Larger than what is copied to the stack; each byte that is written to the heap is one more state.
    OPERATIONS["put of a large value"] = Operation([], ("put", put(b"one", b"v" * 2100)))
