"""Enclaves with databases for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backends import BACKEND
from connections import Connection, database_image
from running_broker import RunningBroker

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


@pytest.fixture
def begin(
    broker: Callable[..., RunningBroker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunningBroker]:
    """Start a broker whose enclave "db" has files; more lines of its policy, and perhaps another image."""

    def start_one(*settings: str, image: Path | None = None, **options: bool) -> RunningBroker:
        running = broker(
            f"[administrators]\nuids = [{os.geteuid()}]\n"
            f'[broker]\nstate_directory = "{tmp_path / "state"}"\n'
            f'[[enclave]]\nname = "db"\nimage = "{image or database_image()}"\nstorage = true\n'
            'insecure_sim_sharing = true\nshare_between_owners = "unfenced"\nslots_per_client = 8\n'
            + "".join(f"{line}\n" for line in settings)
            + '[[enclave.attach]]\nuid = "*"\n',
            **options,
        )
        monkeypatch.setenv("TEEMATE_SOCKET", running.socket)
        return running

    return start_one


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Where the files of the enclave that `begin` starts lie."""
    return tmp_path / "state" / "enclaves" / "db"
