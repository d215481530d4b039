"""Who comes in next when many want to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hostile import Lingering, send_with
from raw_client import TIMEOUT

from teemate import wire
from teemate.broker.connections import door as door_module
from teemate.broker.connections.door import Door
from teemate.broker.policy.limits import Ledger, Limits
from teemate.broker.server import bind

VICTIM, ATTACKER = 4000, 4001
FULL, SCARCE = b"your line is full", b"no descriptors"
MANY = 1 << 20


class Clock:
    """Time that stands still, so that no tokens come."""

    def __call__(self) -> float:
        return 0.0


class World:
    """A door, and connections that are made to it."""

    def __init__(self, folder: Path, cleanup: ExitStack, limits: Limits, reserved: int) -> None:
        self._cleanup = cleanup
        self._path = str(folder / "sock")
        self.listener = cleanup.enter_context(bind(self._path, mode=0o666, gid=None))
        self.disposed: list[int] = []
        self.door = Door(
            Ledger(limits, Clock()),
            [self.listener],
            full=FULL,
            scarce=SCARCE,
            dispose=self.disposed.extend,
            reserved=reserved,
            limit=MANY,
        )
        cleanup.callback(self._close)

    def _close(self) -> None:
        self.door.close()
        for fd in self.disposed:
            os.close(fd)

    def connect(self, uid: int, count: int = 1) -> list[socket.socket]:
        """Make connections of the user; they are in the kernel's queue."""
        os.seteuid(uid)
        try:
            made = []
            for _ in range(count):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                made.append(self._cleanup.enter_context(sock))
                sock.settimeout(TIMEOUT)
                sock.connect(self._path)
            return made
        finally:
            os.seteuid(0)

    def let_in(self, most: int = MANY, now: float = 0.0) -> list[int]:
        """Let in whom the door has; returns the users, the first first."""
        users = []
        while len(users) < most and (caller := self.door.take(now)) is not None:
            self._cleanup.enter_context(caller.sock)
            users.append(caller.uid)
        return users


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="tm-")))
        folder.chmod(0o755)  # other users connect

        def make(*, reserved: int = MANY, **limits: Any) -> World:
            return World(folder, cleanup, Limits(**limits), reserved)

        yield make


def test_one_connection_is_let_in_before_a_thousand_that_came_earlier(world: Callable[..., World]) -> None:
    there = world(connections=2000)
    there.connect(ATTACKER, 1000)
    there.connect(VICTIM)
    there.door.look()
    assert VICTIM in there.let_in(2)
    assert there.door.statistics().waiting == 999


def test_lines_take_turns(world: Callable[..., World]) -> None:
    there = world(connections=100)
    for uid in (1, 2, 3):
        there.connect(uid, 4)
    there.door.look()
    assert there.let_in() == [1, 2, 3] * 4


def test_a_user_has_as_many_in_line_as_it_may_have_connections_and_others_notice_nothing(
    world: Callable[..., World],
) -> None:
    there = world(connections=8)
    attackers = there.connect(ATTACKER, 20)
    (victim,) = there.connect(VICTIM)
    there.door.look()
    assert there.door.statistics().waiting == 9
    assert there.let_in().count(ATTACKER) == 8
    assert [sock.recv(100) for sock in attackers[8:]] == [FULL] * 12
    assert [sock.recv(100) for sock in attackers[8:]] == [b""] * 12
    assert there.door.unlucky() == {ATTACKER: 12}
    assert there.door.unlucky() == {}
    victim.setblocking(False)
    with pytest.raises(BlockingIOError):
        victim.recv(100)


def test_who_comes_again_and_again_waits_for_tokens_and_others_do_not(world: Callable[..., World]) -> None:
    there = world(connections=100, requests_per_second=60.0, burst=12)
    there.connect(ATTACKER, 10)
    there.door.look()
    assert there.let_in() == [ATTACKER] * 2, "12 tokens, 6 for each"
    there.connect(VICTIM)
    there.door.look()
    assert there.let_in() == [VICTIM]
    assert there.let_in(now=0.0999) == []
    assert there.let_in(now=0.1001) == [ATTACKER]


