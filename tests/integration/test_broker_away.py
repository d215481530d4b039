"""Grants, calls and the trio API while the broker is away; a fake one dies in front of a real one."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from fake_broker import FakeBroker, Upstream, once, running
from processes import wait_until
from running_broker import RunningBroker

import teemate

StartBroker = Callable[..., RunningBroker]


@pytest.fixture
def front(broker: StartBroker, policy: str, tmp_path: Path) -> Iterator[FakeBroker]:
    """The broker that dies; the one behind it grants."""
    upstream = Upstream(broker(policy).socket)
    with upstream.sock, running(FakeBroker(str(tmp_path / "front"), upstream)) as fake:
        yield fake


def mapped(enclave: teemate.Enclave) -> bool:
    """Whether anything is mapped in the enclave's range."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) < enclave.base + enclave.size and int(last, 16) > enclave.base:
            return True
    return False


def die(front: FakeBroker) -> None:
    lives = front.lives
    front.kill()
    wait_until(lambda: front.lives > lives, "it does not die")


def leave(front: FakeBroker, connection: teemate.Broker) -> None:
    """Have the broker go away for a while, and wait until it is noticed."""
    front.listening = False
    die(front)
    connection._connection.listen()
    wait_until(lambda: connection._connection.away, "nobody notices")


# -- the same session ----------------------------------------------------------------------


def test_calls_go_on_while_the_broker_is_away_and_requests_when_it_is_back(front: FakeBroker) -> None:
    with teemate.connect(front.path) as connection, connection.attach("faults") as enclave:
        with enclave.slot() as slot:
            assert slot.call("echo", b"before") == b"before"
            leave(front, connection)
            assert slot.call("echo", b"while it is away") == b"while it is away"
            front.come_back()
            enclave.acquire(2)
            assert slot.call("echo", b"after") == b"after"
        assert enclave.statistics().slots == 3
        enclave.release(3)
    assert front.performed == {"attach": 1, "slots.acquire": 1, "slots.release": 1, "detach": 1}
    assert not front.sessions[0].grants


def test_a_call_that_is_inside_when_the_broker_dies_and_comes_back_notices_nothing(front: FakeBroker) -> None:
    with teemate.connect(front.path) as connection, connection.attach("faults") as enclave:

        def restart(data: bytes) -> bytes:
            die(front)
            connection.ping()
            return data[::-1]

        with enclave.slot() as slot:
            assert slot.call("ocall", b"abc", ocalls={"echo": restart}) == b"cba"
            assert connection._connection.resumes == 1


@pytest.mark.parametrize("point", ["received", "done", "answered"])
def test_an_attach_over_the_brokers_death_is_one_grant_with_its_mapping(
    front: FakeBroker, point: str
) -> None:
    with teemate.connect(front.path) as connection:
        connection.ping()
        front.die = once(point, "attach")
        with connection.attach("faults") as enclave, enclave.slot() as slot:
            connection.ping()
            assert slot.call("echo", b"here") == b"here"
            assert front.sessions[0].grants == {enclave.grant}
    assert front.performed["attach"] == front.performed["detach"] == 1


def test_detaching_does_not_wait_for_a_broker_that_is_away_and_it_hears_of_it(front: FakeBroker) -> None:
    with teemate.connect(front.path) as connection:
        with connection.attach("faults") as enclave:
            leave(front, connection)
        assert not mapped(enclave)
        assert not front.performed["detach"]
        front.come_back()
        wait_until(lambda: front.performed["detach"], "it does not hear of it")


# -- what ended meanwhile --------------------------------------------------------------------


def test_a_grant_that_ended_while_the_broker_was_away_is_revoked_and_unmapped(front: FakeBroker) -> None:
    with teemate.connect(front.path) as connection:
        with connection.attach("faults") as enclave, enclave.slot() as slot:
            slot.call("empty")
            front.sessions[0].grants.clear()
            die(front)
            connection.ping()
            with pytest.raises(teemate.Revoked, match="while the connection was down"):
                slot.call("empty")
            with pytest.raises(teemate.Revoked):
                enclave.acquire()
            wait_until(lambda: not mapped(enclave), "it stays mapped")
        assert not front.performed["detach"]
        assert not front.performed["slots.release"]


