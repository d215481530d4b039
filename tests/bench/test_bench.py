"""`teemate bench`: each benchmark works against a real broker, and says what it is to say.

How fast anything is, is judged nowhere here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backends import BACKEND
from click.testing import CliRunner

import teemate
from teemate.bench._plot import _PICTURES, draw
from teemate.bench._rows import TARGETS, Result, Row, Sample, Target, compared, plain
from teemate.bench._run import BENCHES, Report, run_bench
from teemate.bench._setting import C_SUBJECT
from teemate.cli.main import cli
from teemate.errors import Unsupported

KEYS = ["figure", "value", "unit", "p99", "n", "relative_to", "ratio", "target", "met"]
OF_CHURN = {figure for figure in TARGETS if figure.startswith("churn")}
OF_FUNCTIONS = {figure for figure in TARGETS if figure.startswith("fn_")}
OF_DB = {figure for figure in TARGETS if figure.startswith("db_")}
AT_1024 = "attach_at_1024"
IMAGES = Path(teemate.__file__).parent / "images"
FROM_C = {"warm_attach_c", "cold_attach_c"}


class Silence:
    def phase(self, text: str, total: int = 0) -> None:
        """Say nothing."""

    def progress(self, done: int) -> None:
        """Say nothing."""


def tiny(name: str, *, quick: bool = True, scale: float = 0.02, **more: object) -> Report:
    return run_bench(name, Silence(), backend=BACKEND, quick=quick, scale=scale, **more)


@pytest.fixture(scope="module")
def everything() -> Report:
    """All but functions, which have a test of their own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("teemate.bench._run.functions_lack", lambda: "not here")
        return tiny("all")


def number_of(row: Row) -> float:
    return row.value if row.ratio is None else row.ratio


def by_figure(report: Report) -> dict[str, Row]:
    return {row.figure: row for row in report.result.rows}


# ---- what the rows say ---------------------------------------------------------------------------


def test_every_figure_with_a_target_is_measured(everything: Report) -> None:
    figures = set(by_figure(everything))
    missing = set() if C_SUBJECT.is_file() else FROM_C
    # Of a tiny crowd the figure has the crowd's number.
    assert set(TARGETS) - OF_CHURN - OF_DB - OF_FUNCTIONS - missing - {AT_1024} <= figures
    assert any(figure.startswith("attach_at_") for figure in figures)


