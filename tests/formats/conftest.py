from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def _descriptors() -> list[str]:
    """Return what the open descriptors are; the one that lists them is gone when it is looked at."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return sorted(found)


def _enclave_mappings() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    window = range(0x4000_0000_0000, 0x4100_0000_0000)
    return [line for line in lines if "memfd:" in line or int(line.split("-")[0], 16) in window]


@pytest.fixture(scope="module", autouse=True)
def _nothing_of_others_goes_meanwhile() -> None:
    """Collect what tests before these have left, event loops with their descriptors among it."""
    gc.collect()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Every test here ends with the descriptors and enclave mappings that it began with."""
    descriptors, mappings = _descriptors(), _enclave_mappings()
    yield
    assert _descriptors() == descriptors
    assert _enclave_mappings() == mappings