def test_a_broker_that_knows_nothing_leaves_enclaves_lost_and_their_addresses_free(front: FakeBroker) -> None:
    with teemate.connect(front.path) as connection:
        with connection.attach("faults") as enclave, enclave.slot() as slot:
            slot.call("empty")
            front.remember = False
            die(front)
            connection.ping()
            with pytest.raises(teemate.EnclaveLost, match="attach again"):
                slot.call("empty")
            wait_until(lambda: not mapped(enclave), "it stays mapped")
            with connection.attach("faults") as again, again.slot() as other:
                assert other.call("echo", b"again") == b"again"
        assert front.performed["detach"] == 1  # of the second: the first number may be another's now


def test_a_call_inside_a_lost_enclave_ends_by_itself_and_then_it_is_unmapped(front: FakeBroker) -> None:
    with teemate.connect(front.path) as connection, connection.attach("faults", slots=2) as enclave:

        def forget(data: bytes) -> bytes:
            front.remember = False
            die(front)
            connection.ping()
            with pytest.raises(teemate.EnclaveLost), enclave.slot():
                pass
            return data[::-1]

        with enclave.slot() as slot:
            assert slot.call("ocall", b"abc", ocalls={"echo": forget}) == b"cba"
            assert mapped(enclave)
            with pytest.raises(teemate.EnclaveLost):
                slot.call("empty")
        assert not mapped(enclave)


def test_the_grace_is_over_for_grants_as_for_requests(front: FakeBroker) -> None:
    front.grace = 0.2
    with teemate.connect(front.path) as connection, connection.attach("faults") as enclave:
        with enclave.slot() as slot:
            slot.call("empty")
            front.listening = False
            die(front)
            with pytest.raises(teemate.ConnectionLost, match="did not come back within resume_grace"):
                connection.ping()
            wait_until(lambda: enclave.gone, "nobody is told")
            with pytest.raises(teemate.EnclaveLost, match="did not come back"):
                slot.call("empty")
        wait_until(lambda: not mapped(enclave), "its calls have left, and it is mapped still")


# -- events -----------------------------------------------------------------------------------


def revoked(grant: int, slots: list[int]) -> dict[str, Any]:
    return {"event": "revoked", "grant": grant, "slots": slots, "deadline": 1.0}


def test_a_revocation_that_is_told_again_is_acknowledged_once_with_what_was_here(front: FakeBroker) -> None:
    with teemate.connect(front.path) as connection, connection.attach("faults", slots=2) as enclave:
        with enclave.slot() as slot:
            slot.call("empty")
            slots = sorted([slot.index, enclave._unopened[0].slot])
        event = revoked(enclave.grant, slots)
        front.say(event)
        wait_until(lambda: front.performed["slots.release"], "it does not acknowledge")
        front.after_hello.append(event)
        die(front)
        connection.ping()
        assert not front.after_hello
        assert front.performed["slots.release"] == 1
        with pytest.raises(teemate.Revoked):
            enclave.acquire()


def test_a_revocation_that_comes_before_the_repeated_answer_to_its_attach_is_heard(front: FakeBroker) -> None:
    with teemate.connect(front.path) as connection:
        connection.ping()
        failed = once("done", "attach")

        def dying(point: str, op: str) -> bool:
            if failed(point, op):
                ((_, outcome),) = front.sessions[0].outcomes.items()
                granted = outcome[0]["ok"]
                front.after_hello.append(
                    revoked(granted["grant"], [slot["slot"] for slot in granted["slots"]])
                )
                return True
            return False

        front.die = dying
        enclave = connection.attach("faults")
        with pytest.raises(teemate.Revoked), enclave.slot():
            pass
        wait_until(lambda: front.performed["slots.release"], "it does not acknowledge")
        enclave.detach()