@pytest.mark.parametrize("lack", ["", "their compiler is missing"])
def test_functions_are_measured_with_all_where_they_can_be_and_else_it_is_said(
    monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    class Told(Silence):
        def __init__(self) -> None:
            self.phases: list[str] = []

        def phase(self, text: str, total: int = 0) -> None:
            self.phases.append(text)

    def played(name: str) -> Callable[[object], Result]:
        return lambda _: Result((plain(name, 1, "s"),))

    listener = Told()
    monkeypatch.setattr("teemate.bench._run._SINGLE", {name: played(name) for name in BENCHES})
    monkeypatch.setattr("teemate.bench._run.hash_rate", lambda _: ())
    monkeypatch.setattr("teemate.bench._run.functions_lack", lambda: lack)
    figures = by_figure(run_bench("all", listener, backend=BACKEND, quick=True))
    assert ("functions" in figures) == (not lack)
    assert [text for text in listener.phases if "left out" in text] == (
        [f"functions are left out: {lack}"] if lack else []
    )


def test_each_figure_is_there_once_and_what_it_is_compared_with_as_well(everything: Report) -> None:
    rows = everything.result.rows
    assert len(by_figure(everything)) == len(rows)
    assert {row.relative_to for row in rows} - {None} <= set(by_figure(everything))


def test_rows_are_what_they_are_documented_to_be(everything: Report) -> None:
    said: dict[str, Any] = json.loads(json.dumps(everything.as_json()))
    assert list(said) == ["bench", "backend", "host", "rows"]
    assert said["bench"] == "all"
    assert said["backend"] == BACKEND
    assert {"processor", "cores", "memory_mib", "kernel", "python", "load"} <= set(said["host"])
    for row in said["rows"]:
        assert list(row) == KEYS
        assert isinstance(row["value"], int | float)
        assert math.isfinite(row["value"])
        assert row["n"] >= 1
        assert (row["met"] is None) == (row["target"] is None) == (row["figure"] not in TARGETS)


def test_whether_a_target_is_met_is_what_the_numbers_say(everything: Report) -> None:
    for row in everything.result.rows:
        if row.figure in TARGETS and row.figure != "empty_call":
            assert row.met == TARGETS[row.figure].met_by(number_of(row)), row


@pytest.mark.parametrize(
    ("ours", "met"), [(300, True), (301, False), (1000, False), (float("nan"), False), (1, True)]
)
def test_a_target_that_is_missed_is_not_met(ours: float, met: bool) -> None:
    row = compared("warm_attach", Sample([ours]), Sample([100]), "floor_warm")
    assert row.met is met
    assert row.target == "<= 3"


def test_a_target_may_be_the_least_that_is_wanted() -> None:
    assert plain("epc_ratio", 15.0, "times").met is True
    assert plain("epc_ratio", 14.9, "times").met is False
    assert str(Target(0.9, at_most=False)) == ">= 0.9"


def test_a_figure_without_a_target_is_neither_met_nor_missed() -> None:
    row = plain("memory_broker", 1.0, "MiB")
    assert row.met is None
    assert row.target is None


def test_a_sample_has_the_values_that_were_measured() -> None:
    sample = Sample([5, 1, 4, 2, 3])
    assert (sample.p50, sample.p99, sample.n) == (3, 5, 5)
    assert sample.spread == pytest.approx(2 / 3)


def test_a_slower_host_in_some_turns_changes_no_ratio_of_turns() -> None:
    ours = Sample.of_turns([[10, 11, 90], [20, 22], [10, 11], [20, 22]])
    theirs = Sample.of_turns([[10, 10], [20, 20], [10, 10], [2000, 20, 20]])
    assert ours.against(theirs) == pytest.approx(1.05, rel=0.01)
    row = compared("counted_call_py", ours, theirs, "empty_call_py", by_turn=True)
    assert row.ratio == pytest.approx(1.05, rel=0.01)
    assert row.met is False
    with pytest.raises(ValueError, match="zip"):
        ours.against(Sample([10.0]))  # that had no turns


# ---- each benchmark ----------------------------------------------------------------------------------


def test_floor_measures_what_others_are_compared_with() -> None:
    figures = by_figure(tiny("floor"))
    assert {"floor_warm", "floor_cold", "floor_transition", "floor_getppid", "floor_creation"} <= set(figures)


def test_call_measures_payloads_ocalls_and_cores_when_there_is_time() -> None:
    rows = by_figure(tiny("call", quick=False))
    figures = set(rows)
    assert {"call_4_kib_py", "call_1_mib_py", "call_with_ocall_py"} <= figures
    assert {"call_scaling_2", "call_scaling_threads_2"} <= figures
    of_floor = rows["call_scaling_2"].ratio / rows["floor_scaling_2"].ratio
    assert rows["call_scaling_2_of_floor"].value == pytest.approx(of_floor, rel=0.01)
    assert rows["call_cpu"].value > 0
    assert rows["call_cpu_of_2"].ratio > 0


@pytest.mark.skipif(not os.environ.get("TEEMATE_TEST_FULL"), reason="takes long: TEEMATE_TEST_FULL=1")
def test_attach_measures_programs_that_start_and_other_heaps_when_there_is_time() -> None:
    figures = set(by_figure(tiny("attach", quick=False)))
    assert {"new_attach", "new_conventional", "latency_ratio_4m", "conventional_256m"} <= figures


def test_scale_offers_attaches_when_there_is_time() -> None:
    figures = by_figure(tiny("scale", quick=False))
    for rate in (1, 4096):
        assert figures[f"attach_offered_{rate}"].value > 0
        assert figures[f"attach_latency_offered_{rate}"].value > 0
        assert figures[f"broker_cpu_offered_{rate}"].value > 0


def test_clients_that_come_and_go_leave_nothing() -> None:
    figures = by_figure(tiny("churn", scale=0.1))
    assert figures["churn_rate"].value > 0
    for what in ("pages", "fds", "slots"):
        row = figures[f"churn_{what}_left"]
        assert row.value == 0
        assert row.met is True


@pytest.mark.skipif(BACKEND != "sim", reason="what it shows is the benchmark's own reckoning")
def test_what_a_broker_keeps_of_clients_that_have_left_is_found() -> None:
    command = (sys.executable, str(Path(__file__).parent / "leaky_broker.py"))
    figures = by_figure(tiny("churn", scale=0.1, command=command, settle_seconds=0.1))
    assert figures["churn_fds_left"].value >= figures["churn_rate"].n
    assert figures["churn_bytes_left"].value > 4096
    assert figures["churn_slots_left"].value == 1
    for what in ("fds", "bytes", "slots"):
        assert figures[f"churn_{what}_left"].met is False


@pytest.mark.skipif(not C_SUBJECT.is_file(), reason="the C library was not built: libcbor is missing")
def test_a_database_is_opened_and_worked_with_in_all_ways(tmp_path: Path) -> None:
    if not (IMAGES / "db.sgxs").exists():
        pytest.skip("the database enclave was not built: SQLite's source was not to be had (build log)")
    report = tiny("db", scale=0.005)
    figures = by_figure(report)
    ways = {"shared", "private", "plain"} if "db_open_plain_1" in figures else {"shared", "private"}
    for way in ways:
        for count in (1, 8):
            assert figures[f"db_open_{way}_{count}"].value > 0
            assert figures[f"db_memory_{way}_{count}"].value > 0
    for kind in ("point", "batch", "range", "insert", "inserts"):
        for count in (1, 2):
            assert figures[f"db_rate_{kind}_{count}"].value > 0
    measured = OF_DB if "plain" in ways else {"db_open_first_query_ratio", "db_memory_ratio"}
    assert measured <= set(figures)
    assert {row.relative_to for row in report.result.rows} - {None} <= set(figures)
    if importlib.util.find_spec("matplotlib"):
        draw(report, tmp_path / "db.svg")
        assert (tmp_path / "db.svg").stat().st_size > 1000


@pytest.mark.skipif(not C_SUBJECT.is_file(), reason="the C library was not built: libcbor is missing")
def test_functions_are_started_and_invoked_in_all_ways(tmp_path: Path) -> None:
    if not (IMAGES / "functions.sgxs").exists():
        pytest.skip("the functions enclave was not built: there was no cargo (build log)")
    if not importlib.util.find_spec("ziglang"):
        pytest.skip("the example cannot be compiled: pip install 'teemate[fn]'")
    report = tiny("functions")
    figures = by_figure(report)
    for way in ("shared", "private"):
        assert figures[f"fn_cold_{way}"].value > 0
        assert figures[f"fn_memory_{way}_16"].value > 0
    measured = OF_FUNCTIONS if "fn_cold_native" in figures else OF_FUNCTIONS - {"fn_cold_vs_native"}
    assert measured <= set(figures)
    assert {row.relative_to for row in report.result.rows} - {None} <= set(figures)
    if importlib.util.find_spec("matplotlib"):
        draw(report, tmp_path / "functions.svg")
        assert (tmp_path / "functions.svg").stat().st_size > 1000


# ---- on the command line ---------------------------------------------------------------------------------


def run(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["bench", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_prints_one_object_for_programs_and_a_table_for_people(
    monkeypatch: pytest.MonkeyPatch, everything: Report
) -> None:
    monkeypatch.setattr("teemate.bench._run.run_bench", lambda *_, **__: everything)
    assert json.loads(run("all", "--quick", "--json"))["rows"]
    table = run("all", "--quick")
    assert "warm_attach_p99" in table
    assert "targets met" in table


def test_there_is_a_command_for_each_benchmark() -> None:
    said = run("--help")
    assert all(name in said for name in (*BENCHES, "storm"))


# ---- pictures --------------------------------------------------------------------------------------------


def test_the_command_draws_what_it_has_measured(
    monkeypatch: pytest.MonkeyPatch, everything: Report, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("teemate.bench._run.run_bench", lambda *_, **__: everything)
    assert "targets met" in run("all", "--quick", "--plot", str(tmp_path / "all.svg"))
    assert (tmp_path / "all.svg").read_text().lstrip().startswith("<?xml")


def test_a_difference_below_nothing_spoils_no_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    met = Row("call_scaling_2", 1.9, "times", None, 1, None, None, ">= 1.8", True)
    faster = Row("empty_call_getppids", -2.97, "calls", None, 1, None, None, "<= 5", True)
    host: dict[str, object] = {"cores": 2}
    draw(Report("all", "sim", host, Result((met, faster))), tmp_path / "all.svg")
    assert (tmp_path / "all.svg").stat().st_size > 1000


def test_without_matplotlib_it_is_said_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, everything: Report, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(Unsupported, match=r"pip install 'teemate\[plot\]'"):
        draw(everything, tmp_path / "all.svg")


def test_a_format_that_cannot_be_drawn_is_refused(everything: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(Unsupported, match=r"all\.xyz"):
        draw(everything, tmp_path / "all.xyz")


def test_every_benchmark_has_a_picture() -> None:
    assert set(_PICTURES) == set(BENCHES)


def test_a_result_with_nothing_in_it_is_no_result() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        Sample([])
    assert Result(()).series == ()
