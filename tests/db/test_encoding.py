"""Requests and answers of the database enclave in bytes: what goes in comes out, and no more."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teemate.db import _wire as wire
from teemate.errors import ProtocolError

VALUES = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
)


@st.composite
def tables(draw: st.DrawFn) -> list[list[object]]:
    width = draw(st.integers(1, 5))
    return draw(st.lists(st.lists(VALUES, min_size=width, max_size=width), max_size=8))


def result(rows: list[list[object]], *, flags: int = 0, described: bytes = b"", cursor: int = 0) -> bytes:
    """Encode a struct db_rows as the enclave does."""
    data = b"".join(map(wire.encode_set, rows))
    width = len(rows[0]) if rows else 1
    head = struct.pack(
        "<BBHIIIIIqq", 1, flags, width, len(rows), cursor, len(described), len(data), 0, 7, 2**40
    )
    return head + described + data


def plain(value: object) -> object:
    return value.decode() if isinstance(value, wire.Text) else value


@given(st.lists(tables(), max_size=4))
def test_rows_of_any_values_come_back(each: list[list[list[object]]]) -> None:
    batches, failure = wire.decode(b"".join(map(result, each)))
    assert failure is None
    for rows, batch in zip(each, batches, strict=True):
        read = [batch.row() for _ in range(len(batch))]
        assert [[plain(value) for value in row] for row in read] == rows
        assert [[type(plain(value)) for value in row] for row in read] == [
            [type(value) for value in row] for row in rows
        ]
        assert (batch.changes, batch.last_rowid) == (7, 2**40)


@given(tables(), st.data())
def test_an_answer_that_was_cut_short_is_refused(rows: list[list[object]], data: st.DataObject) -> None:
    whole = result(rows)
    cut = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(ProtocolError):
        wire.decode(whole[:cut])


@given(st.binary(max_size=200))
def test_bytes_that_are_no_answer_are_refused_or_read(raw: bytes) -> None:
    try:
        batches, _ = wire.decode(raw)
        for batch in batches:
            while len(batch):
                batch.row()
    except ProtocolError:
        pass


def test_names_and_declared_types_are_told_apart() -> None:
    described = b"\1\0a\xff\xff" + b"\2\0\xc3\xa4\7\0INTEGER"
    (batch,), _ = wire.decode(result([[1, 2]], described=described))
    assert batch.names == (("a", None), ("ä", "INTEGER"))


def test_a_cursor_is_open_only_with_its_flag() -> None:
    (open_, ended), _ = wire.decode(result([[1]], flags=1, cursor=9) + result([[1]], cursor=9))
    assert (open_.cursor, ended.cursor) == (9, 0)


def test_an_error_ends_the_results() -> None:
    error = struct.pack("<BBHiiIII", 2, 2, 0, 2067, -1, 3, 0, 2) + b"no"
    batches, failure = wire.decode(result([[1]]) + error)
    assert len(batches) == 1
    assert failure == wire.Failure(2067, "no", -1, 3, 0, transaction=True)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
def test_integers_of_more_than_64_bits_are_refused(value: int) -> None:
    with pytest.raises(OverflowError):
        wire.encode_set([value])


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        wire.encode_set(["\ud8ff"])


def test_a_value_of_another_type_is_named_by_its_position() -> None:
    with pytest.raises(TypeError) as refused:
        wire.encode_set([1, object()])
    assert refused.value.args == (1,)
