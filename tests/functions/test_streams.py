"""Standard streams that lead to the caller while a function runs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import modules as wasm
import pytest
import trio
from running_broker import RunningBroker
from running_functions import run_functions
from stream_modules import CAT, READS_ON, WRITES_ON

import teemate
from teemate import _slot
from teemate.functions import FunctionFailed, FunctionLimit, FunctionLimits, Functions

PIECE = 1 << 16
OTHER = """
import sys, teemate
with teemate.connect(sys.argv[1]) as broker:
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(broker.functions.invoke("cat", line))
        sys.stdout.buffer.flush()
"""


class BrokenError(Exception):
    """Of a source or a sink."""


@pytest.fixture(scope="module")
def running() -> Iterator[RunningBroker]:
    with run_functions("slots_per_client = 1\nclients_per_uid = 8") as running:
        yield running


@pytest.fixture
def functions(running: RunningBroker) -> Iterator[Functions]:
    """With one slot, so that one that is lost is missed."""
    with teemate.connect(running.socket) as connection:
        yield connection.functions
        assert connection.functions.usage().heap > 0  # the slot still answers


def deploy(functions: Functions, name: str, module: bytes, limits: FunctionLimits | None = None) -> None:
    functions.deploy(name, module, limits=limits, replace=True)


def test_a_function_answers_before_its_input_has_ended(functions: Functions) -> None:
    deploy(functions, "cat", CAT)
    said: list[bytes] = []
    asked = [b"one", b"two", b"three"]

    def conversation() -> Iterator[bytes]:
        for number, word in enumerate(asked):
            assert said == asked[:number]
            yield word

    functions.stream("cat", conversation(), said.append)
    assert said == asked


def test_more_than_any_buffer_goes_through(functions: Functions) -> None:
    limits = FunctionLimits(memory=1 << 16, output=16 << 20, fuel=10**12, time=60)
    deploy(functions, "cat", CAT, limits)
    piece = bytes(range(256)) * 1000
    received = 0
    largest = 0

    def count(data: bytes) -> None:
        nonlocal received, largest
        assert data == (piece * 2)[received % len(piece) :][: len(data)]
        received += len(data)
        largest = max(largest, len(data))

    functions.stream("cat", (piece for _ in range(60)), count)
    assert received == 60 * len(piece)
    assert largest <= PIECE


def test_output_is_limited_however_it_goes_out(functions: Functions) -> None:
    deploy(functions, "endless", WRITES_ON, FunctionLimits(output=200_000))
    received: list[bytes] = []
    with pytest.raises(FunctionLimit) as met:
        functions.stream("endless", (), received.append)
    assert (met.value.limit, met.value.maximum) == ("output", 200_000)
    assert sum(map(len, received)) == 180_000


def test_a_function_that_fails_has_written_what_it_wrote(functions: Functions) -> None:
    deploy(functions, "fails", wasm.printing(b"some", errors=b"why", code=3))
    received: list[bytes] = []
    with pytest.raises(FunctionFailed) as failed:
        functions.stream("fails", (), received.append)
    assert (failed.value.exit_code, failed.value.stderr, received) == (3, b"why", [b"some"])


@pytest.mark.parametrize("where", ["source", "sink"])
def test_what_a_source_or_sink_raises_ends_the_invocation_and_comes_back(
    functions: Functions, where: str
) -> None:
    deploy(functions, "cat", CAT)

    def source() -> Iterator[bytes]:
        yield b"a word"
        if where == "source":
            raise BrokenError
        yield b"another"

    def sink(_: bytes) -> None:
        if where == "sink":
            raise BrokenError

    with pytest.raises(BrokenError):
        functions.stream("cat", source(), sink)
    (log,) = functions.logs("cat")
    assert (log.outcome, log.limit) == ("limit", "stream")


def test_the_time_that_the_caller_takes_counts(functions: Functions) -> None:
    deploy(functions, "reads", READS_ON, FunctionLimits(time=0.5))
    given = 0

    def forever() -> Iterator[bytes]:
        nonlocal given
        while True:
            given += 1
            yield b"more"

    with pytest.raises(FunctionLimit) as met:
        functions.stream("reads", forever(), lambda _: None)
    assert met.value.limit == "time"
    assert given > 1


def test_a_stream_costs_fuel(functions: Functions) -> None:
    deploy(functions, "reads", READS_ON, FunctionLimits(fuel=10**6))
    with pytest.raises(FunctionLimit) as met:
        functions.stream("reads", iter(lambda: b"x", None), lambda _: None)
    assert met.value.limit == "fuel"


def test_streams_are_of_the_one_invocation(functions: Functions) -> None:
    deploy(functions, "cat", CAT)
    received: list[bytes] = []
    functions.stream("cat", [b"streamed"], received.append)
    assert functions.invoke("cat", b"whole") == b"whole"
    assert received == [b"streamed"]


async def test_a_task_converses_with_a_function(running: RunningBroker) -> None:
    async with teemate.open_broker(running.socket) as broker:
        await broker.functions.deploy("cat", CAT, replace=True)
        to_function, questions = trio.open_memory_channel[bytes](0)
        answers, from_function = trio.open_memory_channel[bytes](0)

        async def talk() -> None:
            async with to_function:
                for word in (b"one", b"two"):
                    await to_function.send(word)
                    assert await from_function.receive() == word

        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk)
            await broker.functions.stream("cat", questions, answers.send)


@pytest.mark.parametrize("where", ["source", "sink"])
async def test_a_task_that_is_cancelled_while_a_function_waits_keeps_its_slot(
    running: RunningBroker, where: str
) -> None:
    async with teemate.open_broker(running.socket) as broker:
        await broker.functions.deploy("cat", CAT, replace=True)
        waits = trio.Event()

        async def stuck(*_: bytes) -> None:
            waits.set()
            await trio.sleep_forever()

        async def source() -> AsyncIterator[bytes]:
            yield b"a word"
            await stuck()

        async def sink(data: bytes) -> None:
            if where == "sink":
                await stuck()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker.functions.stream, "cat", source(), sink)
            await waits.wait()
            nursery.cancel_scope.cancel()
        assert await broker.functions.invoke("cat", b"still there") == b"still there"
        (log,) = await broker.functions.logs("cat")
        assert (log.outcome, log.limit) == ("limit", "stream")


async def test_a_function_that_has_to_end_is_given_the_time_for_it(
    running: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The answer that ends it is put off to the next entry, as of a call that is interrupted at once.
    answer, resume = _slot._slot_answer, _slot._slot_resume
    put_off: list[tuple[Any, ...]] = []

    def answer_or_pause(handle: Any, status: int, data: bytes, length: int, pause: int, call: Any) -> int:
        if not status:
            return int(answer(handle, status, data, length, pause, call))
        put_off.append((handle, status, data, length))
        call.outcome = _slot._PAUSED
        with contextlib.suppress(trio.Cancelled):
            while True:  # the thread is told a moment after its task
                trio.from_thread.check_cancelled()
        return 0

    def go_on(handle: Any, pause: int, call: Any) -> int:
        return int(answer(*put_off.pop(), pause, call) if put_off else resume(handle, pause, call))

    monkeypatch.setattr(_slot, "_slot_answer", answer_or_pause)
    monkeypatch.setattr(_slot, "_slot_resume", go_on)
    async with teemate.open_broker(running.socket) as broker:
        await broker.functions.deploy("cat", CAT, replace=True)
        waits = trio.Event()

        async def source() -> AsyncIterator[bytes]:
            waits.set()
            await trio.sleep_forever()
            yield b""

        async def sink(_: bytes) -> None:
            pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker.functions.stream, "cat", source(), sink)
            await waits.wait()
            nursery.cancel_scope.cancel()
        (log,) = await broker.functions.logs("cat")
        assert (log.outcome, log.limit) == ("limit", "stream")


def test_nobody_else_waits_for_a_caller_that_keeps_its_function_waiting(running: RunningBroker) -> None:
    command = [sys.executable, "-c", OTHER, running.socket]
    with (
        teemate.connect(running.socket) as slow,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other,
    ):
        slow.functions.deploy("cat", CAT, replace=True)
        assert other.stdin is not None
        assert other.stdout is not None

        def source() -> Iterator[bytes]:
            assert other.stdin is not None
            assert other.stdout is not None
            for number in range(20):
                other.stdin.write(b"%d\n" % number)
                other.stdin.flush()
                yield other.stdout.readline()

        received: list[bytes] = []
        slow.functions.stream("cat", source(), received.append)
        assert received == [b"%d\n" % number for number in range(20)]
        other.stdin.close()
        assert other.wait() == 0
