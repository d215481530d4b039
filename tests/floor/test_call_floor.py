"""What an empty ECALL costs above the bare transition into an enclave."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from images import Images

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "native"

ROUNDS = 40


@pytest.fixture(scope="module")
def call_floor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The measuring program with the whole library in it."""
    program = tmp_path_factory.mktemp("floor") / "call_floor"
    library = sorted(path for path in (NATIVE / "lib").iterdir() if path.suffix in (".c", ".S"))
    subprocess.run(
        [
            *("cc", "-std=gnu17", "-O2", "-D_GNU_SOURCE", "-fno-stack-protector", "-pthread"),
            *(f"-I{NATIVE}/include", f"-I{NATIVE}/lib", str(HERE / "call_floor.c"), *map(str, library)),
            *("-o", str(program)),
        ],
        check=True,
    )
    return program


def test_an_empty_call_costs_little_more_than_the_bare_transition(call_floor: Path, images: Images) -> None:
    """Best of many rounds, taken in turns in one process: ratios, no absolute times."""
    bare, vault = images.bare, images.vault
    files = (bare.sgxs, bare.sigstruct, vault.sgxs, vault.sigstruct)
    printed = subprocess.run(
        [str(call_floor), *map(str, files), "empty", str(ROUNDS)], check=True, capture_output=True, text=True
    ).stdout
    figures = json.loads(printed)
    print(printed)
    assert figures["ratio"] <= 1.5, figures
    assert figures["getppids_more"] <= 5, figures
