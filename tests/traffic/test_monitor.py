"""`teemate monitor` shows administrators all traffic, and nobody else notices."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from processes import wait_until
from raw_client import RawClient
from running_broker import RunningBroker
from watching import TIMEOUT, Viewer, shown

import teemate
from teemate.broker.telemetry.monitoring import _events, _Gathered
from teemate.traffic.description import BROKER, CLIENT, Described

StartBroker = Callable[..., RunningBroker]
Connect = Callable[..., RawClient]
Look = Callable[..., Viewer]


def told(messages: list[Described]) -> list[tuple[str, str, str]]:
    return [(message.sender, message.facts.kind, message.facts.op) for message in messages]


def test_each_message_is_shown_with_whose_it_is_what_it_says_and_how_long_it_took(
    broker: StartBroker, policy: str, look: Look
) -> None:
    running = broker(policy)
    viewer = look(running)
    with teemate.connect(running.socket, client="shown") as connection:
        with connection.attach("vault", slots=2) as enclave:
            connection.acquire(enclave)
            with pytest.raises(teemate.NotFound):
                connection.attach("nowhere")
    seen = viewer.watch(shown("answer", "detach"))
    assert told(seen)[:6] == [
        (CLIENT, "request", "hello"),
        (BROKER, "answer", "hello"),
        (CLIENT, "request", "attach"),
        (BROKER, "answer", "attach"),
        (CLIENT, "request", "slots.acquire"),
        (BROKER, "answer", "slots.acquire"),
    ]
    assert (BROKER, "error", "attach") in told(seen)
    command = Path("/proc/self/comm").read_text().rstrip()
    cgroups = Path("/proc/self/cgroup").read_text()
    for message in seen[1:]:
        peer = message.peer
        assert (peer.pid, peer.uid, peer.command, peer.name) == (os.getpid(), os.geteuid(), command, "shown")
        assert peer.cgroup in cgroups
    attach = seen[3]
    assert attach.facts.enclave == "vault"
    assert attach.facts.latency is not None
    assert 0 <= attach.facts.latency < attach.at
    assert [(fd.kind, fd.name) for fd in attach.fds] == [
        ("memfd", "teemate-sim-enclave"),
        ("memfd", "teemate-arena"),
    ] or attach.fds[0].kind == "device"
    assert all(fd.inode for fd in attach.fds)
    assert attach.message is not None
    assert attach.size == len(teemate.wire.encode(attach.message))
    grant = attach.message["ok"]["grant"]
    assert f'"id": {attach.message["id"]} /attach/' in attach.body()
    assert f'"grant": {grant} /vault/' in seen[4].body()
    assert "/secret of 16 bytes/" in attach.body()
    json.dumps([message.as_json() for message in seen], allow_nan=False)


def test_descriptors_that_clients_send_are_described_without_being_asked(
    broker: StartBroker, policy: str, look: Look, connect: Connect
) -> None:
    running = broker(policy)
    viewer = look(running, op="create")
    memfd = os.memfd_create("an image")
    with os.fdopen(memfd):
        connect(running).fails("create", "denied", (memfd,), name="new", sigstruct=bytes(1808))
        inode = os.fstat(memfd).st_ino
    request = viewer.watch(shown("error", "create"))[0]
    assert [tuple(fd) for fd in request.fds] == [("memfd", "an image", inode)]
    assert "/the first 8 of 1808 bytes/" in request.body()


def test_what_cannot_be_read_is_told_and_not_shown(
    broker: StartBroker, policy: str, look: Look, connect: Connect
) -> None:
    running = broker(policy)
    viewer = look(running, error="protocol-error")
    client = connect(running)
    teemate.wire.send(client.sock, b"\xa1\x63key\x50" + b"secret" * 2)
    client.breaks_protocol()
    malformed, answer = viewer.watch(lambda viewer: len(viewer.seen) == 2)
    assert (malformed.facts.kind, malformed.message, malformed.size) == ("malformed", None, 18)
    assert "ends inside" in malformed.problem
    assert malformed.body() == f"/ {malformed.problem} /"
    assert (answer.facts.kind, answer.facts.op, answer.facts.latency) == ("error", "", None)


def test_what_has_more_byte_strings_than_are_looked_through_is_told_and_not_shown(
    broker: StartBroker, policy: str, look: Look, connect: Connect
) -> None:
    running = broker(policy)
    viewer = look(running, op="ping")
    connect(running).ok("ping", x=[b"1"] * 5000)
    request = viewer.watch(shown("answer", "ping"))[0]
    assert (request.facts.kind, request.message) == ("request", None)
    assert "5000 byte strings" in request.problem


def test_names_as_long_as_they_can_be_cost_nobody_who_looks_anything(
    broker: StartBroker, policy: str, look: Look, connect: Connect, tmp_path: Path
) -> None:
    """Each byte that is no text is shown as four: the names alone of four descriptors would fill a packet."""
    running = broker(policy)
    viewer = look(running)
    with ExitStack() as stack:
        folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, folder)
        while len(os.readlink(f"/proc/self/fd/{folder}")) < 3800:
            os.mkdir(b"\xff" * 250, dir_fd=folder)
            folder = os.open(b"\xff" * 250, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
            stack.callback(os.close, folder)
        client = connect(running)
        client.send({"id": 99, "op": "ping", "args": {"padding": "p" * 30000}}, (folder,) * 4)
        client.breaks_protocol()
    request = next(message for message in viewer.watch(shown("error", "")) if message.fds)
    assert request.message is not None
    assert [fd.kind for fd in request.fds] == ["file"] * 4
    assert {(len(fd.name), fd.name[-1]) for fd in request.fds} == {(200, "…")}


def test_messages_that_take_more_than_was_thought_are_shown_one_by_one() -> None:
    def gathered(size: int) -> _Gathered:
        return _Gathered({"client": 1}, {"client": 1, "problem": "p" * size}, 1)

    events = list(_events([gathered(size) for size in (40000, 30000, 70000, 10)]))
    assert [(event.count, event.fits) for event in events] == [(1, True), (1, True), (1, False), (1, True)]
    for event in events:
        assert event.fits == (len(event.encoded(2**53)) <= teemate.wire.MAX_MESSAGE)


def test_only_what_is_asked_for_is_shown(
    broker: StartBroker, policy: str, look: Look, connect: Connect
) -> None:
    running = broker(policy)
    first, second = connect(running), connect(running)
    number = max(info["client"] for info in first.ok("clients")["clients"])
    viewers = {
        "client": look(running, client=number),
        "op": look(running, op="ping"),
        "enclave": look(running, enclave="vault"),
        "error": look(running, error="any"),
        "code": look(running, error="denied"),
    }
    for client in (first, second):
        client.ok("ping")
        client.ok("detach", grant=client.ok("attach", enclave="vault")["grant"], clean=True)
        client.fails("attach", "not-found", enclave="nowhere")
    second.fails("no-such-op", "unsupported")
    seen = {
        "client": viewers["client"].watch(shown("error", "no-such-op")),
        "op": viewers["op"].watch(lambda viewer: len(viewer.seen) == 4),
        "enclave": viewers["enclave"].watch(lambda viewer: len(viewer.seen) == 8),
        "error": viewers["error"].watch(shown("error", "no-such-op")),
    }
    assert {message.client for message in seen["client"]} == {number}
    assert len(seen["client"]) == 10
    assert {message.facts.op for message in seen["op"]} == {"ping"}
    assert {message.facts.op for message in seen["enclave"]} == {"attach", "detach"}
    assert {message.facts.enclave for message in seen["enclave"]} == {"vault"}
    assert [message.facts.error for message in seen["error"]] == ["not-found", "not-found", "unsupported"]
    assert not viewers["code"].take(0)


def test_who_is_no_administrator_sees_nothing(broker: StartBroker, policy: str, connect: Connect) -> None:
    running = broker(policy.replace(f"uids = [{os.geteuid()}]", "uids = [4294967294]"))
    connect(running).fails("monitor", "denied")
    (denial,) = running.audit("denial")
    assert denial["operation"] == "monitor"


def test_who_is_no_administrator_any_more_is_told_and_sees_no_more(
    broker: StartBroker, policy: str, connect: Connect
) -> None:
    running = broker(policy)
    command = [sys.executable, "-c", "from teemate.cli.main import main; main()", "monitor"]
    with subprocess.Popen(
        [*command, "--socket", running.socket], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Watching")
        client = connect(running)
        # One policy with us and one without, each with a reload of its own.
        with_us = f"uids = [{os.geteuid()}"
        (running.folder / "broker.toml").write_text(policy.replace(with_us, f"{with_us}, 4294967294"))
        client.ok("reload")
        assert client.ok("stats")["stats"]["monitoring"]["viewers"] == 1
        (running.folder / "broker.toml").write_text(policy.replace(with_us, "uids = [4294967294"))
        client.ok("reload")
        try:
            said = process.communicate(timeout=TIMEOUT)[1]
        finally:
            process.kill()
    assert process.returncode == 4
    assert f"the policy has changed, and allows monitor to uid {os.geteuid()} no more" in said
    client.ok("ping")


def test_wrong_filters_are_refused(broker: StartBroker, policy: str, connect: Connect) -> None:
    client = connect(broker(policy))
    wrong: list[dict[str, object]] = [{"enclave": ""}, {"client": -1}, {"op": 5}, {"error": "x" * 65}]
    for args in wrong:
        client.send({"id": 1, "op": "monitor", "args": args})
        assert client.reply(1)["error"]["code"] == "protocol-error"


# ---- many who look ---------------------------------------------------------------------------------

VIEWERS = 100
BOUND = 5 << 20
"""Bytes: the megabyte that may wait, encoded twice, and what an allocator keeps of it."""
REQUESTS = 1000
PADDING = "p" * 12000


@contextmanager
def reading(viewers: list[Viewer]) -> Iterator[None]:
    """Have a thread take what comes for these viewers until the block ends."""
    over = threading.Event()

    sockets = {viewer.connection.fileno(): viewer for viewer in viewers}
    poll = select.poll()
    for fd in sockets:
        poll.register(fd, select.POLLIN)

    def read() -> None:
        while not over.is_set():
            for fd, _ in poll.poll(50):
                sockets[fd].count(0)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def memory(running: RunningBroker) -> int:
    """Bytes of the broker's memory that are its own."""
    status = Path(f"/proc/{running.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def test_a_hundred_viewers_half_of_them_stuck_cost_bounded_memory_and_no_client_notices(
    broker: StartBroker, policy: str, look: Look, connect: Connect
) -> None:
    running = broker(f"{policy}\n[limits]\nrequests_per_second = 1000000\nburst = 1000000")
    client, other = connect(running), connect(running)
    viewers = [look(running, op="enclaves") for _ in range(VIEWERS)]
    stuck, awake = viewers[::2], viewers[1::2]
    before = memory(running)
    with reading(awake):
        for number in range(REQUESTS):
            (info,) = client.ok("enclaves", padding=PADDING)["enclaves"]
            if not number % 100:
                other.ok("detach", grant=other.ok("attach", enclave="vault")["grant"], clean=True)
        assert info["name"] == "vault"
    grown = memory(running) - before
    assert REQUESTS * len(PADDING) > 2 * BOUND
    assert grown < BOUND
    # Each of them was shown every message, or told that it was not.
    with reading(viewers):
        wait_until(
            lambda: all(viewer.counted + viewer.missed >= 2 * REQUESTS for viewer in viewers),
            "every message is accounted for",
        )
    assert {viewer.counted + viewer.missed for viewer in viewers} == {2 * REQUESTS}
    assert all(viewer.missed for viewer in stuck)
    statistics = client.ok("stats")["stats"]["monitoring"]
    assert statistics["viewers"] == VIEWERS
    assert statistics["shown"] + statistics["missed"] == VIEWERS * 2 * REQUESTS


