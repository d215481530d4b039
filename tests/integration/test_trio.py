"""The same names on trio."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
import trio
from running_broker import RunningBroker

import teemate

StartBroker = Callable[..., RunningBroker]


async def test_attach_and_call(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    async with teemate.open_broker(running.socket, client="trio") as connection:
        await connection.ping()
        assert {info.name for info in await connection.enclaves()} == {"vault", "faults"}
        async with connection.attach("vault", slots=2) as enclave:
            async with enclave.slot() as one, enclave.slot() as two:
                assert one.index != two.index
                assert await one.call("echo", b"one") == b"one"
                assert await two.call("echo", b"two") == b"two"
            names = [client.name for client in await connection.clients()]
            assert names == ["trio"]
        assert await connection.stats()


async def test_tasks_are_inside_at_the_same_time(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    async with teemate.open_broker(running.socket) as connection:
        async with connection.attach("faults", slots=4) as enclave:
            answers: list[bytes] = []

            async def wait_for(count: int) -> None:
                async with enclave.slot() as slot:
                    answers.append(await slot.call("await", struct.pack("<Q", count), timeout=60))

            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(wait_for, 7)
                async with enclave.slot() as slot:
                    await slot.call("raise", struct.pack("<Q", 7))
            assert answers == [struct.pack("<Q", 7)] * 3


async def cancel_when_inside(enclave: teemate.AsyncEnclave, scope: trio.CancelScope) -> None:
    """A call that is paused has begun."""
    while not enclave.statistics().pauses:  # noqa: ASYNC110 - nobody tells of it
        await trio.sleep(0.001)
    scope.cancel()


async def test_a_cancelled_call_is_abandoned_and_its_slot_repaired(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    async with teemate.open_broker(running.socket) as connection:
        async with connection.attach("faults", slots=2) as enclave:
            async with enclave.slot() as slot:
                async with trio.open_nursery() as nursery:
                    with trio.CancelScope() as scope:
                        nursery.start_soon(cancel_when_inside, enclave, scope)
                        await slot.call("loop")
                assert scope.cancelled_caught
                assert slot.broken is not None
            statistics = enclave.statistics()
            assert (statistics.slots, statistics.abandoned) == (1, 1)
            async with enclave.slot() as slot:
                assert await slot.call("echo", b"on") == b"on"
        with trio.fail_after(30):
            while True:
                (faults,) = [info for info in await connection.enclaves() if info.name == "faults"]
                if not faults.slots.used and not faults.slots.withheld:
                    break
        assert faults.slots.quarantined == 0


async def test_a_cancelled_attach_gives_back_what_it_would_have_got(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    async with teemate.open_broker(running.socket) as connection:
        async with connection.attach("vault", slots=8):
            async with teemate.open_broker(running.socket) as other:
                with trio.move_on_after(0.1) as scope:
                    async with other.attach("vault", slots=8, wait=60):
                        pass
                assert scope.cancelled_caught
                await other.ping()
        with trio.fail_after(30):
            await settled(connection)


async def settled(connection: teemate.AsyncBroker) -> None:
    """Return when all slots of the vault are free."""
    while True:
        (vault,) = [info for info in await connection.enclaves() if info.name == "vault"]
        if vault.slots.free == vault.slots.total and not vault.slots.waiting:
            return


async def test_errors_have_their_types(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    async with teemate.open_broker(running.socket) as connection:
        with pytest.raises((teemate.NotFound, teemate.Denied)):
            async with connection.attach("nothing"):
                pass
        async with connection.attach("faults") as enclave, enclave.slot() as slot:
            with pytest.raises(teemate.CallTimeout):
                await slot.call("loop", timeout=0.05)
