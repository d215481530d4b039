"""teemate.toml(5) and the example policy have every key that the broker reads, and the defaults that hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from teemate.broker.policy import rules
from teemate.broker.policy.limits import Limits
from teemate.broker.policy.toml_reader import Table

PROJECT = Path(__file__).resolve().parents[2]
PAGE = (PROJECT / "man" / "teemate.toml.5").read_text()
EXAMPLE = (PROJECT / "systemd" / "broker.toml.example").read_text()
SMALLEST = """\
[administrators]
[[enclave]]
name = "e"
start = "create"
[[enclave.attach]]
uid = 1
[[create]]
uid = 1
"""
# Keys whose tables are told by a heading, and conditions, which two tables have in common.
NOT_ITEMS = {"": None, "enclave": {"attach"}, "create": {"uid", "gid", "cgroup"}}
# Whose default is told in words, or is the value of a field of another name.
WORDS = {"state_directory", "socket_group", "owner", "sigstruct", "identity", "share_between_owners"}
WORDS |= {"insecure_sim_sharing"}


def read_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, set[str]]:
    """What the broker asks a policy for, by table."""
    asked: dict[str, set[str]] = {}
    finish = Table.finish

    def remember(table: Table) -> None:
        asked.setdefault(table.name, set()).update(table._asked)
        finish(table)

    monkeypatch.setattr(Table, "finish", remember)
    policy = tmp_path / "broker.toml"
    policy.write_text(SMALLEST)
    rules.load_policy(policy, default_owner=0)
    return asked


def items(page: str) -> dict[str, dict[str, str]]:
    """Keys of the page with what stands in parentheses, by table."""
    found: dict[str, dict[str, str]] = {}
    for section in re.split(r"^\.Ss ", page, flags=re.MULTILINE)[1:]:
        name = re.match(r"\[+([a-z.]+)\]+ table", section)
        assert name is not None, section[:40]
        pairs = re.findall(r"^\.It Ic (\w+)(?: Pq (.*))?$", section, re.MULTILINE)
        found[name[1]] = {key: default.removeprefix("Qq ") for key, default in pairs}
    return found


def examples(text: str) -> dict[str, set[str]]:
    """Keys of the example, also those behind a #, by table."""
    found: dict[str, set[str]] = {}
    table = ""
    for line in text.splitlines():
        if header := re.fullmatch(r"(?:# )?\[+([a-z.]+)\]+", line):
            table = header[1]
        elif key := re.match(r"(?:# )?([a-z_]+) = ", line):
            found.setdefault(table, set()).add(key[1])
    return found


def test_the_page_has_the_keys_of_every_table_and_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = read_keys(monkeypatch, tmp_path)
    assert {name for name in asked if name} == set(items(PAGE))
    for table, keys in asked.items():
        left_out = NOT_ITEMS.get(table, set())
        if left_out is not None:
            assert keys - left_out == set(items(PAGE)[table]), table


def test_the_example_has_the_keys_of_every_table_and_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked, there = read_keys(monkeypatch, tmp_path), examples(EXAMPLE)
    conditions = {"uid", "gid", "cgroup"}  # in comments there, and not in each table
    for table, keys in asked.items():
        if table:
            assert keys - {"attach"} - conditions == there[table] - conditions, table


def test_the_page_tells_the_defaults_that_hold() -> None:
    tables: dict[str, object] = {
        "broker": rules.BrokerSettings(),
        "metrics": rules.MetricsSettings(),
        "limits": Limits(),
        "enclave": rules.EnclavePolicy(name="e", owner=0),
        "create": rules.CreateRule(who=rules.Rule()),
    }
    compared = 0
    for table, defaults in tables.items():
        for key, told in items(PAGE)[table].items():
            if not told or key in WORDS:
                continue
            value = getattr(defaults, key)
            if key.endswith("_mode"):
                expected = {f"{value:04o}"}
            elif told.endswith(("MiB", "GiB")):
                expected = {f"{value >> 20}MiB", f"{value >> 30}GiB"}
            else:
                expected = {"none", "any"} if value is None else {str(value), str(value).lower()}
            assert told in expected, f"{table}.{key}"
            compared += 1
    assert compared > 35


def test_a_key_that_is_missing_or_has_another_default_would_be_found() -> None:
    assert "trust_pid" not in items(PAGE.replace(".It Ic trust_pid", ".It trust_pid"))["broker"]
    assert items(PAGE.replace("Ic requests Pq 256", "Ic requests Pq 255"))["limits"]["requests"] == "255"