def test_a_viewer_that_goes_leaves_nothing_and_the_last_one_ends_the_looking(
    broker: StartBroker, policy: str, connect: Connect
) -> None:
    running = broker(policy)
    client = connect(running)
    for chosen in ({}, {"op": "ping"}):
        viewer = Viewer(running.socket, **chosen)
        viewer.connection.ask("monitor", {"op": "stats"}, 2)  # instead of what it asked for first
        client.ok("ping")
        viewer.connection.close()
        wait_until(lambda: client.ok("stats")["stats"]["monitoring"]["viewers"] == 0, "nobody looks")


# ---- the command -----------------------------------------------------------------------------------


def test_the_command_prints_until_it_is_interrupted(
    broker: StartBroker, policy: str, connect: Connect
) -> None:
    running = broker(policy)
    command = [sys.executable, "-c", "from teemate.cli.main import main; main()", "monitor"]
    with subprocess.Popen(
        [*command, "--json", "--op", "ping", "--socket", running.socket],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert process.stderr.readline().startswith("Watching")
        connect(running).ok("ping")
        request, answer = (json.loads(process.stdout.readline()) for _ in range(2))
        assert (request["from"], request["op"], request["message"]["op"]) == ("client", "ping", "ping")
        assert answer["latency"] >= 0
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert "Traceback" not in process.stderr.read()
