"""Functions through a broker: what people do with them, from Python, on trio and from the shell."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import modules as wasm
import pytest
import trio
from function_enclaves import functions_image
from running_broker import RunningBroker

import teemate
from teemate.cli.main import run as run_command
from teemate.functions import BadArgument, FunctionExists, FunctionLimit, FunctionLimits

PAGE = Path(__file__).parents[2] / "docs" / "functions.md"
HELLO = wasm.printing(b"hello\n", errors=b"a word")


@pytest.fixture
def socket(broker: Callable[..., RunningBroker]) -> str:
    """Of a broker that shares an enclave with functions."""
    attach = f"[[enclave.attach]]\nuid = {os.geteuid()}\n"
    policy = f'[[enclave]]\nname = "functions"\nimage = "{functions_image()}"\n{attach}'
    return broker(policy).socket


@pytest.fixture
def connection(socket: str) -> Iterator[teemate.Broker]:
    with teemate.connect(socket) as connection:
        yield connection


def test_a_function_is_deployed_invoked_looked_at_and_removed(connection: teemate.Broker) -> None:
    functions = connection.functions
    limits = FunctionLimits(memory=1 << 20, fuel=10**7, time=2.5, output=1000)
    info = functions.deploy("hello", HELLO, limits=limits)
    assert (info.name, info.size, info.digest) == ("hello", len(HELLO), hashlib.sha256(HELLO).hexdigest())
    assert info.limits == limits
    assert functions.invoke("hello") == b"hello\n"
    assert functions.invoke("hello", b"not read") == b"hello\n"
    (listed,) = functions.list()
    assert (listed.invocations, listed.failures) == (2, 0)
    assert functions.describe("hello") == listed
    logs = functions.logs("hello")
    assert [(log.invocation, log.outcome, log.text) for log in logs] == [
        (1, "ok", b"a word"),
        (2, "ok", b"a word"),
    ]
    assert [log.invocation for log in functions.logs("hello", after=1)] == [2]
    changed = functions.limits("hello", FunctionLimits(time=1.5))
    assert (changed.limits.time, changed.limits.memory) == (1.5, 1 << 20)
    with pytest.raises(FunctionExists):
        functions.deploy("hello", HELLO)
    replaced = functions.deploy("hello", wasm.printing(b"other"), replace=True)
    assert (info.version, replaced.version) == (1, 2)
    assert functions.invoke("hello") == b"other"
    functions.remove("hello")
    assert functions.list() == []
    for what in (functions.invoke, functions.describe, functions.logs, functions.remove):
        with pytest.raises(teemate.NotFound, match="hello"):
            what("hello")


def test_the_readmes_example_works(socket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"<!-- functions -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.setenv("TEEMATE_SOCKET", socket)
    names = {"module": HELLO}
    exec(compile(example, str(PAGE), "exec"), names)
    with teemate.connect(socket) as connection:
        assert connection.functions.describe("hello").invocations == 1


def test_stdin_arguments_and_environment_reach_the_function(connection: teemate.Broker) -> None:
    functions = connection.functions
    functions.deploy("echo", wasm.echo())
    payload = os.urandom(40_000)
    assert functions.invoke("echo", payload) == payload
    sizes = wasm.i32(0) + wasm.i32(4) + wasm.call("args_sizes_get") + wasm.DROP
    sizes += wasm.i32(8) + wasm.i32(12) + wasm.call("environ_sizes_get") + wasm.DROP
    texts = wasm.i32(1000) + wasm.i32(2000) + wasm.call("args_get") + wasm.DROP
    texts += wasm.i32(1100) + wasm.i32(2100) + wasm.call("environ_get") + wasm.DROP
    functions.deploy("tells", wasm.command(sizes + texts + wasm.write(1, 2000, 200)), env={"DEPLOYED": "1"})
    told = functions.invoke("tells", args=["one", "zwölf"], env={"ASKED": "a=b"})
    assert told[:100].rstrip(b"\0").split(b"\0") == [b"tells", b"one", "zwölf".encode()]
    assert told[100:].rstrip(b"\0").split(b"\0") == [b"DEPLOYED=1", b"ASKED=a=b"]


def test_time_passes_and_randomness_differs(connection: teemate.Broker) -> None:
    clock = wasm.i32(0) + wasm.i64(0) + wasm.i32(0) + wasm.call("clock_time_get") + wasm.DROP
    code = clock + wasm.i32(8) + wasm.i32(16) + wasm.call("random_get") + wasm.DROP + wasm.write(1, 0, 24)
    connection.functions.deploy("now", wasm.command(code))
    first = connection.functions.invoke("now")
    while not int.from_bytes(first[:8], "little"):  # the host tells the time when it has begun to
        first = connection.functions.invoke("now")
    second = connection.functions.invoke("now")
    assert first[8:] != second[8:]
    assert int.from_bytes(first[:8], "little") <= int.from_bytes(second[:8], "little")


def test_a_large_output_is_returned_whole(connection: teemate.Broker) -> None:
    some = b"".join(wasm.write(1, 0, 60_000) for _ in range(50))
    limits = FunctionLimits(output=4 << 20)
    connection.functions.deploy("much", wasm.command(some, data=b"x" * 60_000, pages=2), limits=limits)
    for _ in range(2):
        assert connection.functions.invoke("much") == b"x" * 3_000_000


def test_a_timeout_ends_the_function_and_the_slot_goes_on(connection: teemate.Broker) -> None:
    functions = connection.functions
    functions.deploy("endless", wasm.command(wasm.ENDLESS), limits=FunctionLimits(fuel=1 << 60, time=3600))
    functions.deploy("hello", HELLO)
    with pytest.raises(teemate.CallTimeout):
        functions.invoke("endless", timeout=0.2)
    assert functions.invoke("hello") == b"hello\n"


def test_no_end_of_time_is_a_time_and_a_number_out_of_range_is_refused(
    connection: teemate.Broker,
) -> None:
    limits = FunctionLimits(time=math.inf)
    assert connection.functions.deploy("patient", HELLO, limits=limits).limits.time is not None
    with pytest.raises(BadArgument, match=r"2\^64"):
        connection.functions.logs("patient", after=1 << 64)


def test_the_limit_of_time_ends_it_too(connection: teemate.Broker) -> None:
    limits = FunctionLimits(fuel=1 << 60, time=0.2)
    connection.functions.deploy("endless", wasm.command(wasm.ENDLESS), limits=limits)
    with pytest.raises(FunctionLimit) as caught:
        connection.functions.invoke("endless")
    assert (caught.value.limit, caught.value.maximum) == ("time", 200_000_000)


def test_threads_have_slots_of_their_own(connection: teemate.Broker) -> None:
    functions = connection.functions
    functions.deploy("echo", wasm.echo())
    results: dict[int, list[bytes]] = {}

    def work(number: int) -> None:
        results[number] = [functions.invoke("echo", f"{number} {turn}".encode()) for turn in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [f"{number} {turn}".encode() for turn in range(20)] for number in range(6)}
    assert functions.describe("echo").invocations == 120


def test_a_killed_clients_invocation_leaves_nothing_behind(connection: teemate.Broker, socket: str) -> None:
    functions = connection.functions
    limits = FunctionLimits(fuel=1 << 60, time=3600)
    functions.deploy("endless", wasm.command(wasm.ENDLESS, pages=200), limits=limits)
    functions.deploy("hello", HELLO)
    assert functions.invoke("hello") == b"hello\n"
    before = functions.usage()
    program = (
        "import sys, teemate\n"
        f"functions = teemate.connect({socket!r}).functions\n"
        "functions.invoke('hello'); print('inside', flush=True); functions.invoke('endless')\n"
    )
    for _ in range(3):
        client = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert client.stdout is not None
        assert client.stdout.readline() == b"inside\n"
        while functions.usage().heap_used < before.heap_used + (12 << 20):
            pass  # it is not inside yet
        client.send_signal(signal.SIGKILL)
        client.wait()
        client.stdout.close()
        # It is freed when the broker repairs the slot.
        while functions.usage().heap_used > before.heap_used + (1 << 20):
            pass
    assert functions.usage().blocks_owned == before.blocks_owned
    assert functions.invoke("hello") == b"hello\n"


async def test_the_same_on_trio(socket: str) -> None:
    async with teemate.open_broker(socket) as connection:
        functions = connection.functions
        await functions.deploy("hello", HELLO)
        await functions.deploy("echo", wasm.echo())
        answers: list[bytes] = []

        async def ask(number: int) -> None:
            answers.append(await functions.invoke("echo", str(number).encode()))

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(ask, number)
        assert sorted(answers) == [b"0", b"1", b"2", b"3", b"4"]
        assert [info.name for info in await functions.list()] == ["echo", "hello"]
        assert (await functions.limits("echo", FunctionLimits(fuel=5))).limits.fuel == 5
        with pytest.raises(FunctionLimit):
            await functions.invoke("echo", b"x")
        assert len(await functions.logs("echo")) == 1
        await functions.remove("echo")
        with pytest.raises(teemate.NotFound):
            await functions.describe("echo")
        assert (await functions.usage()).functions == 1


async def test_an_invocation_on_trio_can_be_cancelled(socket: str) -> None:
    async with teemate.open_broker(socket) as connection:
        functions = connection.functions
        limits = FunctionLimits(fuel=1 << 60, time=3600)
        await functions.deploy("endless", wasm.command(wasm.ENDLESS), limits=limits)
        await functions.deploy("hello", HELLO)
        with trio.move_on_after(0.2) as scope:
            await functions.invoke("endless")
        assert scope.cancelled_caught
        assert await functions.invoke("hello") == b"hello\n"


def test_the_command_does_all_of_it(
    socket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    monkeypatch.setenv("TEEMATE_SOCKET", socket)
    monkeypatch.setenv("COLUMNS", "120")
    module = tmp_path / "hello.wasm"
    module.write_bytes(HELLO)
    (tmp_path / "echo.wasm").write_bytes(wasm.echo())
    (tmp_path / "payload").write_bytes(b"of a file")

    def run(*arguments: str, status: int = 0) -> str:
        assert run_command(["fn", *arguments]) == status
        out, err = capsysbinary.readouterr()
        return (err if status else out).decode()

    assert hashlib.sha256(HELLO).hexdigest() in run("deploy", "hello", str(module), "--memory", "1M")
    run("deploy", "echo", str(tmp_path / "echo.wasm"), "--env", "A=b")
    assert run("invoke", "hello") == "hello\n"
    assert run("invoke", "echo", "--file", str(tmp_path / "payload")) == "of a file"
    assert run("invoke", "echo", "text", "--arg", "x", "--env", "C=d", "--timeout", "5") == "text"
    table = run("list")
    assert "hello" in table
    assert "2 functions" in table
    listed = json.loads(run("list", "--json"))
    assert [info["name"] for info in listed["functions"]] == ["echo", "hello"]
    assert "memory 1 MiB" in run("describe", "hello")
    assert json.loads(run("limits", "hello", "--fuel", "5", "--json"))["limits"]["fuel"] == 5
    assert "function-limit" in run("invoke", "hello", status=1)
    assert "limit of fuel" in run("logs", "hello")
    assert json.loads(run("logs", "hello", "--json"))["logs"][0]["text"] == "a word"
    assert "module-invalid" in run("deploy", "bad", str(Path(__file__)), status=1)
    run("remove", "hello", "echo")
    assert json.loads(run("list", "--json"))["functions"] == []
    assert "not-found" in run("invoke", "hello", status=1)
