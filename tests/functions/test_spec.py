"""The core specification tests in the enclave: ``--full``, as cargo gets them and compiles their reader."""

from __future__ import annotations

import pytest
import spec_tests
from spec_tests import Counts

FULL = "minutes, and crates are got: --full (or tests/functions/spec_tests.py)"


def counted(*, false: bool = False) -> Counts:
    try:
        files = spec_tests.run(false=false)
    except spec_tests.ScriptsMissingError as missing:
        pytest.skip(str(missing))
    assert len(files) == 91
    all_ = Counts()
    for counts in files.values():
        all_.passed += counts.passed
        all_.failed += counts.failed
        all_.failures += counts.failures
        all_.unfalsifiable += counts.unfalsifiable
        all_.skipped += counts.skipped
    return all_


def test_the_engine_does_what_the_specification_says(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--full"):
        pytest.skip(FULL)
    counts = counted()
    assert counts.failures == []
    assert counts.passed > 0


def test_what_the_specification_does_not_say_is_found_to_be_wrong(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--full"):
        pytest.skip(FULL)
    counts = counted(false=True)
    assert counts.failed > 0
    assert counts.passed <= counts.unfalsifiable
