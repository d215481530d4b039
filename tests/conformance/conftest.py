from __future__ import annotations

from collections import Counter
from pathlib import Path

import conformance_image
import pytest
from conformance_runner import BACKEND, Runner, build_runner
from conformance_table import HERE, read_table

killed: Counter[str] = Counter()


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    conformance_image.write_all(HERE / "enclave.S", folder)
    return folder


@pytest.fixture(scope="session")
def runner(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    program = build_runner(tmp_path_factory.mktemp("runner"))
    return Runner(program=program, images=material, backend=BACKEND)


@pytest.fixture(scope="session")
def seen(runner: Runner) -> dict[str, str]:
    """What a caller saw, by row."""
    return runner.run(row for row in read_table() if row.tested_on(BACKEND))


@pytest.fixture(scope="session")
def mutants(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    program = build_runner(tmp_path_factory.mktemp("mutants"), ["-DSIM_MUTATIONS"])
    return Runner(program=program, images=material, backend="sim")


@pytest.fixture
def kills() -> Counter[str]:
    return killed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = read_table()
    tested = sum(row.tested_on(BACKEND) for row in rows)
    unreachable = sum(row.unreachable is not None for row in rows)
    terminalreporter.write_line(
        f"conformance on {BACKEND}: {len(rows)} branches, {tested} tested, {unreachable} not reachable, "
        f"{len(rows) - tested - unreachable} not shown"
        + (f"; mutants killed: {killed['killed']} of {killed['run']}" if killed["run"] else "")
    )
