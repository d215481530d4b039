"""Dashboard, alert rules and their page are about metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MONITORING = Path(__file__).resolve().parents[2] / "docs" / "monitoring"
METRIC = re.compile(r"\bteemate_[a-z_]+\b")


def offered() -> set[str]:
    """Every series of a broker with something in each of its families, by name."""
    metrics = pytest.importorskip(
        "teemate.broker.telemetry.metrics", reason="prometheus-client is not installed: there are no metrics"
    )
    import structlog

    from teemate.broker.policy.rules import Policy
    from teemate.broker.service import Service

    service = Service(Policy(), structlog.wrap_logger(structlog.ReturnLogger()))
    names: set[str] = {"teemate_host_epc_bytes"}  # where the kernel tells
    for family in metrics.families(metrics.read(service)).collect():
        suffixes = {"counter": ["_total"], "info": ["_info"], "histogram": ["_bucket", "_count", "_sum"]}
        names |= {family.name + suffix for suffix in suffixes.get(family.type, [""])}
    for part in ("connections_total", "connections_waiting", "protocol_breaches_total"):
        names.add(f"teemate_{part}")  # of its server, which this one has not
    return names


def values() -> set[tuple[str, str]]:
    """Metrics, and what their labels of a fixed few values may be."""
    metrics = pytest.importorskip(
        "teemate.broker.telemetry.metrics", reason="prometheus-client is not installed"
    )
    import structlog

    from teemate.broker.policy.rules import DenialReason, Policy
    from teemate.broker.service import Service

    service = Service(Policy(), structlog.wrap_logger(structlog.ReturnLogger()))
    found = {
        (sample.name, value)
        for family in metrics.families(metrics.read(service)).collect()
        for sample in family.samples
        for label, value in sample.labels.items()
        if label in ("outcome", "kind", "state")
    }
    found |= {("teemate_slots", state) for state in metrics._SLOT_STATES}
    return found | {("teemate_denials_total", reason.value) for reason in DenialReason}


def expressions(found: Any) -> Iterator[str]:
    """The queries of a dashboard."""
    if isinstance(found, dict):
        for key, inside in found.items():
            if key in ("expr", "query") and isinstance(inside, str):
                yield inside
            yield from expressions(inside)
    elif isinstance(found, list):
        for inside in found:
            yield from expressions(inside)


def test_every_query_of_the_dashboard_is_about_metrics_that_there_are() -> None:
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    named = {name for text in expressions(dashboard) for name in METRIC.findall(text)}
    assert len(named) > 20
    assert named - offered() == set()
    panels = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(panels)) == len(panels)


def test_every_rule_is_about_metrics_that_there_are() -> None:
    rules = re.findall(r"^ +expr: (.*)$", (MONITORING / "alerts.yml").read_text(), re.MULTILINE)
    assert len(rules) == 9
    assert {name for rule in rules for name in METRIC.findall(rule)} - offered() == set()


def test_the_page_explains_every_metric_and_no_other() -> None:
    page = (MONITORING / "README.md").read_text()
    told = {name.removesuffix("_total") for name in METRIC.findall(page)}
    there = {re.sub("_(total|bucket|count|sum)$", "", name) for name in offered()}
    assert told == there


def test_the_page_has_the_values_of_labels() -> None:
    rows = (MONITORING / "README.md").read_text().split("\n| ")
    there = values()
    assert len(there) > 25
    assert {
        (metric, value)
        for metric, value in there
        if not any(f"`{metric}" in row and f"`{value}`" in row for row in rows)
    } == set()


def promtool(*arguments: str, folder: Path = MONITORING) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("there is no promtool (Debian's package prometheus)")
    return subprocess.run(
        [program, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )


def test_promtool_takes_the_rules() -> None:
    done = promtool("check", "rules", "alerts.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_should_and_not_before() -> None:
    done = promtool("test", "rules", "alerts.test.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    rules = set(re.findall(r"- alert: (\w+)", (MONITORING / "alerts.yml").read_text()))
    assert set(re.findall(r"alertname: (\w+)", (MONITORING / "alerts.test.yml").read_text())) == rules


def test_a_rule_that_never_fires_is_found_by_those_tests(tmp_path: Path) -> None:
    text = (MONITORING / "alerts.yml").read_text()
    (tmp_path / "alerts.yml").write_text(text.replace("teemate_leaked_mappings > 0", "teemate_leaked > 0"))
    shutil.copy(MONITORING / "alerts.test.yml", tmp_path)
    done = promtool("test", "rules", "alerts.test.yml", folder=tmp_path)
    assert done.returncode != 0
    assert "TeeMateMappingLeaked" in done.stdout + done.stderr
