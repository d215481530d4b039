"""Tests of what only Linux's SGX driver has: they run inside the machine, or on a host with SGX."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
DEVICE = Path("/dev/sgx_enclave")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is in this folder where the driver is not; the hook sees the items of all folders."""
    if DEVICE.exists():
        return
    missing = pytest.mark.skip(reason=f"there is no {DEVICE}: tests/machine/run boots a machine that has it")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(missing)