def test_of_the_last_descriptors_each_user_gets_one(world: Callable[..., World]) -> None:
    there = world(reserved=0, connections=100)
    attackers = there.connect(ATTACKER, 3)
    there.connect(VICTIM)
    there.door.look()
    assert there.let_in() == [ATTACKER, VICTIM]
    assert [sock.recv(100) for sock in attackers[1:]] == [SCARCE] * 2


def test_what_was_sent_with_a_connection_that_is_turned_away_does_not_hide_the_reason(
    world: Callable[..., World],
) -> None:
    there = world(connections=1)
    there.connect(ATTACKER)
    speaking, empty, gone = there.connect(ATTACKER, 3)
    speaking.send(b"hello")
    speaking.send(b"and more")
    empty.send(b"")
    gone.close()
    there.door.look()
    assert [speaking.recv(100), speaking.recv(100)] == [FULL, b""]
    assert [empty.recv(100), empty.recv(100)] == [FULL, b""]
    assert there.disposed == []


def test_a_connection_with_a_lingering_socket_unread_in_it_is_not_closed_here(
    world: Callable[..., World],
) -> None:
    there = world(connections=1)
    there.connect(ATTACKER)
    (sender,) = there.connect(ATTACKER)
    bomb = Lingering()
    try:
        sender.send(b"")
        send_with(sender, b"x", [bomb.fileno()])
        bomb.abandon()
        there.door.look()
        assert sender.recv(100) == FULL
        assert len(there.disposed) == 1
    finally:
        bomb.close()


# ---- the watch ----------------------------------------------------------------------


@contextmanager
def flooded(there: World) -> Iterator[list[socket.socket]]:
    """A line that is full, so that the watch has begun."""
    attackers = there.connect(ATTACKER, 2)
    there.door.look()
    assert there.door.statistics().watched
    yield attackers


async def test_in_a_flood_the_watch_turns_away_without_the_brokers_thread(
    world: Callable[..., World],
) -> None:
    there = world(connections=1)
    with flooded(there):
        (more,) = there.connect(ATTACKER)
        assert more.recv(100) == FULL, "nobody called look() since it came"
        there.connect(VICTIM)
        with trio.fail_after(TIMEOUT):
            await there.door.wait()
        there.door.look()
        assert there.let_in() == [ATTACKER, VICTIM]


async def test_the_watch_ends_when_nobody_was_turned_away_for_a_while(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door_module, "_QUIET", 0.01)
    there = world(connections=1)
    with flooded(there):
        with trio.fail_after(TIMEOUT):
            while there.door.statistics().watched:
                await there.door.wait()
                there.door.look()
        there.let_in()
        there.connect(VICTIM)
        with trio.fail_after(TIMEOUT):
            await there.door.wait()
        there.door.look()
        assert there.let_in() == [VICTIM]
        there.connect(ATTACKER, 2)
        there.door.look()
        assert there.door.statistics().watched, "and begins again"


def test_a_door_that_is_closed_during_the_watch_leaves_nobody_waiting(world: Callable[..., World]) -> None:
    there = world(connections=1)
    with flooded(there) as attackers:
        there.door.close()
        assert len(there.disposed) == 1
        assert attackers[1].recv(100) == FULL
        there.door = world_without_door()


def world_without_door() -> Any:
    class Closed:
        def close(self) -> None:
            pass

    return Closed()


def test_the_messages_of_the_server_are_errors_of_the_protocol() -> None:
    from teemate.broker.server import _full, _message

    decoded = wire.decode(_message(_full(512)))
    assert decoded["id"] is None
    assert decoded["error"]["detail"]["setting"] == "[limits] connections"


KEEPS_ITS_POLICY = """
import os, sys
from teemate.broker.connections.door import be_prompt
try:
    os.sched_setscheduler(0, int(sys.argv[1]), os.sched_param(int(sys.argv[1]) != os.SCHED_BATCH))
except PermissionError:
    sys.exit("not allowed")
be_prompt()
print(os.sched_getscheduler(0))
"""


@pytest.mark.parametrize("policy", [os.SCHED_BATCH, os.SCHED_RR])
def test_a_broker_that_was_given_a_scheduling_policy_keeps_it(policy: int) -> None:
    command = [sys.executable, "-c", KEEPS_ITS_POLICY, str(policy)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "not allowed" in done.stderr:
        pytest.skip("this user may not set a real-time policy")
    assert (done.stdout, done.stderr) == (f"{policy}\n", "")
