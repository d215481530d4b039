"""CPython's own DB-API tests pass with teemate.db in the place of sqlite3."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from connections import database_image

LEAST = 0.85
"""Of all tests of the five files, skipped ones counted as not passed."""
REQUIRED = ("test.test_sqlite3", "test.support", "_testcapi", "_sqlite3")


def missing() -> str | None:
    """Which of the modules that the tests need this interpreter does not have."""
    for name in REQUIRED:
        try:
            if importlib.util.find_spec(name) is None:
                return name
        except ImportError:
            return name
    return None


def test_cpythons_own_tests_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lacking = missing()
    if lacking:
        pytest.skip(
            f"this interpreter has no {lacking}: CPython's own tests are not installed (Debian has no "
            "package of these; an interpreter built from source has them)"
        )
    answer = tmp_path / "answer.json"
    program = Path(__file__).with_name("cpython_suite.py")
    done = subprocess.run(
        [sys.executable, program, database_image(), answer], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(answer.read_text())
    passed, failed, skipped = result["passed"], result["failed"], result["skipped"]
    every = len(passed) + len(failed) + len(skipped)
    with capsys.disabled():
        print(f"\nof CPython's {every} tests {len(passed)} pass, {len(failed)} fail, {len(skipped)} skipped:")
        for reason, count in Counter(skipped.values()).most_common():
            print(f"  {count:3}  {reason}")
    assert not failed
    assert len(passed) >= LEAST * every
