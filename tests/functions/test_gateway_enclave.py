"""The gateway before a real broker and a real enclave, with the example functions."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import gateway_kills
import pytest
from faulty_proxy import FAULTS
from gateway_kills import campaign, check, compiled
from processes import wait_until
from raw_client import RawClient
from running_broker import RunningBroker
from running_functions import free_slots, module, run_functions
from running_gateway import RunningGateway, run_gateway

import teemate
from teemate import wasm
from teemate.functions import FunctionLimits, Functions

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hypercorn") is None, reason="needs hypercorn: pip install 'teemate[gateway]'"
)
UNLIMITED = FunctionLimits(fuel=1 << 62, time=600.0)
OPTIONS = ("--workers", "2", "--slots", "2", "--max-body", "64M")
PLAIN = ("answers twice", "function")


def forever(folder: Path) -> bytes:
    """A function that does not end by itself."""
    source = folder / "forever.c"
    source.write_text("int main(void) { for (volatile int i = 0;; i++) ; }\n")
    return wasm.build_module([source], folder / "forever.wasm").path.read_bytes()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """A broker with the examples."""
    folder = tmp_path_factory.mktemp("modules")
    with run_functions() as running:
        with teemate.connect(running.socket) as broker:
            for name in ("sha256", "json", "matmul"):
                broker.functions.deploy(name, module(name, folder))
            broker.functions.deploy("small", module("gzip", folder), limits=FunctionLimits(output=4))
        yield running


@pytest.fixture(scope="module")
def gateway(running: RunningBroker) -> Iterator[RunningGateway]:
    with run_gateway(*OPTIONS, broker=running.socket) as gateway:
        yield gateway


def test_functions_are_invoked_with_arguments_over_http(gateway: RunningGateway) -> None:
    payload = random.Random(30).randbytes(100_000)
    reply = gateway.request("POST", "/fn/sha256", payload)
    assert (reply.status, reply.body.decode().strip()) == (200, hashlib.sha256(payload).hexdigest())
    reply = gateway.request("POST", "/fn/json?arg=.name", b'{"name": "Ada"}')
    assert (reply.status, reply.body) == (200, b'"Ada"')


def test_how_functions_fail_is_told_and_not_what_they_log(gateway: RunningGateway) -> None:
    failed = gateway.request("POST", "/fn/json", b"{secret")
    assert (failed.status, failed.json()["code"], failed.json()["exit_code"]) == (422, "function-failed", 1)
    assert b"at byte" not in failed.body
    assert gateway.request("POST", "/fn/nothing").status == 404
    limited = gateway.request("POST", "/fn/small", b"text")
    assert (limited.status, limited.json()["code"], limited.json()["limit"]) == (
        422,
        "function-limit",
        "output",
    )


def test_a_deadline_ends_the_function_and_its_slot_is_used_again(
    gateway: RunningGateway, running: RunningBroker, tmp_path: Path
) -> None:
    with teemate.connect(running.socket) as broker:
        broker.functions.deploy("forever", forever(tmp_path), limits=UNLIMITED, replace=True)
        for _ in range(5):  # more than there are slots
            reply = gateway.request("POST", "/fn/forever", headers={"TeeMate-Timeout": "0.3"})
            assert (reply.status, reply.json()["code"]) == (504, "call-timeout")
        broker.functions.remove("forever")
    assert gateway.request("POST", "/fn/json", b"1").body == b"1"


def test_a_client_that_leaves_ends_its_function(running: RunningBroker, tmp_path: Path) -> None:
    with run_gateway("--workers", "1", "--slots", "1", broker=running.socket) as gateway:

        def counts() -> tuple[int, int]:
            told = gateway.request("GET", "/healthz").json()
            return told["running"], told["waiting"]

        with teemate.connect(running.socket) as broker:
            broker.functions.deploy("forever", forever(tmp_path), limits=UNLIMITED, replace=True)
            leaver = gateway.connection()
            leaver.request("POST", "/fn/forever", headers={"TeeMate-Timeout": "60"})
            wait_until(lambda: counts() == (1, 0), "it runs")
            leaver.close()
            wait_until(lambda: counts() == (0, 0), "it has ended")
            assert gateway.request("POST", "/fn/json", b"1").body == b"1"
            broker.functions.remove("forever")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return compiled(tmp_path_factory.mktemp("examples"))


def test_every_invocation_is_answered_once_or_its_connection_closed_while_workers_are_killed(
    request: pytest.FixtureRequest, examples: dict[str, bytes]
) -> None:
    """And nothing stays behind: no slot, and no byte of the enclave's heap."""
    requests = 2_000 if request.config.getoption("--full") else 12
    with run_functions() as running:
        check(campaign(running, examples, requests=requests, kills=max(2, requests // 50)))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_campaign_finds_a_gateway_that_does_not_answer_once(
    request: pytest.FixtureRequest, examples: dict[str, bytes], fault: str
) -> None:
    if fault not in PLAIN and not request.config.getoption("--full"):
        pytest.skip("each takes some seconds: pytest --full tests/functions")
    with run_functions() as running:
        some = {name: examples[name] for name in ("json", "sha256")}
        result = campaign(running, some, requests=6, kills=0, fault=fault)
    with pytest.raises(AssertionError):
        check(result)


@pytest.mark.parametrize("kept", ["slot", "function"])
def test_a_campaign_finds_what_stays_behind(
    request: pytest.FixtureRequest, examples: dict[str, bytes], kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kept not in PLAIN and not request.config.getoption("--full"):
        pytest.skip("takes some seconds: pytest --full tests/functions")
    monkeypatch.setattr("processes.DEADLINE", 1.0)  # for it comes never
    send = gateway_kills._send
    with run_functions() as running, contextlib.ExitStack() as held:

        def keep(*given: object) -> object:
            if kept == "slot":
                client = held.enter_context(contextlib.closing(RawClient(running.socket)))
                client.ok("attach", enclave="functions", slots=1)
            else:
                monkeypatch.setattr(Functions, "remove", lambda *_: None)
            return send(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(gateway_kills, "_send", keep)
        result = campaign(running, {"json": examples["json"]}, requests=6, kills=0)
    with pytest.raises(AssertionError):
        check(result)
    assert (result.slots_kept, result.heap_kept > 0) == ((1, False) if kept == "slot" else (0, True))


def test_nothing_of_a_gateway_that_was_killed_stays_in_the_enclave(running: RunningBroker) -> None:
    with teemate.connect(running.socket) as broker:
        before = broker.functions.usage()
        free = free_slots(running)[0]
        with run_gateway(*OPTIONS, broker=running.socket, ends_well=False) as gateway:
            for number in range(8):
                assert gateway.request("POST", "/fn/json", b"%d" % number).status == 200
            for worker in gateway.workers():
                os.kill(worker, signal.SIGKILL)
            gateway.process.kill()
        wait_until(lambda: free_slots(running)[0] >= free, "its slots are free again")

        def all_is_gone() -> bool:
            """What is just being made ready in a free slot is counted as such when it is done."""
            after = broker.functions.usage()
            assert (after.functions, after.size) == (before.functions, before.size)
            used, was = (usage.heap_used - usage.heap_ready for usage in (after, before))
            return after.blocks_owned == before.blocks_owned and used <= was

        wait_until(all_is_gone, "nothing of it is left")
