"""Recordings are files of others: what is in them neither reaches a terminal nor breaks who reads them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from commands import teemate

from teemate import wire
from teemate.traffic.description import BROKER, CLIENT, Described, Facts, Peer
from teemate.traffic.recording import Entry, Opened, Passed, Recorder, Tracker

ATTACK = "\x1b]0;owned\x07\x9b31m"
PEER = Peer(1, 2, f"/user{ATTACK}", f"comm{ATTACK}", f"name{ATTACK}")


def record(*entries: Entry, about: str = "about") -> bytes:
    file = io.BytesIO()
    recorder, tracker = Recorder(file, about), Tracker()
    for entry in entries:
        recorder.write(entry, tracker.describe(entry))
    return file.getvalue()


def passed(message: dict[str, object], sender: str = CLIENT) -> Passed:
    data = wire.encode_part(message)
    return Passed(1.0, 1, sender, len(data), (), data, "")


def test_nothing_of_a_recording_reaches_the_terminal_as_it_is(tmp_path: Path) -> None:
    request = passed({"id": 1, "op": f"op{ATTACK}", "args": {ATTACK: [ATTACK]}})
    broken = Passed(2.0, 1, CLIENT, 5, (), b"", f"problem{ATTACK}")
    (tmp_path / "theirs").write_bytes(record(Opened(0.0, 1, PEER), request, broken, about=f"a{ATTACK}\nb"))
    said = teemate("decode", str(tmp_path / "theirs"))
    assert [char for char in said if not char.isprintable() and char != "\n"] == []
    for word in ("a", "/user", "comm", "op", "problem"):
        assert f"{word}\\u001b]0;owned\\u0007\\u009b31m" in said
    assert "31m\nb\n" in said


@pytest.mark.parametrize("cgroup", ["/system.slice/a\\x2db.scope", "/grün"])
def test_what_a_terminal_prints_is_not_escaped(cgroup: str) -> None:
    assert str(Peer(1, 2, cgroup, "comm")) == f"comm, pid 1, uid 2, {cgroup}"


def test_a_problem_is_printed_without_what_a_terminal_obeys() -> None:
    facts = Facts("malformed", error="protocol-error")
    described = Described(0.0, 1, PEER, BROKER, 5, facts, (), None, f"problem{ATTACK}")
    assert described.body() == "/ problem\\u001b]0;owned\\u0007\\u009b31m /"
