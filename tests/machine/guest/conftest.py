"""Tests that only make sense inside of the emulated SGX machine, or on a host with Linux's SGX driver."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all of them where there is no driver."""
    if Path("/dev/sgx_enclave").exists():
        return
    reason = "needs /dev/sgx_enclave; run with: tests/machine/run pytest tests/machine/guest"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
