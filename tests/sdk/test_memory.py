"""memcpy, memmove and memset of the SDK against Python's slices."""

from __future__ import annotations

import random
import struct

from gate import OK, Holder
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

SIZE = 1024
CONTENT = random.Random(1).randbytes(SIZE)

lengths = st.one_of(st.integers(0, 40), st.integers(0, 300), st.integers(0, SIZE))


def run(holder: Holder, operation: int, to: int, source: int, length: int) -> bytes:
    status, reply = holder.call(b"memory", struct.pack("<4Q", operation, to, source, length) + CONTENT)
    assert status == OK
    return reply


def moved(to: int, source: int, length: int) -> bytes:
    return CONTENT[:to] + CONTENT[source : source + length] + CONTENT[to + length :]


@settings(max_examples=300, deadline=None, suppress_health_check=[*HealthCheck])
@given(operation=st.integers(0, 2), to=st.integers(0, SIZE), source=st.integers(0, SIZE), length=lengths)
def test_moves_of_every_length_and_alignment(
    holder: Holder, operation: int, to: int, source: int, length: int
) -> None:
    assume(length <= SIZE - max(to, source))
    if operation == 0:
        assume(abs(to - source) >= length)
    expected = moved(to, source, length)
    if operation == 2:
        expected = CONTENT[:to] + bytes([source & 0xFF]) * length + CONTENT[to + length :]
    assert run(holder, operation, to, source, length) == expected


def test_overlapping_moves_by_a_few_bytes(holder: Holder) -> None:
    for distance in range(-17, 18):
        for length in (1, 7, 8, 9, 16, 17, 64, 300):
            assert run(holder, 1, 100 + distance, 100, length) == moved(100 + distance, 100, length)
