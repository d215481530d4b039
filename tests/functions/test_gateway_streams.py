"""Streams through the gateway, over real sockets: bodies go in and results come out while functions run."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import socket
from collections.abc import Iterator
from typing import BinaryIO

import modules as wasm
import pytest
from backends import PATIENCE
from processes import wait_until
from running_broker import RunningBroker
from running_functions import run_functions
from running_gateway import RunningGateway, run_gateway
from stream_modules import CAT, READS_ON, WRITES_ON

import teemate
from teemate.functions import FunctionLimits

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hypercorn") is None, reason="needs hypercorn: pip install 'teemate[gateway]'"
)
STREAM = {"TeeMate-Stream": "1"}
LARGE = FunctionLimits(output=16 << 20, fuel=1 << 62, time=600.0)


@pytest.fixture(scope="module")
def running() -> Iterator[RunningBroker]:
    with run_functions() as running:
        with teemate.connect(running.socket) as broker:
            deploy = broker.functions.deploy
            deploy("cat", CAT)
            deploy("reads", READS_ON, limits=LARGE)
            deploy("writes", WRITES_ON, limits=LARGE)
            deploy("little", WRITES_ON, limits=FunctionLimits(output=100_000))
            deploy("none", WRITES_ON, limits=FunctionLimits(output=1))
            deploy("fails", wasm.printing(b"", errors=b"why", code=3))
            deploy("prints", wasm.printing(b"a word"))
        yield running


@pytest.fixture(scope="module")
def gateway(running: RunningBroker) -> Iterator[RunningGateway]:
    """One worker with two slots."""
    options = ("--workers", "1", "--slots", "2", "--max-body", "1M")
    with run_gateway(*options, broker=running.socket) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def all_slots_come_back(gateway: RunningGateway) -> Iterator[None]:
    """Whatever a test's client does."""
    yield
    wait_until(lambda: running_now(gateway) == 0, "every function has ended")
    for _ in range(3):  # more than there are slots
        assert gateway.request("POST", "/fn/cat", b"a word").body == b"a word"


def running_now(gateway: RunningGateway) -> int:
    told: int = gateway.request("GET", "/healthz").json()["running"]
    return told


class Conversation:
    """One request whose body is sent chunk by chunk."""

    def __init__(self, gateway: RunningGateway, name: str, timeout: str = "60") -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(60.0 * PATIENCE)
        self._socket.connect(gateway.socket)
        self._socket.sendall(
            f"POST /fn/{name} HTTP/1.1\r\nHost: localhost\r\nTeeMate-Stream: 1\r\n"
            f"TeeMate-Timeout: {timeout}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        self.file: BinaryIO = self._socket.makefile("rb")

    def say(self, data: bytes) -> None:
        self._socket.sendall(b"%x\r\n%b\r\n" % (len(data), data))

    def head(self) -> int:
        """Read the answer's head; returns its status."""
        status = int(self.file.readline().split()[1])
        while self.file.readline() != b"\r\n":
            pass
        return status

    def hear(self) -> bytes:
        """Read a chunk of the answer, b"" at its end; raises EOFError where it ends in the middle."""
        line = self.file.readline()
        if not line:
            raise EOFError
        data = self.file.read(int(line, 16))
        if self.file.readline() != b"\r\n":
            raise EOFError
        return data

    def hear_all(self) -> None:
        while self.hear():
            pass

    def close(self) -> None:
        self.file.close()
        self._socket.close()


def test_an_answer_begins_before_its_request_has_ended(gateway: RunningGateway) -> None:
    conversation = Conversation(gateway, "cat")
    conversation.say(b"one")
    assert conversation.head() == 200
    assert conversation.hear() == b"one"
    for word in (b"two", b"three" * 1000):
        conversation.say(word)
        assert conversation.hear() == word
    conversation.say(b"")
    assert conversation.hear() == b""
    conversation.close()


def test_failures_have_their_status_until_something_was_written(gateway: RunningGateway) -> None:
    failed = gateway.request("POST", "/fn/fails", b"", STREAM)
    assert (failed.status, failed.json()["exit_code"]) == (422, 3)
    limited = gateway.request("POST", "/fn/none", b"", STREAM)
    assert (limited.status, limited.json()["limit"]) == (422, "output")
    assert gateway.request("POST", "/fn/nothing", b"", STREAM).status == 404
    assert gateway.request("POST", "/fn/cat", b"", {"TeeMate-Stream": "yes"}).status == 400
    assert gateway.request("POST", "/fn/cat", b"", STREAM).body == b""


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_an_answer_that_fails_later_ends_in_the_middle(gateway: RunningGateway, size: int) -> None:
    with pytest.raises(http.client.IncompleteRead) as cut:
        gateway.request("POST", "/fn/little", bytes(size), STREAM)
    assert len(cut.value.partial) == 60_000
    assert gateway.log("stream broken off")


def test_an_answer_is_whole_though_its_body_is_not_read(gateway: RunningGateway) -> None:
    with contextlib.closing(gateway.connection()) as kept:
        for _ in range(3):  # more than there are slots
            assert gateway.request("POST", "/fn/prints", bytes(1 << 20), STREAM, over=kept).body == b"a word"


def test_a_body_is_no_larger_than_the_gateway_takes(gateway: RunningGateway) -> None:
    assert gateway.request("POST", "/fn/reads", bytes(2 << 20), STREAM).status == 413
    chunks = (bytes(64 << 10) for _ in range(17))
    assert gateway.request("POST", "/fn/reads", chunks, STREAM).status == 413
    assert gateway.request("POST", "/fn/cat", bytes(1 << 20), STREAM).body == bytes(1 << 20)


def test_a_sender_that_pauses_has_its_function_until_the_deadline(gateway: RunningGateway) -> None:
    conversation = Conversation(gateway, "cat", "0.5")
    assert conversation.head() == 504
    conversation.close()
    conversation = Conversation(gateway, "cat", "1")
    conversation.say(b"a word")
    assert conversation.head() == 200
    assert conversation.hear() == b"a word"
    with pytest.raises(EOFError):
        conversation.hear()
    conversation.close()


def test_a_client_that_reads_nothing_holds_nobody_up_and_is_cut_off(gateway: RunningGateway) -> None:
    deaf = Conversation(gateway, "writes", "3")
    deaf.say(b"")
    assert deaf.head() == 200
    for _ in range(10):
        assert gateway.request("POST", "/fn/cat", b"a word", STREAM).body == b"a word"
    wait_until(lambda: running_now(gateway) == 0, "its function has ended")
    with pytest.raises(EOFError):
        deaf.hear_all()
    deaf.close()


@pytest.mark.parametrize("name", ["cat", "writes", "reads"])
def test_a_client_that_leaves_ends_its_function_whatever_it_waits_for(
    gateway: RunningGateway, name: str
) -> None:
    leaver = Conversation(gateway, name)
    leaver.say(b"a word")
    wait_until(lambda: running_now(gateway) == 1, "it runs")
    leaver.close()
