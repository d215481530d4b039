"""Power is cut at an I/O: what was committed before is there in the enclave's next life, and nothing else.

A program works in a database while recorder.c writes down each write, truncation and sync.  For each point to
cut at, the folder is made as a disk could have it then: what was synced, and of what was written since, each
write as a whole, in part (sectors of 512 bytes), or not at all.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from backends import BACKEND
from connections import Connection, SqlError, database_image
from images import Images, layout_options
from power_cut_work import state

import teemate
from teemate.image import SigParams, layout_image, sign_with_key

HERE = Path(__file__).parent
WRITE, TRUNCATE, SYNC, DELETE, MARK = range(5)
SECTOR = 512
HEAD = 4096
_ENTRY = struct.Struct("<IIQQ")


@dataclass
class File:
    """What is on the disk for certain, and what was done since."""

    synced: bytes = b""
    since: list[tuple[int, int, bytes]] = field(default_factory=list)

    def do(self, kind: int, offset: int, data: bytes) -> None:
        if kind == SYNC:
            self.synced = self.after(self.since)
            self.since.clear()
        else:
            self.since.append((kind, offset, data))

    def after(self, steps: list[tuple[int, int, bytes]]) -> bytes:
        content = bytearray(self.synced)
        for kind, offset, data in steps:
            if kind == TRUNCATE:
                content = content[:offset].ljust(offset, b"\0")
            else:
                content = content.ljust(offset, b"\0")
                content[offset : offset + len(data)] = data
        return bytes(content)

    def cut(self, dice: random.Random) -> bytes:
        """What a disk could have: of each step all, some, or nothing."""
        steps = []
        for kind, offset, data in self.since:
            fate = dice.randrange(3)
            if fate == 0:
                steps.append((kind, offset, data))
            elif fate == 1 and kind == WRITE:
                steps += [sector for sector in sectors(offset, data) if dice.random() < 0.5]
        return self.after(steps)


def sectors(offset: int, data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Cut one write into those of its sectors."""
    at = offset
    while at < offset + len(data):
        end = min(at - at % SECTOR + SECTOR, offset + len(data))
        yield WRITE, at, data[at - offset : end - offset]
        at = end


def entries(record: bytes) -> Iterator[tuple[int, str, int, bytes]]:
    at = 0
    while at < len(record):
        kind, name_length, offset, length = _ENTRY.unpack_from(record, at)
        at += _ENTRY.size
        name = record[at : at + name_length].decode()
        at += name_length
        data = record[at : at + length]
        at += length
        yield kind, name, offset, data


@pytest.fixture
def small_image(images: Images, tmp_path: Path) -> Path:
    """The database image with a small heap: it is built anew for every cut."""
    output = tmp_path / "small.sgxs"
    options = layout_options("db", heap="12M", slots=1)
    built = layout_image(database_image().with_suffix(".elf"), output, options)
    signature = sign_with_key(SigParams().unsigned(built.mrenclave), images.key)
    output.with_suffix(".sig").write_bytes(signature.to_bytes())
    return output


def recorded(image: Path, tmp_path: Path, transactions: int) -> list[tuple[int, str, int, bytes]]:
    library, record, folder = tmp_path / "recorder.so", tmp_path / "record", tmp_path / "files"
    folder.mkdir()
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library)]
    subprocess.run([*command, str(HERE / "recorder.c"), "-ldl"], check=True)
    work = [sys.executable, str(HERE / "power_cut_work.py"), str(image), str(folder), str(transactions)]
    preloaded = {"LD_PRELOAD": str(library), "RECORD": str(record), "FOLDER": str(folder)}
    subprocess.run(work, env={**os.environ, **preloaded}, check=True)
    return list(entries(record.read_bytes()))


def look(image: Path, folder: Path) -> dict[int, str] | None:
    """What the next life finds; None when there is no table yet."""
    with (
        teemate.create_enclave(image, image.with_suffix(".sig"), backend=BACKEND, storage=folder) as enclave,
        enclave.slot() as slot,
    ):
        db = Connection(slot, "cut")
        assert db.sql("PRAGMA integrity_check") == [("ok",)]
        try:
            found = db.sql("SELECT id, v FROM t")
        except SqlError as failed:
            assert "no such table" in failed.text  # noqa: PT017
            return None
        db.sql("INSERT INTO t(v) VALUES ('it can be written')")
    return {int(str(key)): str(value) for key, value in found}


def test_what_was_committed_survives_a_power_cut_and_nothing_else_does(
    small_image: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    points = 2000 if request.config.getoption("--full") else 40
    dice = random.Random(11)
    steps = recorded(small_image, tmp_path, 200 if points > 100 else 45)
    places = [number for number, step in enumerate(steps) if step[0] != MARK]
    assert len(places) > 100
    assert sum(1 for step in steps if step[0] == TRUNCATE) > 1
    cuts = sorted(dice.choices(places, k=points))
    files: dict[str, File] = {}
    committed, at, torn = -1, 0, 0
    for number, cut in enumerate(cuts):
        for kind, name, offset, data in steps[at : cut + 1]:
            if kind == MARK:
                committed = offset
            else:
                files.setdefault(name, File()).do(kind, offset, data)
        at = cut + 1
        folder = tmp_path / f"cut-{number}"
        folder.mkdir()
        for name, file in files.items():
            (folder / name).write_bytes(file.cut(dice))
            torn += bool(file.since)
        found = look(small_image, folder)
        right = [state(committed), state(committed + 1)] if committed >= 0 else [None, {}]
        assert found in right, f"cut after step {cut}, {committed} transactions were acknowledged"
        for path in folder.iterdir():
            path.unlink()
    assert torn > points // 4


def test_a_database_whose_making_was_cut_short_can_be_made_again(small_image: Path, tmp_path: Path) -> None:
    files: dict[str, File] = {}
    heads = looks = 0
    for kind, name, offset, data in recorded(small_image, tmp_path, 0):
        if kind == MARK:
            break
        if kind == WRITE and name == "cut" and offset < HEAD:
            heads += 1
            torn = list(sectors(offset, data))
            for which in range(1 << len(torn)):
                written = [sector for number, sector in enumerate(torn) if which >> number & 1]
                folder = tmp_path / f"made-{heads}-{which}"
                folder.mkdir()
                for other, file in files.items():
                    (folder / other).write_bytes(file.after(file.since + (written if other == name else [])))
                assert look(small_image, folder) is None
                looks += 1
        files.setdefault(name, File()).do(kind, offset, data)
    assert heads == 2
    assert looks >= 8
