"""An operator's questions, each answered by one command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from images import Images
from running_broker import RunningBroker

import teemate

Broker = Callable[..., RunningBroker]

HOLDER = """
import sys, teemate
broker = teemate.connect(client="holder")
enclave = broker.attach("vault", slots=int(sys.argv[1]))
print("attached", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def policy(images: Images, attach: str = "uid = 0") -> str:
    vault = images.build("vault", slots=4, heap="4M")
    return f"""
[administrators]
uids = [0]
[[enclave]]
name = "vault"
image = "{vault.sgxs}"
sigstruct = "{vault.sigstruct}"
owner = 0
[[enclave.attach]]
{attach}
"""


def ask(broker: RunningBroker, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from teemate.cli.main import main; main()", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "TEEMATE_SOCKET": broker.socket, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def holder(stack: ExitStack, broker: RunningBroker, slots: int) -> subprocess.Popen[str]:
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(slots)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TEEMATE_SOCKET": broker.socket},
        )
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "attached\n"
    return process


def test_who_holds_which_slot_and_who_waits_for_whom_is_one_command(
    broker: Broker, images: Images, stack: ExitStack
) -> None:
    running = broker(policy(images))
    greedy = holder(stack, running, 3)
    administrator = stack.enter_context(teemate.connect(running.socket))
    waiting = threading.Thread(target=_attach, args=(running.socket, 2))
    waiting.start()
    while not administrator.enclaves()[0].slots.waiting:
        administrator.ping()
    told = ask(running, "slots")
    assert f"client 1 (holder, pid {greedy.pid}, uid 0): 3" in told
    assert f"pid {os.getpid()}, uid 0) waits for 2 slots" in told
    found = json.loads(ask(running, "slots", "vault", "--json"))["enclaves"]["vault"]
    assert [slot["holder"]["pid"] for slot in found["slots"] if slot["state"] == "assigned"] == [
        greedy.pid
    ] * 3
    assert [request["slots"] for request in found["waiting"]] == [2]
    greedy.communicate()
    waiting.join()
    assert json.loads(ask(running, "slots", "--json"))["enclaves"]["vault"]["waiting"] == []


def _attach(socket: str, slots: int) -> None:
    with teemate.connect(socket, client="patient") as broker, broker.attach("vault", slots=slots, wait=60):
        pass


def test_a_withheld_slot_is_listed_as_its_former_holders_with_the_reason(
    broker: Broker, images: Images, stack: ExitStack
) -> None:
    running = broker(policy(images))
    administrator = stack.enter_context(teemate.connect(running.socket))
    process = holder(stack, running, 1)
    (client,) = [client for client in administrator.clients() if client.pid == process.pid]
    os.kill(process.pid, signal.SIGSTOP)  # it acknowledges nothing
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    administrator.revoke(client=client.client, grace=0.0)
    (slot,) = [slot for slot in administrator.holders("vault").slots if slot.state == "withheld"]
    assert slot.holder is not None
    assert slot.holder.pid == process.pid
    assert slot.reason
    process.kill()


def test_memory_is_divided_among_the_containers_that_share_it(
    broker: Broker, images: Images, stack: ExitStack
) -> None:
    running = broker(policy(images))
    for _ in range(2):  # in one control group: one container
        holder(stack, running, 1)
    found = json.loads(ask(running, "usage", "--json"))
    (container,) = found["containers"]
    assert (container["processes"], container["slots"], container["enclaves"]) == (2, 2, ["vault"])
    assert container["part_bytes"] == container["mapped_bytes"] == found["total_bytes"]
    assert "vault" in ask(running, "usage")


def test_what_containers_share_is_counted_once() -> None:
    from teemate._types import ClientInfo, GrantInfo
    from teemate.cli.looking import _parts

    def client(number: int, cgroup: str, *enclaves: str) -> ClientInfo:
        grants = tuple(GrantInfo(number, name, (2,)) for name in enclaves)
        return ClientInfo(number, "", number, 0, 0, cgroup, 0.0, 0, grants)

    class Enclave:
        def __init__(self, name: str, pages: int) -> None:
            self.name, self.pages = name, pages

    enclaves = [Enclave("vault", 1000), Enclave("other", 10)]
    clients = [
        client(1, "/a", "vault"),
        client(2, "/b", "vault", "other"),
        client(3, "/b", "vault"),
        client(4, "/c"),
        ClientInfo(5, "", 5, 0, 0, "/d", 0.0, 0, (GrantInfo(5, "vault", ()),)),  # waits for its first slot
    ]
    parts = _parts(enclaves, clients)  # type: ignore[arg-type]
    assert [(part.cgroup, part.processes, part.part_bytes // 4096) for part in parts] == [
        ("/b", 2, 510),
        ("/a", 1, 500),
    ]


def test_who_was_denied_what_and_why_is_one_command(broker: Broker, images: Images) -> None:
    running = broker(policy(images, "uid = 12345"))
    for _ in range(3):
        with teemate.connect(running.socket) as client, pytest.raises(teemate.Denied):
            client.attach("vault")
    (denial,) = json.loads(ask(running, "denials", "--json"))["denials"]
    assert (denial["uid"], denial["pid"], denial["operation"], denial["times"]) == (
        0,
        os.getpid(),
        "attach",
        3,
    )
    assert denial["missing_rule"] == "enclave vault: no [[enclave.attach]] matches"
    assert "no [[enclave.attach]] matches" in ask(running, "denials")
    assert json.loads(ask(running, "denials", "--uid", "7", "--json"))["denials"] == []


def test_only_administrators_are_answered(broker: Broker, images: Images) -> None:
    running = broker(policy(images).replace("uids = [0]", "uids = [12345]"))
    with teemate.connect(running.socket) as client:
        for question in (lambda: client.holders("vault"), client.denials, client.reload):
            with pytest.raises(teemate.Denied):
                question()


def test_reload_is_a_command_as_well_and_says_what_is_wrong(broker: Broker, images: Images) -> None:
    running = broker(policy(images))
    (running.folder / "broker.toml").write_text(policy(images, "uid = 12345"))
    assert "in force" in ask(running, "reload")
    with teemate.connect(running.socket) as client:
        with pytest.raises(teemate.Denied):
            client.attach("vault")
        (running.folder / "broker.toml").write_text("[broker]\nbackand = 1\n")
        with pytest.raises(teemate.Unsupported, match=r"broker\.toml:2"):
            client.reload()


def test_denials_are_remembered_to_a_bound() -> None:
    import structlog

    from teemate.broker.connections.identity import Identity
    from teemate.broker.policy.rules import DenialReason, Missing
    from teemate.broker.telemetry.audit import _DENIALS_REMEMBERED, Audit

    audit = Audit(structlog.wrap_logger(structlog.ReturnLogger()))
    for uid in range(_DENIALS_REMEMBERED + 10):
        who = Identity(pid=1, uid=uid, gid=0, groups=frozenset(), label="", cgroup="/")
        audit.denied(who, client=1, operation="attach", missing=Missing(DenialReason.ATTACH_RULE, "none"))
    assert len(audit.recent_denials) == _DENIALS_REMEMBERED
    assert {denial.uid for denial in audit.recent_denials.values()} == set(
        range(10, _DENIALS_REMEMBERED + 10)
    )
