"""All of a gateway in little, with modules made by hand: for where compiling would take long, too.

One sealed function that keeps a value, streams, limits, and a worker that is killed.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import struct
from collections.abc import Iterator

import key_modules
import modules as wasm
import pytest
from processes import wait_until
from running_broker import RunningBroker
from running_functions import free_slots, run_functions
from running_gateway import RunningGateway, run_gateway
from stream_modules import CAT
from test_gateway_processes import alone
from test_gateway_streams import Conversation

import teemate
from teemate.functions import FunctionLimits, FunctionUsage

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hypercorn") is None, reason="needs hypercorn: pip install 'teemate[gateway]'"
)
UNLIMITED = FunctionLimits(fuel=1 << 62, time=600.0)
HEAD = struct.pack("<II", 6, 5) + b"colour".ljust(512, b"\0")
"""A key of 6 bytes, and that a value of 5 follows (key_modules.py)."""


@pytest.fixture(scope="module")
def running() -> Iterator[RunningBroker]:
    with run_functions("slots_per_client = 2\nclients_per_uid = 8") as running:
        yield running


@pytest.fixture(scope="module")
def gateway(running: RunningBroker) -> Iterator[RunningGateway]:
    """Two workers with a slot each, one place to wait, and two for any one function."""
    with teemate.connect(running.socket) as broker:
        deploy = broker.functions.deploy
        deploy("cat", CAT, limits=UNLIMITED)
        deploy("forever", wasm.command(wasm.ENDLESS), limits=UNLIMITED)
        for name in ("put", "get"):
            deploy(name, key_modules.module(name), grants=["keys"], sealed=True)
        assert broker.functions.invoke("put", HEAD + b"black")[:4] == bytes(4)
    before = usage(running)
    options = ("--workers", "2", "--slots", "1", "--queue", "1", "--concurrency", "2")
    with run_gateway(*options, broker=running.socket) as gateway:
        yield gateway

    def nothing_is_left() -> bool:
        """What is just being made ready in a free slot is counted as such when it is done."""
        after = usage(running)
        logs = 2 * 1024  # of what failed here: heads alone
        used, was = (found.heap_used - found.heap_ready for found in (after, before))
        return (after.functions, after.blocks_owned) == (before.functions, before.blocks_owned) and (
            used <= was + logs
        )

    wait_until(nothing_is_left, "nothing of the gateway is left")


def usage(running: RunningBroker) -> FunctionUsage:
    """When nobody has a slot."""
    wait_until(lambda: len(set(free_slots(running))) == 1, "all slots are free")
    with teemate.connect(running.socket) as broker:
        found = broker.functions.usage()
    wait_until(lambda: len(set(free_slots(running))) == 1, "all slots are free again")
    return found


def ask(gateway: RunningGateway, name: str, body: bytes, **headers: str) -> tuple[int, bytes]:
    named = {"TeeMate-" + header.capitalize(): value for header, value in headers.items()}
    reply = gateway.request("POST", f"/fn/{name}", body, named)
    return reply.status, reply.body


def test_a_sealed_function_with_the_grant_keeps_what_is_posted(gateway: RunningGateway) -> None:
    status, answer = ask(gateway, "get", HEAD)
    assert (status, answer[8:]) == (200, b"black")
    status, answer = ask(gateway, "put", HEAD + b"green")
    assert (status, answer[:4]) == (200, bytes(4))
    status, answer = ask(gateway, "get", HEAD)
    assert (status, answer[8:]) == (200, b"green")


def test_a_function_answers_while_its_body_comes(gateway: RunningGateway) -> None:
    conversation = Conversation(gateway, "cat")
    conversation.say(b"one")
    assert conversation.head() == 200
    assert conversation.hear() == b"one"
    conversation.say(b"two")
    assert conversation.hear() == b"two"
    conversation.say(b"")
    assert conversation.hear() == b""
    conversation.close()


def test_what_is_too_much_or_takes_too_long_is_refused_and_a_killed_worker_costs_its_own_requests(
    gateway: RunningGateway,
) -> None:
    assert ask(gateway, "forever", b"", timeout="0.2")[0] == 504
    victim, other = gateway.workers()
    lost, kept = begin(gateway, victim), begin(gateway, other)
    assert ask(gateway, "cat", b"a word")[0] == 429
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(EOFError):
        lost.hear()
    kept.say(b"go on")
    assert kept.hear() == b"go on"
    for conversation in (lost, kept):
        conversation.close()
    wait_until(lambda: ask(gateway, "cat", b"", timeout="60")[0] == 200, "their places are free")
    assert ask(gateway, "cat", b"a word", timeout="60") == (200, b"a word")
    gateway.wait_for_workers(2, other_than=victim)


def begin(gateway: RunningGateway, worker: int) -> Conversation:
    """A function that runs at `worker`."""
    with alone(gateway, worker):
        conversation = Conversation(gateway, "cat")
        conversation.say(b"begin")
        assert conversation.head() == 200
        assert conversation.hear() == b"begin"
    return conversation
