"""Recordings are files of others: what is in them neither reaches a terminal nor breaks who reads them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import teemate
from raw_client import RawClient
from running_broker import RunningBroker

from teemate import wire
from teemate.errors import ProtocolError
from teemate.traffic.description import BROKER, CLIENT, Described, Facts, Fd, Peer, clock
from teemate.traffic.pcapng import Packet, Writer
from teemate.traffic.recording import Entry, Opened, Passed, Recorder, Tracker, read_recording

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


def test_as_many_descriptors_as_a_message_can_have_are_recorded_with_their_kinds() -> None:
    fds = tuple(Fd("file", "😀" * 200, number) for number in range(253))
    data = wire.encode({"id": 1, "op": "ping"})
    recording = record(Opened(0.0, 1, PEER), Passed(1.0, 1, CLIENT, len(data), fds, data, ""))
    _, _, entry = read_recording(io.BytesIO(recording))
    assert isinstance(entry, Passed)
    assert entry.fds[:16] == fds[:16]
    assert [fd.kind for fd in entry.fds] == ["file"] * 253


@pytest.mark.parametrize("told", ['{"connection": 1e999}', "[" * 60000, '{"connection": []}', "{}"])
def test_a_packet_that_says_nonsense_is_an_error_that_says_so(told: str) -> None:
    file = io.BytesIO()
    writer = Writer(file, program="teemate proxy", comments=("", ""), names=("messages", "connections"))
    writer.packet(Packet(0.0, b"", 0, True, ("", told)))
    with pytest.raises(ProtocolError, match="without what belongs to it"):
        list(read_recording(io.BytesIO(file.getvalue())))


def test_a_time_that_no_calendar_has_is_shown_as_a_number() -> None:
    assert clock(2.0**64) == f"{2**64}.000000"


def test_requests_with_an_id_of_the_wrong_kind_are_replayed_too(
    broker: Callable[..., RunningBroker], policy: str, tmp_path: Path
) -> None:
    running = broker(policy)
    client = RawClient(running.socket, hello=False)
    client.send({"id": [], "op": "ping"})
    answer = client.receive()
    client.close()
    assert answer is not None
    recording = tmp_path / "recording"
    request = passed({"id": [], "op": "ping"})
    recording.write_bytes(record(Opened(0.0, 1, PEER), request, passed(answer, BROKER)))
    said = teemate("replay", str(recording), "--socket", running.socket)
    assert said == "1 messages sent, 1 answers and events compared: no difference\n"