def test_slots_that_come_after_their_grant_has_ended_are_given_back(front: FakeBroker) -> None:
    with teemate.connect(front.path) as connection, connection.attach("faults") as enclave:
        ended = threading.Event()
        connection._connection.listen()
        request = connection._connection.request

        def late(op: str, *args: Any, **more: Any) -> Any:
            reply = request(op, *args, **more)
            if op == "slots.acquire":
                front.say(revoked(enclave.grant, [enclave._unopened[0].slot]))
                wait_until(lambda: enclave.gone, "nobody hears")
                ended.set()
            return reply

        connection._connection.request = late  # type: ignore[method-assign]
        with pytest.raises(teemate.Revoked):
            enclave.acquire()
        assert ended.is_set()
        wait_until(lambda: front.performed["slots.release"] == 2, "it keeps them")


# -- trio ----------------------------------------------------------------------------------------


async def test_a_task_goes_on_after_the_broker_is_back(front: FakeBroker) -> None:
    async with teemate.open_broker(front.path) as connection:
        await connection.ping()
        for point in ("received", "done", "answered"):
            front.die = once(point, "attach")
            async with connection.attach("faults") as enclave, enclave.slot() as slot:
                assert await slot.call("echo", b"here") == b"here"
                front.die = once(point, "slots.acquire")
                await enclave.acquire()
                front.die = once(point, "slots.release")
                await enclave.release()
    assert front.performed["attach"] == front.performed["detach"] == 3
    assert front.performed["slots.acquire"] == front.performed["slots.release"] == 3


@pytest.mark.parametrize(
    "op", ["attach", "acquire", "release", "ping", "enclaves", "clients", "stats", "destroy"]
)
async def test_a_task_that_waits_for_a_broker_that_is_away_can_be_cancelled(
    front: FakeBroker, op: str
) -> None:
    async with teemate.open_broker(front.path) as connection, connection.attach("faults", slots=2) as enclave:
        leave(front, connection.sync)
        waits: dict[str, Callable[[], Any]] = {
            "attach": lambda: connection.attach("vault").__aenter__(),
            "acquire": enclave.acquire,
            "release": enclave.release,
            "ping": connection.ping,
            "enclaves": connection.enclaves,
            "clients": connection.clients,
            "stats": connection.stats,
            "destroy": lambda: connection.destroy("nothing"),
        }
        with trio.fail_after(10), trio.move_on_after(0.1) as scope:
            await waits[op]()
        assert scope.cancelled_caught
        front.come_back()
        await connection.ping()
    assert front.performed["slots.release"] == (op == "release")


async def test_a_cancelled_program_does_not_wait_for_a_broker_that_is_away(front: FakeBroker) -> None:
    front.grace = 600.0
    with trio.fail_after(20):
        with trio.move_on_after(60) as scope:
            async with teemate.open_broker(front.path) as connection, connection.attach("faults") as enclave:
                leave(front, connection.sync)
                scope.cancel()
                await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not mapped(enclave.sync)


async def test_an_error_in_the_block_comes_out_of_it_although_the_broker_is_away(front: FakeBroker) -> None:
    class OwnError(Exception):
        pass

    async def fail() -> None:
        async with teemate.open_broker(front.path) as connection:
            await connection.ping()
            leave(front, connection.sync)
            raise OwnError

    with trio.fail_after(20), pytest.raises(OwnError):
        await fail()


# -- what callers hear of their own calls ---------------------------------------------------------


def test_a_slot_that_breaks_while_the_broker_is_away_does_not_keep_its_thread_waiting(
    front: FakeBroker,
) -> None:
    with teemate.connect(front.path) as connection, connection.attach("faults", slots=2) as enclave:
        with contextlib.suppress(teemate.EnclaveFault), enclave.slot() as slot:
            slot.call("empty")
            leave(front, connection)
            slot.call("fault_line")
        assert connection._connection.away
        with enclave.slot() as slot:
            assert slot.call("count", struct.pack("<Q", 3))
        front.come_back()
        wait_until(lambda: front.performed["slots.release"] == 1, "the broker does not hear of it")
