"""Functions on Linux's driver: what hostile modules, killed clients and owners beside each other come to."""

from __future__ import annotations

import os
from pathlib import Path

import machine
import pytest
from machine import Machine

import teemate

FUNCTIONS = machine.PROJECT / "tests" / "functions"


@pytest.mark.skipif(os.environ.get("TEEMATE_MACHINE_ALL") != "1", reason="minutes: TEEMATE_MACHINE_ALL=1")
def test_hostile_modules_end_in_typed_errors_on_the_driver(capsys: pytest.CaptureFixture[str]) -> None:
    image = Path(teemate.__file__).parent / "images" / "functions.sgxs"
    if not image.exists():
        pytest.skip("the functions enclave was not built: there was no cargo (build log)")
    tests = [str(FUNCTIONS / "test_hostile.py"), str(FUNCTIONS / "test_owners.py")]
    done = machine.run(
        ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        machine=Machine(epc="256M", memory="3G"),
        directory=machine.PROJECT,
        env={"TEEMATE_TEST_BACKEND": "sgx"},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout.splitlines()[-1]
    with capsys.disabled():
        print("\nin the machine:", told)
    assert " passed" in told
