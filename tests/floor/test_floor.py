from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from create_floor import build_floor, floor_ms


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_floor(tmp_path_factory.mktemp("floor"))


def test_the_floor_tells_the_time_of_each_round(program: Path) -> None:
    rounds = floor_ms(program, pages=4096, measured=1 << 20, repeat=3)
    assert len(rounds) == 3
    assert all(ms > 0 for ms in rounds)


def test_more_memory_than_the_machine_has_is_refused_before_it_is_taken(program: Path) -> None:
    command = [str(program), str(1 << 40), "0"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "more than" in done.stderr


def test_missing_arguments_are_told(program: Path) -> None:
    assert subprocess.run([str(program)], check=False, capture_output=True).returncode == 2
