"""`teemate replay` plays a recording against another broker and finds what that does otherwise."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from backends import BACKEND
from commands import proxy, teemate
from images import Images
from processes import wait_until
from raw_client import raw_client
from running_broker import RunningBroker, run_broker

from teemate.demo import _run
from teemate.demo._prepare import DemoBroker, DemoImage
from teemate.demo._prepare import run_broker as run_demo_broker
from teemate.demo._run import run_demo

StartBroker = Callable[..., RunningBroker]


def record(running: RunningBroker, folder: Path, images: Images) -> str:
    """Record what two clients, one of them an administrator, do; returns where."""
    recording = str(folder / "session.pcapng")
    with proxy(running.socket, folder, "--record", recording, "--quiet") as (path, _):
        with raw_client(path, name="one") as one, raw_client(path, name="two") as two:
            grant = one.ok("attach", enclave="vault", slots=2)["grant"]
            other = two.ok("attach", enclave="vault")["grant"]
            slots = [slot["slot"] for slot in one.ok("slots.acquire", grant=grant)["slots"]]
            one.ok("slots.release", grant=grant, slots=slots, clean=True)
            one.fails("slots.release", "not-found", grant=grant, slots=[4000])
            two.fails("attach", "not-found", enclave="nowhere")
            two.ok("revoke", grant=grant, grace=0)
            assert one.event()["event"] == "revoked"
            clients = two.ok("clients")["clients"]
            assert len(clients) == 2
            with images.vault.sgxs.open("rb") as image:
                sigstruct = images.vault.sigstruct.read_bytes()
                two.ok("create", (image.fileno(),), name="second", sigstruct=sigstruct)
            two.ok("stats")
            two.ok("detach", grant=other, clean=True)
            one.send({"id": 99, "op": 5})
            one.breaks_protocol()
    return recording


def create_policy(policy: str) -> str:
    return f"{policy}\n[[create]]\nuid = {os.geteuid()}\npages = 100000\n"


def test_a_fresh_broker_answers_the_same_but_for_ids_and_keys(
    broker: StartBroker, policy: str, images: Images, tmp_path: Path
) -> None:
    recording = record(broker(create_policy(policy)), tmp_path, images)
    fresh = broker(create_policy(policy))
    with raw_client(fresh.socket) as early:  # so that all numbers are others
        early.ok("detach", grant=early.ok("attach", enclave="vault", slots=3)["grant"], clean=True)
    wait_until(lambda: len(fresh.audit("end")) == 1, "it has left")
    arguments = ("replay", recording, "--socket", fresh.socket, "--json")
    told = json.loads(teemate(*arguments, "--image", str(images.vault.sgxs)))
    assert told["differences"] == []
    assert (told["sent"], told["skipped"]) == (14, [])
    assert told["compared"] == 15  # the event too
    # Another one at another time: `second` is there already.
    again = json.loads(teemate(*arguments, "--image", str(images.vault.sgxs), status=1))
    assert {difference["where"] for difference in again["differences"]} >= {"answer to create: error"}
    said = teemate("replay", recording, "--socket", broker(create_policy(policy)).socket, status=1)
    assert "not sent: create: it came with a file; say which with --image" in said


def test_what_another_policy_answers_otherwise_is_shown(
    broker: StartBroker, policy: str, images: Images, tmp_path: Path
) -> None:
    recording = record(broker(create_policy(policy)), tmp_path, images)
    other = broker(create_policy(policy).replace("slots_per_client = 8", "slots_per_client = 2"))
    said = teemate("replay", recording, "--socket", other.socket, "--image", str(images.vault.sgxs), status=1)
    assert "answer to slots.acquire: error: was not there" in said
    assert "answer to slots.acquire: ok: was" in said
    assert "a secret" in said


def test_a_recorded_demo_shows_every_message_and_replays_without_a_difference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recording = str(tmp_path / "demo.pcapng")
    kept: list[DemoImage] = []

    @asynccontextmanager
    async def behind_a_proxy(folder: Path, image: DemoImage, **options: Any) -> AsyncIterator[DemoBroker]:
        kept.append(
            image._replace(
                sgxs=Path(shutil.copy(image.sgxs, tmp_path)),
                sigstruct=Path(shutil.copy(image.sigstruct, tmp_path)),
            )
        )
        async with run_demo_broker(folder, image, **options) as broker:
            with proxy(broker.path, folder, "--record", recording, "--quiet") as (path, _):
                yield broker._replace(path=path)

    class Quiet:
        def phase(self, text: str, total: int = 0) -> None:
            pass

        def progress(self, done: int) -> None:
            pass

    monkeypatch.setattr(_run, "run_broker", behind_a_proxy)
    figures = run_demo(clients=3, calls=30, heap=4 << 20, backend=BACKEND, listener=Quiet())
    assert figures.failures == 0
    shown = [json.loads(line) for line in teemate("decode", recording, "--json").splitlines()]
    by_client = {number: [m for m in shown if m["client"] == number and "op" in m] for number in range(1, 5)}
    # The demo itself asks for the enclaves; each program comes in, works inside, and leaves.
    ops = [(m["op"], m["kind"]) for m in by_client[1]]
    assert (ops[0], ops[3:]) == (("hello", "request"), [("enclaves", "answer")])
    assert sorted(ops[1:3]) == [("enclaves", "request"), ("hello", "answer")]  # whichever the proxy saw first
    for number in (2, 3, 4):
        ops = [(m["op"], m["kind"]) for m in by_client[number]]
        assert ops[:4] == [
            ("hello", "request"),
            *sorted([("attach", "request"), ("hello", "answer")], key=ops.index),
            ("attach", "answer"),
        ]
        assert ("detach", "request") in ops
    text = f"""
[administrators]
uids = [{os.geteuid()}]
[[enclave]]
name = "vault"
image = "{kept[0].sgxs}"
sigstruct = "{kept[0].sigstruct}"
slots_per_client = 1
[[enclave.attach]]
uid = {os.geteuid()}
"""
    with ExitStack() as stack:
        fresh = stack.enter_context(run_broker(text))
        said = teemate("replay", recording, "--socket", fresh.socket)
    assert said.endswith("no difference\n")
    messages = [m for m in shown if "message" in m]
    assert f"{sum(m['from'] == 'client' for m in messages)} messages sent" in said
