"""All of a gateway in little, with modules made by hand: for where compiling would take long, too.

One sealed function that keeps a value, streams, limits, and a worker that is killed.
"""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import struct
from collections.abc import Iterator

import key_modules
import modules as wasm
import pytest
from processes import wait_until
from running_broker import RunningBroker
from running_functions import free_slots, run_functions
from running_gateway import DEADLINE, RunningGateway, run_gateway
from stream_modules import CAT
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
    after = usage(running)
    assert (after.functions, after.blocks_owned) == (before.functions, before.blocks_owned)
    logs = 2 * 1024  # of what failed here: heads alone
    assert after.heap_used - after.heap_ready <= before.heap_used - before.heap_ready + logs


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
    conversation.close()


def test_what_is_too_much_or_takes_too_long_is_refused_and_a_killed_worker_costs_its_own_requests(
    gateway: RunningGateway,
) -> None:
    assert ask(gateway, "forever", b"", timeout="0.2")[0] == 504
    both = [Conversation(gateway, "cat") for _ in range(2)]
    for conversation in both:
        conversation.say(b"begin")
        assert conversation.head() == 200
        assert conversation.hear() == b"begin"
    assert ask(gateway, "cat", b"a word")[0] == 429
    victim = gateway.workers()[0]
    os.kill(victim, signal.SIGKILL)
    cut = wait_for_either(both)
    with pytest.raises(EOFError):
        both[cut].hear()
    both[1 - cut].say(b"go on")
    assert both[1 - cut].hear() == b"go on"
    for conversation in both:
        conversation.close()
    assert ask(gateway, "cat", b"a word", timeout="60") == (200, b"a word")
    gateway.wait_for_workers(2, other_than=victim)


def wait_for_either(conversations: list[Conversation]) -> int:
    """Return which has something to hear."""
    (ready, *more), _, _ = select.select([each.file for each in conversations], [], [], DEADLINE)
    assert not more
    return [each.file for each in conversations].index(ready)
