"""Enclaves with databases for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from connections import Connection, database_image

import teemate


@pytest.fixture
def enclave() -> Iterator[teemate.Enclave]:
    """A private enclave with the database image."""
    image = database_image()
    with teemate.create_enclave(image, image.with_suffix(".sig"), backend="sim") as enclave:
        yield enclave


@pytest.fixture
def connect(enclave: teemate.Enclave) -> Iterator[Callable[..., Connection]]:
    """Open connections, each on a slot of its own."""
    slots = []

    def open_one(name: str = "", **options: int) -> Connection:
        held = enclave.slot()
        slot = held.__enter__()
        slots.append(held)
        return Connection(slot, name, **options)

    yield open_one
    for held in slots:
        held.__exit__(None, None, None)
