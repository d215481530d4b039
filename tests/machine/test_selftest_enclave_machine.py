"""The kernel's selftest enclave on both backends: on the sim here, and on sgx in the machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import machine
import pytest
import selftests

TESTS = machine.PROJECT / "tests" / "selftest_enclave"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests need, built here: the machine has the same files."""
    folder = tmp_path_factory.mktemp("selftest")
    build = TESTS / "selftest_build.py"
    subprocess.run([sys.executable, build, selftests.kernel_source(), folder], check=True)
    return folder


def outcomes(output: str) -> dict[str, str]:
    """PASSED, SKIPPED and so on by test, as ``pytest -v`` prints them."""
    return dict(re.findall(r"::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", output))


def test_it_does_the_same_on_the_sim_and_on_the_driver(material: Path) -> None:
    pytest_line = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(TESTS)]
    setting = {"TEEMATE_SELFTEST_ENCLAVE": str(material)}
    here = subprocess.run(
        pytest_line,
        env={**os.environ, **setting, "TEEMATE_TEST_BACKEND": "sim"},
        cwd=machine.PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert here.returncode == 0, here.stdout
    there = machine.run(
        pytest_line, env={**setting, "TEEMATE_TEST_BACKEND": "sgx"}, directory=machine.PROJECT, timeout=600
    )
    assert there.returncode == 0, there.stdout + there.stderr
    on_sim, on_sgx = outcomes(here.stdout), outcomes(there.stdout)
    assert set(on_sgx.values()) == {"PASSED"}
    # What the sim does not model (the host's own page tables) is skipped there by name, and nothing else.
    assert {name for name, outcome in on_sim.items() if outcome != "PASSED"} == {
        "test_a_mapping_with_fewer_permissions_than_the_page_faults_as_the_selftests_want_it"
    }
    assert on_sim.keys() == on_sgx.keys()
