"""The conformance table in the emulated machine: the same cases and results, by Linux's driver."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

import machine
import pytest
from machine import Machine

CONFORMANCE = Path(__file__).resolve().parents[1] / "conformance"
sys.path.insert(0, str(CONFORMANCE))

import conformance_image  # noqa: E402
from conformance_runner import Runner, build_runner, parse_seen  # noqa: E402
from conformance_table import HERE, Row, read_table  # noqa: E402
from random_cases import case, comparable  # noqa: E402

BACKEND = "sgx-machine"
RANDOM_CASES = 300
ROWS = read_table()
TESTED = [row for row in ROWS if row.tested_on(BACKEND)]
#: A case that has one of these words does so with an instruction or ioctl of SGX2, or with a page
#: that is added by touching it.
SGX2 = re.compile(r"\b(eaccept|eacceptcopy|emodpe|restrict|types|remove|hole|t_ssa_hole|t_gpr_hole)\b")

SCRIPT = """
test -e /dev/sgx_provision || exit 99
mv /dev/sgx_provision /dev/elsewhere
./runner {backend} . <cases || exit 98
mv /dev/elsewhere /dev/sgx_provision
./runner {backend} . <cases-provision || exit 97
"""


def run(folder: Path, rows: Iterable[Row], **options: object) -> dict[str, str]:
    """Run the rows' cases in one boot; what each saw, by id.

    Linux lets root make enclaves with PROVISIONKEY.  The table is about somebody who may not, but
    for the rows that need it.
    """
    rows = list(rows)
    for name, wanted in (("cases", False), ("cases-provision", True)):
        lines = [f"{row.id}|{row.case}\n" for row in rows if (row.needs == "provision") == wanted]
        (folder / name).write_text("".join(lines))
    done = machine.run(
        ["sh", "-c", SCRIPT.format(backend=BACKEND)],
        directory=folder,
        # Rows with a thread that never leaves the enclave: on one processor whoever comes has interrupted it.
        machine=Machine(cpus=2, **options),  # type: ignore[arg-type]
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return parse_seen(done.stdout)


class Summary:
    """Says at the end of the run what the table came to."""

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        unreachable = sum(row.unreachable is not None for row in ROWS)
        terminalreporter.write_line(
            f"conformance on {BACKEND}: {len(ROWS)} branches, {len(TESTED)} tested, "
            f"{unreachable} not reachable, {len(ROWS) - len(TESTED) - unreachable} not shown"
        )
        for row in ROWS:
            if row.case is not None and not row.tested_on(BACKEND):
                reason = row.not_shown.get(BACKEND) or row.not_shown["sgx"]
                terminalreporter.write_line(f"  {row.id} ({row.condition}): {reason}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, SIGSTRUCTs and the runner, built here."""
    folder = tmp_path_factory.mktemp("table")
    conformance_image.write_all(HERE / "enclave.S", folder)
    build_runner(tmp_path_factory.mktemp("objects")).rename(folder / "runner")
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """What a caller saw, by row, on a processor with SGX2."""
    manager = request.config.pluginmanager
    if not manager.has_plugin("conformance-machine"):
        manager.register(Summary(), "conformance-machine")
    return run(folder, (row for row in TESTED if row.needs != "sgx1"))


@pytest.fixture(scope="module")
def seen_without_sgx2(folder: Path) -> dict[str, str]:
    return run(folder, TESTED, processor=("sgx2=off",))


@pytest.mark.parametrize("row", [row for row in TESTED if row.needs != "sgx1"], ids=lambda row: row.id)
def test_a_branch_is_seen_by_a_caller_of_the_driver(row: Row, seen: dict[str, str], folder: Path) -> None:
    found = seen.get(row.id, "nothing")
    expected = row.expect or row.check
    assert row.passes(found, folder), f"{row.condition}: {row.result}, expected {expected}, seen {found}"


@pytest.mark.parametrize("row", [row for row in TESTED if row.needs == "sgx1"], ids=lambda row: row.id)
def test_a_branch_of_processors_without_sgx2_is_seen(
    row: Row, seen_without_sgx2: dict[str, str], folder: Path
) -> None:
    found = seen_without_sgx2.get(row.id, "nothing")
    assert row.passes(found, folder), f"{row.condition}: {row.result}, expected {row.expect}, seen {found}"


def test_without_sgx2_exactly_the_rows_that_lean_on_it_fail(
    seen_without_sgx2: dict[str, str], folder: Path
) -> None:
    """The negative control: rows can fail in the machine, and fail for what the processor lacks."""
    rows = [row for row in TESTED if row.needs != "sgx1"]
    failed = {row.id for row in rows if not row.passes(seen_without_sgx2.get(row.id, ""), folder)}
    leaning = {row.id for row in rows if row.case is not None and SGX2.search(row.case)}
    # What does not lean on SGX2 is seen there as well.
    assert failed - leaning == set()
    # What does, and is seen all the same: a #GP or #PF that comes either way.
    either = {row.id for row in rows if row.id in leaning - failed}
    assert all(row.expect is not None and "#" in row.expect for row in rows if row.id in either)
    assert len(failed) > len(leaning) / 2


def test_random_cases_look_the_same_on_sim_and_driver(folder: Path) -> None:
    """What no row thought of: sequences of leaves, SGX2 calls, accesses and entries by chance."""
    cases = {str(seed): case(seed) for seed in range(RANDOM_CASES)}
    (folder / "cases-random").write_text("".join(f"{seed}|{text}\n" for seed, text in cases.items()))
    on_sim = Runner(program=folder / "runner", images=folder, backend="sim").run_cases(cases)
    done = machine.run(["sh", "-c", f"./runner {BACKEND} . <cases-random"], directory=folder, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    on_driver = parse_seen(done.stdout)
    assert len(on_driver) == RANDOM_CASES
    differences = [
        f"{text}\n  sim: {comparable(on_sim[seed])}\n  sgx: {comparable(on_driver[seed])}"
        for seed, text in cases.items()
        if comparable(on_sim[seed]) != comparable(on_driver[seed])
    ]
    assert not differences, "\n".join(differences[:5])
