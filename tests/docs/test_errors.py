"""Every error code and every limit is explained, with cause and remedy, in docs/errors.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from teemate.broker.policy.limits import Limits, Resource
from teemate.db import _errors as database_errors
from teemate.errors import Error
from teemate.functions import _errors as function_errors
from teemate.functions._wire import LIMITS

PROJECT = Path(__file__).resolve().parents[2]
PAGE = (PROJECT / "docs" / "errors.md").read_text()


def kinds(base: type[Error] = Error) -> Iterator[type[Error]]:
    for cls in base.__subclasses__():
        if cls.__module__ == "teemate.errors":
            yield cls
            yield from kinds(cls)


def codes() -> set[str]:
    """Those of Python, of C and of the wire."""
    header = (PROJECT / "native/include/teemate_client.h").read_text()
    enum = header[header.index("enum teemate_code {") : header.index("struct teemate_error {")]
    native = re.findall(r"^    TEEMATE_([A-Z_]+) = [1-9][0-9]*,", enum, re.MULTILINE)
    assert len(native) == 19
    wire = (PROJECT / "client/protocol.cddl").read_text()
    rule = re.search(r"^error-code = (.*?)^id ", wire, re.MULTILINE | re.DOTALL)
    assert rule
    found = {cls.code for cls in kinds()}
    found |= {name.lower().replace("_", "-") for name in native}
    return found | set(re.findall(r'"([a-z-]+)"', rule[1]))


class Limit:
    """A place in the sources that tells which limit was met; `names` are what it may say."""

    def __init__(self, where: str, found: ast.Dict) -> None:
        self.where = where
        entries = {
            key.value: value
            for key, value in zip(found.keys, found.values, strict=True)
            if isinstance(key, ast.Constant)
        }
        self.keys = set(entries)
        value = entries["limit"]
        if isinstance(value, ast.Constant):
            self.names = {str(value.value)}
        elif ast.unparse(value) == "resource.value":
            self.names = {resource.value for resource in Resource}
        else:
            raise AssertionError(f"{where}: which limits are {ast.unparse(value)}?")


@cache
def limits() -> list[Limit]:
    """Every place where an error says which limit was met."""
    found: list[Limit] = []
    for folder in ("broker", "client"):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                # What is a dictionary itself describes a field (client/gateway/openapi.py), and is no limit.
                if isinstance(node, ast.Dict) and any(
                    isinstance(key, ast.Constant) and key.value == "limit" and not isinstance(value, ast.Dict)
                    for key, value in zip(node.keys, node.values, strict=True)
                ):
                    found.append(Limit(f"{path.relative_to(PROJECT)}:{node.lineno}", node))
    assert len(found) >= 12
    return found


def sections(page: str) -> dict[str, str]:
    return dict(re.findall(r"^### `([a-z-]+)`\n(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL))


def rows(page: str) -> dict[str, list[str]]:
    table = page[page.index("## By limit") :]
    return {
        name: [cell.strip() for cell in rest.split("|")]
        for name, rest in re.findall(r"^\| `([^`]+)` \|(.*)\|$", table, re.MULTILINE)
        if name != "limit"  # the headings
    }


def unexplained(page: str) -> set[str]:
    """Codes and limits that the page does not explain whole."""
    there = sections(page)
    missing = {code for code in codes() if code not in there}
    missing |= {
        code for code, text in there.items() if len(re.findall(r"\*\*(Cause|Remedy):\*\*\s+\S+", text)) != 2
    }
    names = {field.name for field in fields(Limits)}.union(*(limit.names for limit in limits()))
    return missing | {
        name for name in names if [bool(cell) for cell in rows(page).get(name, [])] != [True] * 2
    }


def test_every_code_and_every_limit_is_explained_with_its_remedy() -> None:
    assert unexplained(PAGE) == set()


def test_the_page_explains_nothing_that_there_is_not() -> None:
    assert set(sections(PAGE)) == codes()
    names = {field.name for field in fields(Limits)}.union(*(limit.names for limit in limits()))
    assert set(rows(PAGE)) == names


@pytest.mark.parametrize(
    ("was", "now", "missing"),
    [
        ("### `draining`", "### draining", "draining"),
        ("**Remedy:** none needed", "None needed", "call-abandoned"),
        ("| `clients_per_uid` |", "| clients per uid |", "clients_per_uid"),
        ("| `[limits] handshake_seconds` |", "| |", "handshake_seconds"),
    ],
)
def test_what_is_not_explained_is_found(was: str, now: str, missing: str) -> None:
    assert PAGE.count(was) == 1
    assert unexplained(PAGE.replace(was, now)) == {missing}


def test_every_error_about_a_limit_names_the_setting_and_what_it_is() -> None:
    for limit in limits():
        assert "setting" in limit.keys or limit.where.startswith("broker/slots/shortage.py"), limit.where
        if not limit.where.startswith("client/"):  # which does not know the broker's
            assert "maximum" in limit.keys, limit.where


def test_every_error_of_the_database_is_explained() -> None:
    part = PAGE[PAGE.index("## The database") : PAGE.index("## Functions")]
    rows = set(re.findall(r"^\| `([A-Za-z]+)` \| [^|]+ \| [^|]+ \|$", part, re.MULTILINE))
    bases = {"Error", "DatabaseError", "Warning"}
    assert rows == {name for name in database_errors.__all__ if name[0].isupper()} - bases


def test_every_error_and_limit_of_functions_is_explained() -> None:
    part = PAGE[PAGE.index("## Functions") : PAGE.index("## By limit")]
    rows = re.findall(r"^\| `?([a-z-]+)`? \| [^|]+ \| [^|]+ \|$", part, re.MULTILINE)
    codes = {getattr(function_errors, name).code for name in function_errors.__all__} - {"function-error"}
    assert {row for row in rows if row not in ("code", "---")} == codes | {name for name in LIMITS if name}
