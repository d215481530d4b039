"""What sharing an enclave leans on holds on Linux's driver: the tests of guest/, run in the machine."""

from __future__ import annotations

import re
from pathlib import Path

import machine
import pytest
from elves import kept_builds
from images import Images

AREAS = ("mappings", "lives", "without_device", "debug", "epc")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The one enclave that they need and a key to sign it, made here: the machine would take long."""
    folder = kept_builds()
    if folder is None:
        folder = tmp_path / "builds"
        monkeypatch.setenv("TEEMATE_TEST_BUILDS", str(folder))
    Images(tmp_path).build("raw")
    return folder


def test_what_sharing_leans_on_holds_on_the_driver(builds: Path) -> None:
    tests = [str(machine.HERE / "guest" / f"test_sharing_{area}.py") for area in AREAS]
    done = machine.run(
        ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        directory=machine.PROJECT,
        env={"TEEMATE_TEST_BACKEND": "sgx", "TEEMATE_TEST_BUILDS": str(builds)},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # None skipped: the machine has all that they need.
    assert re.fullmatch(r"\d+ passed in .*", done.stdout.splitlines()[-1].strip("= ")), done.stdout
