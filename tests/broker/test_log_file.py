"""The log when nobody reads it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from raw_client import TIMEOUT, RawClient

from teemate.broker.telemetry import log_file
from teemate.broker.telemetry.log_file import BOUND, LogFile

RECORD = "x" * 999 + "\n"


def pipe() -> tuple[int, int]:
    return os.pipe()


def sockets() -> tuple[int, int]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return one.detach(), other.detach()


def old_pipe() -> tuple[int, int]:
    return os.pipe()


@pytest.fixture(params=[pipe, sockets, old_pipe])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """What nobody reads, and where it is written to: also on a kernel without RWF_NOWAIT for pipes."""
    if request.param is old_pipe:
        monkeypatch.setattr(log_file.LogFile, "_write_to_pipe", log_file.LogFile._write_when_writable)
    reader, writer = request.param()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def read_all(fd: int) -> str:
    """What is there; the writer's end stays open."""
    os.set_blocking(fd, False)
    read = b""
    try:
        while True:
            read += os.read(fd, 1 << 16)
    except BlockingIOError:
        return read.decode()


def test_who_reads_later_gets_what_was_kept_and_is_told_how_many_were_lost(ends: tuple[int, int]) -> None:
    reader, writer = ends
    file = LogFile(writer)
    file.tell_lost = lambda count: print(f"lost {count}", file=file)
    written = 3 * BOUND // len(RECORD)
    for _ in range(written):
        file.write(RECORD)
    text = ""
    while more := read_all(reader):
        text += more
        file.try_again()
    lines = text.splitlines()
    lost = int(lines.pop().removeprefix("lost "))
    assert set(lines) == {RECORD.rstrip()}, "none was cut"
    assert lost > 0
    assert len(lines) + lost == written
    assert len(lines) * len(RECORD) >= BOUND


def test_a_reader_that_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        file = LogFile(writer)
        for _ in range(2 * BOUND // len(RECORD)):
            file.write(RECORD)
    finally:
        os.close(writer)


def test_an_ordinary_file_takes_everything(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as out:
        file = LogFile(out.fileno())
        for _ in range(3 * BOUND // len(RECORD)):
            file.write(RECORD)
    assert path.stat().st_size == 3 * BOUND // len(RECORD) * len(RECORD)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where other users may connect."""
    with tempfile.TemporaryDirectory(prefix="tm-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def fill(pipe: int) -> None:
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"\n" * 4096)
    os.set_blocking(pipe, True)


def test_a_broker_whose_log_nobody_reads_serves_on_and_says_later_what_is_missing(folder: Path) -> None:
    """The pipe is full, so that a write() to it would block."""
    path, policy = folder / "broker.sock", folder / "broker.toml"
    policy.write_text("[administrators]\nuids = [0]\n")
    reader, writer = os.pipe()
    broker = subprocess.Popen(
        [
            sys.executable, "-m", "teemate.broker.main", "--config", str(policy), "--socket", str(path),
            "--log-format", "json", "--backend", "sim",
        ],
        stderr=writer,
    )  # fmt: skip
    try:
        text = b""
        while b'"ready"' not in text:
            assert select.select([reader], [], [], TIMEOUT)[0]
            text += os.read(reader, 1 << 16)
        fill(writer)
        os.close(writer)
        writer = -1
        os.seteuid(4242)
        try:
            client = RawClient(str(path))
        finally:
            os.seteuid(0)
        for _ in range(2 * BOUND // 200):
            client.fails("stats", "denied")
        client.close()
        text = b""
        while b"log records lost" not in text:
            assert select.select([reader], [], [], TIMEOUT)[0]
            text += os.read(reader, 1 << 16)
        told = [json.loads(line) for line in text.splitlines() if line.strip()]
        assert told[-1]["event"] == "log records lost"
        assert len([record for record in told if record["event"] == "denied"]) + told[-1]["count"] == (
            2 * BOUND // 200
        )
    finally:
        if writer >= 0:
            os.close(writer)
        broker.send_signal(signal.SIGTERM)
        while os.read(reader, 1 << 16):
            pass
        os.close(reader)
        assert broker.wait(TIMEOUT) == 0
