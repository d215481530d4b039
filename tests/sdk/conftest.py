"""Enclaves for the tests of the SDK."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gate import Gate, Holder
from images import Images


@pytest.fixture
def faults(images: Images) -> Iterator[Gate]:
    """A fresh enclave of the image that goes wrong on request."""
    with Gate(images.faults) as gate:
        yield gate


@pytest.fixture
def holder(faults: Gate) -> Holder:
    """The holder of its first client slot."""
    return faults.assign(2)
