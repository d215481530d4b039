"""Private enclaves for the tests of the client library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from backends import BACKEND
from images import Images

import teemate
from teemate import Enclave


@pytest.fixture
def vault(images: Images) -> Iterator[Enclave]:
    """A private vault."""
    with teemate.create_enclave(images.vault.sgxs, images.vault.sigstruct, BACKEND) as enclave:
        yield enclave


@pytest.fixture
def faults(images: Images) -> Iterator[Enclave]:
    """A private enclave of the faults image."""
    with teemate.create_enclave(images.faults.sgxs, images.faults.sigstruct, BACKEND) as enclave:
        yield enclave
