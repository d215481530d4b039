"""Every branch of the pseudo-code does to a caller what the SDM says."""

from __future__ import annotations

from pathlib import Path

import pytest
from conformance_runner import BACKEND, Runner, build_runner
from conformance_table import INSTRUCTIONS, Row, read_row, read_table

ROWS = read_table()


@pytest.mark.parametrize("row", [row for row in ROWS if row.tested_on(BACKEND)], ids=lambda row: row.id)
def test_a_branch_is_seen_by_a_caller(row: Row, seen: dict[str, str], material: Path) -> None:
    found = seen.get(row.id, "nothing")
    expected = row.expect or row.check
    assert row.passes(found, material), f"{row.condition}: {row.result}, expected {expected}, seen {found}"


def test_every_instruction_has_its_branches() -> None:
    assert {row.instruction for row in ROWS} == INSTRUCTIONS


def test_ids_are_unique() -> None:
    assert len({row.id for row in ROWS}) == len(ROWS)


def test_a_branch_without_test_and_reason_is_an_error() -> None:
    raw = {"id": "X.01", "condition": "always", "result": "#GP(0)"}
    with pytest.raises(ValueError, match="must be tested"):
        read_row("EENTER", raw)
    with pytest.raises(ValueError, match="must be tested"):
        read_row("EENTER", raw | {"case": "enter t0", "expect": "exit", "unreachable": "why"})
    with pytest.raises(ValueError, match="expected result"):
        read_row("EENTER", raw | {"case": "enter t0"})


def test_without_the_signature_check_its_rows_fail(material: Path, tmp_path: Path) -> None:
    flags = ['-DTEEMATE_TEST_BUILD="signature"', "-DTEEMATE_TEST_BUILD_SIGNATURE"]
    control = Runner(program=build_runner(tmp_path, flags), images=material, backend="sim")
    rows = [row for row in ROWS if "EINIT.SIGNATURE" in row.guards]
    found = control.run(rows)
    assert rows
    assert not [row.id for row in rows if row.passes(found[row.id], material)]
