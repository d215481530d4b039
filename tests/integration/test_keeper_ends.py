"""The keeper's end ends what it kept: clients hear of it, nothing hangs, a new start works."""

from __future__ import annotations

import os
import signal
import struct
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from processes import wait_until
from running_broker import DEADLINE, RunningBroker

import teemate

StartBroker = Callable[..., RunningBroker]
ONE = struct.pack("<Q", 1)


def is_mapped(enclave: teemate.Enclave) -> bool:
    start = f"{enclave.base:x}-"
    return any(line.startswith(start) for line in Path("/proc/self/maps").read_text().splitlines())


def ping_for_ever(connection: teemate.Broker) -> None:
    while True:
        connection.ping()


def test_when_the_keeper_is_killed_grants_are_lost_and_a_new_start_works(
    broker: StartBroker, policy: str, tmp_path: Path
) -> None:
    first = broker(policy, keeper=True, expect_errors=True)
    with teemate.connect(first.socket) as connection:
        with connection.attach("faults", slots=2) as enclave, enclave.slot() as slot:
            assert slot.call("count", ONE)
            os.kill(first.pid, signal.SIGKILL)
            with pytest.raises(teemate.ConnectionLost):
                ping_for_ever(connection)
            wait_until(lambda: enclave.gone, "nobody is told")
            with pytest.raises(teemate.EnclaveLost, match="attach again"):
                slot.call("count", ONE)
            wait_until(lambda: not is_mapped(enclave), "it stays mapped")
            with pytest.raises(teemate.EnclaveLost):
                enclave.acquire()
        second = broker(policy, keeper=True)
        with teemate.connect(second.socket) as again, again.attach("faults") as anew, anew.slot() as slot:
            assert slot.call("count", ONE) == ONE  # another enclave, at the same address


async def for_ever(function: Callable[[], Awaitable[object]]) -> None:
    while True:
        await function()


@pytest.mark.parametrize("victims", ["keeper", "keeper and worker", "worker and keeper"])
def test_a_process_that_is_inside_all_the_time_hears_of_the_keepers_end(
    broker: StartBroker, policy: str, victims: str
) -> None:
    running = broker(
        policy.replace("[administrators]", "[broker]\nresume_grace = 1\n[administrators]"),
        keeper=True,
        expect_errors=True,
    )
    with teemate.connect(running.socket) as connection, connection.attach("faults") as enclave:
        inside, leave = threading.Event(), threading.Event()
        answers: list[bytes] = []

        def stay(data: bytes) -> bytes:
            inside.set()
            assert leave.wait(DEADLINE)
            return data

        def call() -> None:
            with enclave.slot() as slot:
                slot.call("count", ONE)
                answers.append(slot.call("ocall", b"stay", ocalls={"echo": stay}))

        thread = threading.Thread(target=call)
        thread.start()
        assert inside.wait(DEADLINE)
        pids = {"keeper": running.pid, "worker": running.worker()}
        for victim in victims.split(" and "):
            os.kill(pids[victim], signal.SIGKILL)
        wait_until(lambda: isinstance(enclave.gone, teemate.EnclaveLost), "the listener does not hear of it")
        assert is_mapped(enclave)
        leave.set()
        thread.join(DEADLINE)
        assert answers == [b"stay"]
        assert not is_mapped(enclave)


async def test_tasks_hear_of_the_keepers_end(broker: StartBroker, policy: str) -> None:
    running = broker(policy, keeper=True, expect_errors=True)
    async with teemate.open_broker(running.socket) as connection:
        async with connection.attach("faults") as enclave, enclave.slot() as slot:
            await slot.call("count", ONE)
            os.kill(running.pid, signal.SIGKILL)
            with pytest.raises(teemate.ConnectionLost):
                await for_ever(connection.ping)
            wait_until(lambda: enclave.sync.gone, "nobody is told")
            with pytest.raises(teemate.EnclaveLost):
                await for_ever(lambda: slot.call("count", ONE))
