"""Diagnostic notation: what is written can be read again, and a terminal takes it for text."""

from __future__ import annotations

import math
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teemate.traffic.diagnostic import DiagnosticError, parse, text, write


@pytest.mark.parametrize(
    ("value", "notation"),
    [  # RFC 8949, appendix A
        (0, "0"),
        (-1000, "-1000"),
        (18446744073709551615, "18446744073709551615"),
        (1.1, "1.1"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        (False, "false"),
        (None, "null"),
        (cbor2.undefined, "undefined"),
        (cbor2.CBORSimpleValue(255), "simple(255)"),
        (cbor2.CBORTag(1, 1363896240), "1(1363896240)"),
        (bytes.fromhex("01020304"), "h'01020304'"),
        ("IETF", '"IETF"'),
        ('"\\', '"\\"\\\\"'),
        ("ü水", '"ü水"'),
        ([1, [2, 3]], "[1, [2, 3]]"),
        ({"a": 1, "b": [2, 3]}, '{"a": 1, "b": [2, 3]}'),
        ({1: 2}, "{1: 2}"),
    ],
)
def test_values_are_written_as_the_rfc_has_them_and_read_again(value: object, notation: str) -> None:
    assert write(value) == notation
    assert parse(notation) == value


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_whatever_is_written_is_read_as_what_it_was_and_is_printable(value: Any) -> None:
    notation = write(value)
    assert parse(notation) == value
    assert notation.isprintable()


def test_what_would_command_a_terminal_is_escaped() -> None:
    assert text("\x1b[2J\x9b\u202e\U000e0001") == '"\\u001b[2J\\u009b\\u202e\\udb40\\udc01"'


@pytest.mark.parametrize("value", ["[1", "{", '{"a"}', "h'0'", "no", "1 2", '"\\q"', "[" * 50, "-1(2)", "§"])
def test_what_is_no_notation_is_refused_with_its_place(value: str) -> None:
    with pytest.raises(DiagnosticError, match="at character"):
        parse(value)


def test_comments_and_other_bases_are_read() -> None:
    assert parse("[0x10, /sixteen/ 1e2, h'00 ff'] # and no more") == [16, 100.0, b"\x00\xff"]
