"""Tests that boot the emulated SGX machine; run with ``pytest --machine``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what boots a machine unless that was asked for, and never boot one inside of another."""
    if "TEEMATE_IN_MACHINE" in os.environ:
        reason = "boots a machine, and this is one"
    elif config.getoption("machine") or os.environ.get("TEEMATE_MACHINE") == "1":
        return
    else:
        reason = (
            "boots an emulated machine with SGX; run with: pytest --machine tests/machine "
            "(the first run builds the machine, in about 4 minutes)"
        )
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.skip(reason=reason))
