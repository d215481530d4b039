"""Entering and leaving the sim, each behaviour in a process of its own (tests/sim/c)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sim_programs import run_program

NAMES = [
    name
    for source in sorted((Path(__file__).parent / "c").glob("*_tests.c"))
    for name in re.findall(r"^    TEST\((\w+)\),$", source.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("name", NAMES)
def test_sim(sim_tests: Path, name: str) -> None:
    result = run_program([sim_tests, name])
    assert result.returncode == 0, result.stderr


def test_every_behaviour_is_listed(sim_tests: Path) -> None:
    assert sorted(run_program([sim_tests, "--list"]).stdout.split()) == sorted(NAMES)
