"""Enclaves with databases for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backends import BACKEND
from connections import Connection, database_image

import teemate


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Where the enclave's files are."""
    folder = tmp_path / "storage"
    folder.mkdir()
    return folder


def start(storage: Path | None) -> teemate.Enclave:
    """Build a private enclave with the database image."""
    image = database_image()
    return teemate.create_enclave(image, image.with_suffix(".sig"), backend=BACKEND, storage=storage)


@pytest.fixture
def life(storage: Path) -> Callable[[], teemate.Enclave]:
    """Begin a life of an enclave with these files."""
    return lambda: start(storage)


@pytest.fixture
def enclave(storage: Path) -> Iterator[teemate.Enclave]:
    """A private enclave with the database image, and files."""
    with start(storage) as enclave:
        yield enclave


@pytest.fixture
def diskless() -> Iterator[teemate.Enclave]:
    """A private enclave with the database image, and no files."""
    with start(None) as enclave:
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
