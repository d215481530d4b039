"""`teemate proxy` passes everything on, shows and records it; `teemate decode` shows the same again."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import proxy, teemate
from processes import descriptors, wait_until
from raw_client import RawClient, raw_client
from running_broker import RunningBroker

import teemate as api
from teemate import wire

StartBroker = Callable[..., RunningBroker]


def lines(printed: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in printed.splitlines()]


def test_a_client_works_through_it_and_the_recording_says_all_that_was_shown(
    broker: StartBroker, policy: str, tmp_path: Path
) -> None:
    running = broker(policy)
    recording = tmp_path / "session.pcapng"
    with proxy(running.socket, tmp_path, "--record", str(recording), "--json") as (path, command):
        with api.connect(path, client="behind") as connection, connection.attach("vault") as enclave:
            with enclave.slot() as slot:
                assert slot.call("echo", b"through it") == b"through it"
            with pytest.raises(api.NotFound):
                connection.attach("nowhere")
        # It has passed the end on when the broker knows of it.
        wait_until(lambda: running.audit("end"), "the grant has ended")
    assert "sees this proxy (python" in command.begin
    assert f"pid {command.process.pid}, uid {os.geteuid()}" in command.begin
    shown = lines(command.printed)
    assert "opened" in shown[0]
    told = [(line["from"], line["kind"], line["op"]) for line in shown if "from" in line]
    # Each direction in its order: the first attach does not wait for the answer to the greeting.
    assert [(kind, op) for sender, kind, op in told if sender == "client"] == [
        ("request", "hello"),
        ("request", "attach"),
        ("request", "attach"),
        ("request", "detach"),
    ]
    assert [(kind, op) for sender, kind, op in told if sender == "broker"] == [
        ("answer", "hello"),
        ("answer", "attach"),
        ("error", "attach"),
        ("answer", "detach"),
    ]
    assert {line["peer"]["pid"] for line in shown if "peer" in line} == {os.getpid()}  # type: ignore[index]
    assert stat.S_IMODE(recording.stat().st_mode) == 0o600
    decoded = teemate("decode", str(recording), "--json")
    for line, again in zip(shown, lines(decoded), strict=True):
        for latency in (line.pop("latency", 0.0), again.pop("latency", 0.0)):
            assert isinstance(latency, float)
        assert line == again
    said = teemate("decode", str(recording))
    assert "The broker saw that process" in said
    assert said.count("\n    {") == len(told)
    only = teemate("decode", str(recording), "--error", "--json")
    assert [line["error"] for line in lines(only)] == ["not-found"]
    # Whom the broker saw.
    assert {record["pid"] for record in running.audit("grant")} == {command.process.pid}


def test_tshark_shows_every_message_of_a_recording(broker: StartBroker, policy: str, tmp_path: Path) -> None:
    if shutil.which("tshark") is None:
        pytest.skip("tshark is not installed (Debian: apt install --no-install-recommends tshark)")
    running = broker(policy)
    recording = str(tmp_path / "session.pcapng")
    with proxy(running.socket, tmp_path, "--record", recording, "--quiet") as (path, _):
        with raw_client(path) as client:
            for _ in range(3):
                client.ok("detach", grant=client.ok("attach", enclave="vault")["grant"], clean=True)
            client.fails("no-such-op", "unsupported")
    decoded = [line for line in lines(teemate("decode", recording, "--json")) if "message" in line]
    assert len(decoded) == 2 + 4 * 3 + 2
    as_cbor = 'uat:user_dlts:"User 0 (DLT=147)","cbor","0","","0",""'
    # The keys of the messages' maps, and the texts in them, as tshark takes them apart.
    fields = ("frame.len", "frame.comment", "cbor.type.textstring", "_ws.malformed")
    chosen = [word for field in fields for word in ("-e", field)]
    found = subprocess.run(
        ["tshark", "-n", "-r", recording, "-o", as_cbor, "-Y", "cbor", "-T", "fields", *chosen],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HOME": str(tmp_path)},
    ).stdout.splitlines()
    assert len(found) == len(decoded)
    for line, message in zip(found, decoded, strict=True):
        length, comment, texts, malformed = line.split("\t")
        assert malformed == ""
        assert length == str(message["size"])
        assert str(message["op"]) in comment
        assert set(message["message"]) <= set(texts.split(","))  # type: ignore[call-overload]


def test_what_breaks_the_protocol_is_passed_on_too_and_so_is_the_answer(
    broker: StartBroker, policy: str, tmp_path: Path
) -> None:
    running = broker(policy)
    recording = str(tmp_path / "session.pcapng")
    broken = [b"\xff" * 10, b"\xa1" + b"\x00" * 66000]
    with proxy(running.socket, tmp_path, "--record", recording, "--json") as (path, command):
        for data in broken:
            with raw_client(path) as client:
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
                wire.send(client.sock, data)
                client.breaks_protocol()
        with raw_client(path) as client:
            with open("/dev/null") as null:
                wire.send(client.sock, wire.encode({"id": 1, "op": "ping"}), (null.fileno(),) * 10)
            client.breaks_protocol()
    shown = [line for line in lines(command.printed) if line.get("kind") == "malformed"]
    assert [(line["size"], "message" in line) for line in shown] == [(10, False), (65537, False)]
    with_fds = [line for line in lines(command.printed) if line.get("fds")]
    assert [fd["kind"] for fd in with_fds[0]["fds"]] == ["device"] * 10  # type: ignore[attr-defined]
    ends = [line["closed"] for line in lines(command.printed) if "closed" in line]
    assert ends == ["broker"] * 3


def test_who_does_not_read_is_not_read_for_and_nothing_is_left_of_descriptors(
    broker: StartBroker, policy: str, tmp_path: Path
) -> None:
    running = broker(f"{policy}\n[limits]\nrequests_per_second = 1000000\nburst = 1000000")
    with proxy(running.socket, tmp_path, "--quiet") as (path, command):
        pid = command.process.pid
        with raw_client(path) as client:
            client.ok("ping")
        wait_until(lambda: not running_clients(running), "the broker knows that the client has gone")
        before = sorted(descriptors(pid).values())
        with raw_client(path) as client:
            client.sock.setblocking(False)
            request = wire.encode({"id": 1, "op": "enclaves", "args": {"padding": "p" * 16000}})
            sent = 0
            try:
                while sent < 20000:
                    wire.send(client.sock, request)
                    sent += 1
            except BlockingIOError:
                pass
            assert sent < 20000  # 320 MB: somebody stopped taking them
            status = Path(f"/proc/{pid}/status").read_text()
            (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:"))
            assert int(peak) < 64 * 1024
            client.sock.setblocking(True)
            for _ in range(sent):
                assert "ok" in (client.receive() or {})
        for _ in range(3):
            with raw_client(path) as client:
                client.ok("attach", enclave="vault")
                memfd = os.memfd_create("image")
                client.fails("create", "denied", (memfd,), name="new", sigstruct=bytes(1808))
                os.close(memfd)
        wait_until(lambda: sorted(descriptors(pid).values()) == before, "nothing is left open")


def running_clients(running: RunningBroker) -> int:
    with raw_client(running.socket) as client:
        return len(client.ok("clients")["clients"]) - 1


def test_it_says_why_it_does_not_begin(broker: StartBroker, policy: str, tmp_path: Path) -> None:
    listen = ("--listen", str(tmp_path / "new.sock"))
    assert "no broker answers" in teemate("proxy", *listen, "--to", str(tmp_path / "nobody"), status=5)
    running = broker(policy)
    to = ("--to", running.socket)
    assert "cannot listen there" in teemate("proxy", "--listen", running.socket, *to, status=1)
    (tmp_path / "kept").write_bytes(b"a recording of yesterday")
    assert "File exists" in teemate("proxy", *listen, *to, "--record", str(tmp_path / "kept"), status=1)
    assert (tmp_path / "kept").read_bytes() == b"a recording of yesterday"
    assert not (tmp_path / "new.sock").exists()
    assert "cannot be read" in teemate("decode", str(tmp_path / "kept"), status=1)
    teemate("proxy", *listen, *to, "--mode", "999", status=2)


def test_a_recording_that_cannot_go_on_is_told_and_the_clients_go_on(
    broker: StartBroker, policy: str, tmp_path: Path
) -> None:
    running = broker(policy)
    options = ("--record", str(tmp_path / "new"), "--quiet")
    with proxy(running.socket, tmp_path, *options, status=1) as (path, command):
        resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, (2000, 2000))
        with raw_client(path) as client:
            for _ in range(10):
                client.ok("ping")
    assert "File too large" in command.said
    assert 0 < teemate("decode", str(tmp_path / "new")).count("ping request") < 10


def test_an_output_that_is_full_is_told_and_the_clients_go_on(
    broker: StartBroker, policy: str, tmp_path: Path
) -> None:
    running = broker(policy)
    with proxy(running.socket, tmp_path, status=1) as (path, command):
        resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
        with raw_client(path) as client:
            for _ in range(20):
                client.ok("ping")
    assert "printing has ended: [Errno 27] File too large; the clients go on" in command.said
    assert len(command.printed) == 1000


def test_the_broker_ends_and_the_client_hears_of_it(broker: StartBroker, policy: str, tmp_path: Path) -> None:
    running = broker(policy, expect_errors=True)
    with proxy(running.socket, tmp_path, "--quiet") as (path, _):
        client = RawClient(path)
        client.ok("ping")
        os.kill(running.pid, 15)
        assert client.receive() is None
        client.close()
