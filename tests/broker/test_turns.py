"""Equal shares of the broker's thread between users."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from teemate.broker.connections import turns
from teemate.broker.connections.clients import Client
from teemate.broker.connections.connection import Connection
from teemate.broker.connections.turns import SHARE, Rounds, Turn
from teemate.broker.policy.limits import Ledger, Limits
from teemate.broker.telemetry.monitoring import Monitoring


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(turns.time, "perf_counter", clock)
    return clock


def rounds() -> Rounds:
    counted = Rounds()
    trio.lowlevel.add_instrument(counted)
    return counted


async def test_connections_of_a_user_have_their_turn_one_after_another() -> None:
    turn, order = Turn(rounds()), []

    async def connection(number: int) -> None:
        await turn.take()
        order.append(number)
        await trio.lowlevel.checkpoint()
        turn.give_up()

    await turn.take()
    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(connection, number)
            await wait_all_tasks_blocked()
        assert order == []
        turn.give_up()
        await turn.take()
        assert order == [0, 1, 2], "it was handed over: nobody comes in between"
        turn.give_up()


async def test_who_leaves_while_it_waits_is_passed_over() -> None:
    turn = Turn(rounds())
    await turn.take()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turn.take)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    turn.give_up()
    with trio.fail_after(0):
        await turn.take()


async def test_what_connections_use_in_one_round_is_one_share_together(clock: Clock) -> None:
    turn = Turn(rounds())
    await turn.take()
    clock.now += SHARE * 0.6
    assert not turn.over
    turn.give_up()
    await turn.take()
    clock.now += SHARE * 0.6
    assert turn.over
    turn.give_up()
    await trio.lowlevel.checkpoint()
    await turn.take()
    assert not turn.over, "a new round, a new share"


async def test_users_with_many_connections_and_with_one_take_turns(clock: Clock) -> None:
    """As connections do it (connection.py): requests that take a share each, all there at once."""
    counted, answered = rounds(), []
    many, one = Turn(counted), Turn(counted)

    async def connection(turn: Turn, name: str, go: trio.Event) -> None:
        await go.wait()
        await turn.take()
        clock.now += SHARE
        answered.append(name)
        if turn.over:
            await trio.lowlevel.checkpoint()
        turn.give_up()

    go = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(connection, many, "many", go)
        for _ in range(3):
            nursery.start_soon(connection, one, "one", go)
        await wait_all_tasks_blocked()
        go.set()
    for number in range(3):
        assert sorted(answered[2 * number : 2 * number + 2]) == ["many", "one"], answered[:6]


async def test_a_turn_is_given_back_to_the_account_that_it_was_taken_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who resumes over a connection has an account already, which may be another one."""
    service: Any = SimpleNamespace(clients={}, monitoring=Monitoring())
    peer: Any = SimpleNamespace(identity=SimpleNamespace(uid=0), pidfd=-1)
    first, second = (Ledger(Limits()).account(0) for _ in range(2))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        connection = Connection(Client(service, 1, peer, first), ours)
        monkeypatch.setattr(
            connection, "_handle", lambda _packet: setattr(connection.client, "account", second)
        )
        theirs.send(b"hello")
        theirs.close()
        await connection._read_requests()
    for account in (first, second):
        with trio.fail_after(0):
            await account.turn.take()
