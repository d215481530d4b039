"""The protocol's fuzzer, for a few seconds; .ci/run gives it a minute, and a campaign takes longer."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import fuzz_protocol
import pytest

from teemate import wire
from teemate.broker.connections.clients import Client
from teemate.broker.slots.granting import Granting

# A campaign that ends with a finding leaves charges behind.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)


def test_mutated_messages_do_no_harm(capsys: pytest.CaptureFixture[str]) -> None:
    socket, in_process = fuzz_protocol.main(["--messages", "30000", "--socket-seconds", "2", "--seed", "7"])
    assert socket.witness_served > 0
    assert socket.replies["ok"] > 0
    assert in_process.messages == 30000
    assert in_process.breaches > 1000, "the messages are bad enough"
    assert in_process.replies["ok"] > 1000, "and good enough"
    assert "in process: 30000 messages" in capsys.readouterr().out


def test_a_handler_that_fails_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fuzzer itself can fail: a broker with a bug does."""

    def fails(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Granting, "release", fails)
    with pytest.raises(fuzz_protocol.FuzzingError, match="a bug"):
        fuzz_protocol.main(["--messages", "30000", "--socket-seconds", "0", "--seed", "7"])
    assert (tmp_path / "crash-message").exists()


def test_descriptors_that_are_forgotten_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr(Client, "dispose", lambda _, fds: kept.extend(fds))
    try:
        with pytest.raises(fuzz_protocol.FuzzingError, match="descriptors are open"):
            fuzz_protocol.main(["--messages", "8000", "--socket-seconds", "0", "--seed", "7"])
    finally:
        for fd in kept:
            os.close(fd)


def test_memory_that_is_kept_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[mmap.mmap] = []
    decode = wire.decode

    def keep(data: bytes) -> dict[str, object]:
        page = mmap.mmap(-1, 8192)  # what other tests have freed of the heap would hide it
        page[:] = bytes(8192)
        kept.append(page)
        return decode(data)

    monkeypatch.setattr(wire, "decode", keep)
    with pytest.raises(fuzz_protocol.FuzzingError, match="grew by"):
        fuzz_protocol.main(["--messages", "8000", "--socket-seconds", "0", "--seed", "7"])
