"""One branch removed from the sim at a time makes a row fail."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from conformance_runner import Runner
from conformance_table import read_table, sim_branches

ROWS = [row for row in read_table() if row.tested_on("sim")]
BRANCHES = sim_branches()


@pytest.mark.parametrize("branch", sorted(set(BRANCHES)))
def test_a_removed_branch_is_noticed(
    branch: str, mutants: Runner, material: Path, kills: Counter[str]
) -> None:
    rows = [row for row in ROWS if branch in row.guards]
    assert rows, f"no tested row guards {branch}"
    kills["run"] += 1
    found = mutants.run(rows, mutant=branch)
    noticed = [row.id for row in rows if not row.passes(found.get(row.id, "nothing"), material)]
    assert noticed, f"{branch} can be left out"
    kills["killed"] += 1


def test_the_mutation_build_without_a_mutant_passes_the_table(mutants: Runner, material: Path) -> None:
    found = mutants.run(ROWS)
    failed = [row.id for row in ROWS if not row.passes(found.get(row.id, "nothing"), material)]
    assert failed == []


def test_every_branch_has_one_place_in_the_sources() -> None:
    assert [branch for branch, count in Counter(BRANCHES).items() if count > 1] == []


def test_rows_guard_only_branches_that_exist() -> None:
    assert {guard for row in ROWS for guard in row.guards} - set(BRANCHES) == set()
