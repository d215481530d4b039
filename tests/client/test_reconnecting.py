"""The connection over deaths of the broker, at every point of an exchange; the broker is a fake one."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_broker import DEADLINE, FakeBroker, once, running
from processes import wait_until

from teemate import _resume
from teemate._connection import Connection
from teemate._requests import Reply
from teemate.errors import ConnectionLost, Denied, EnclaveLost, LimitReached, NotAttached

POINTS = ["received", "done", "answered"]
GRANT = {"grant": 1}
OPERATIONS: dict[str, dict[str, object]] = {
    "attach": {"enclave": "vault"},
    "slots.acquire": GRANT,
    "slots.release": {**GRANT, "slots": [3]},
    "detach": GRANT,
    "ping": {},
    "create": {"name": "new"},
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[FakeBroker]:
    with running(FakeBroker(str(tmp_path / "socket"))) as broker:
        yield broker


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "image"
    path.write_bytes(b"an image")
    with path.open("rb") as file:
        yield file.fileno()


@contextlib.contextmanager
def connected(broker: FakeBroker) -> Iterator[Connection]:
    with contextlib.closing(Connection(broker.path)) as connection:
        yield connection


def ping_for_ever(connection: Connection) -> None:
    while True:
        connection.request("ping")


def ask_until_closed(connection: Connection, caught: list[ConnectionLost]) -> None:
    try:
        ping_for_ever(connection)
    except ConnectionLost as error:
        caught.append(error)


def acquire_until_away(connection: Connection) -> None:
    while True:
        connection.request("slots.acquire", GRANT, check=stopping_when(lambda: connection.away))


def ask(connection: Connection, op: str, image: int) -> Reply:
    """Make one request as the API does."""
    fds = (image,) if op == "create" else ()
    session = 1 if "grant" in OPERATIONS[op] else None
    return connection.request(op, OPERATIONS[op], fds=fds, session=session)


# -- the end of the broker at every point of an exchange ------------------------------


@pytest.mark.parametrize("listening", [False, True], ids=["", "listener"])
@pytest.mark.parametrize("op", list(OPERATIONS))
@pytest.mark.parametrize("point", POINTS)
def test_a_request_is_answered_and_done_once_wherever_the_broker_dies(
    broker: FakeBroker, image: int, op: str, point: str, listening: bool
) -> None:
    with connected(broker) as connection:
        connection.request("attach", {"enclave": "vault"})
        if listening:
            connection.listen()
        broker.performed.clear()
        broker.die = once(point, op)
        reply = ask(connection, op, image)
        connection.request("ping")
        assert broker.lives == 2
        if op == "create":
            assert reply.ok["bytes"] == b"an image"
        if op != "ping":
            assert broker.performed[op] == 1
        assert not connection._unanswered
        assert reply.session == 1


@pytest.mark.parametrize("first", ["attach", "ping", "create"])
@pytest.mark.parametrize(
    ("point", "at"),
    [
        ("accepted", ""),
        ("received", "hello"),
        ("done", "hello"),
        ("answered", "hello"),
        ("received", ""),
        ("done", ""),
        ("answered", ""),
    ],
)
def test_the_first_request_of_all_is_done_once_wherever_the_broker_dies(
    broker: FakeBroker, image: int, first: str, point: str, at: str
) -> None:
    broker.die = once(point, at if at or point == "accepted" else first)
    with connected(broker) as connection:
        ask(connection, first, image)
        if first != "ping":
            assert broker.performed[first] == 1
        connection.request("ping")
    assert broker.lives == 2
    assert len(broker.sessions) <= 2


@pytest.mark.parametrize("point", ["accepted", *POINTS])
def test_a_broker_that_dies_again_while_it_greets_is_greeted_again(broker: FakeBroker, point: str) -> None:
    with connected(broker) as connection:
        connection.request("attach", {"enclave": "vault"})
        deaths = [("received", "detach"), *[(point, "" if point == "accepted" else "hello")] * 3]

        def die(at: str, op: str) -> bool:
            if deaths and (at, op) == deaths[0]:
                deaths.pop(0)
                return True
            return False

        broker.die = die
        connection.request("detach", GRANT, session=1)
        assert broker.performed["detach"] == 1
        assert not deaths
        assert len(broker.sessions) == 1


def test_every_token_is_followed_by_another_and_ids_are_never_used_again(broker: FakeBroker) -> None:
    with connected(broker) as connection:
        for round_ in range(5):
            connection.request("attach", {"enclave": "vault"})
            broker.die = once("done", "ping")
            connection.request("ping")
            assert broker.lives == round_ + 2
    asked = [number for number, op in broker.asked if op == "attach"]
    assert len(set(asked)) == len(asked) == 5
    tokens = [hello.get("resume", hello.get("session")) for hello in broker.hellos]
    assert len(set(tokens)) == len(tokens) == 6


def test_requests_of_many_threads_are_answered_each_once_over_many_deaths(
    broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_resume, "SETTLED", 0.0)  # it dies very often
    threads, rounds = 8, 25
    count = [0]

    def die(_point: str, op: str) -> bool:
        count[0] += op != "hello"
        return op != "hello" and count[0] % 37 == 0

    broker.die = die
    grants: list[int] = []
    failures: list[BaseException] = []

    def work(connection: Connection) -> None:
        try:
            for _ in range(rounds):
                grant = connection.request("attach", {"enclave": "vault"}).ok["grant"]
                grants.append(grant)
                connection.request("slots.acquire", {"grant": grant}, session=1)
                connection.tell("slots.release", {"grant": grant, "slots": [1]}, 1)
                connection.request("detach", {"grant": grant}, session=1)
        except BaseException as error:
            failures.append(error)

    with connected(broker) as connection:
        running = [threading.Thread(target=work, args=(connection,)) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(DEADLINE)
        broker.die = lambda _point, _op: False
        connection.request("ping")
        assert not failures
        assert not connection._unanswered
    assert broker.lives > 5
    assert len(set(grants)) == threads * rounds
    for op in ("attach", "slots.acquire", "slots.release", "detach"):
        assert broker.performed[op] == threads * rounds
    assert not broker.sessions[0].grants


# -- who reconnects ---------------------------------------------------------------------


@pytest.mark.parametrize("spare", [True, False], ids=["descriptors to spare", "none to spare"])
def test_a_process_that_asks_nothing_comes_back_by_its_listener(
    broker: FakeBroker, monkeypatch: pytest.MonkeyPatch, spare: bool
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    if not spare:
        monkeypatch.setattr("teemate._connection.os.eventfd", none_left)
    with connected(broker) as connection:
        connection.request("attach", {"enclave": "vault"})
        connection.listen()
        broker.kill()
        wait_until(lambda: connection.resumes == 1, "nobody came back")
        assert len(broker.hellos) == 2


def test_a_process_without_a_listener_comes_back_with_its_next_request(broker: FakeBroker) -> None:
    with connected(broker) as connection:
        others = set(threading.enumerate())
        connection.request("attach", {"enclave": "vault"})
        broker.kill()
        wait_until(lambda: broker.lives == 2, "it does not die")
        assert set(threading.enumerate()) <= others, "the library has started one of its own"
        connection.request("detach", GRANT, session=1)
        assert not broker.sessions[0].grants


def test_the_socket_may_be_away_for_a_while(broker: FakeBroker) -> None:
    with connected(broker) as connection:
        connection.request("attach", {"enclave": "vault"})
        broker.listening = False
        broker.kill()
        wait_until(lambda: not os.path.exists(broker.path), "the socket stays")
        asking = threading.Thread(target=connection.request, args=("ping",))
        asking.start()
        wait_until(lambda: connection.away and connection._absence.next_try, "nobody notices")  # type: ignore[union-attr]
        broker.come_back()
        asking.join(DEADLINE)
        assert not asking.is_alive()
        assert connection.resumes == 1


def test_a_socket_whose_queue_is_full_is_tried_again(tmp_path: Path) -> None:
    path = str(tmp_path / "full")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as full, contextlib.ExitStack() as others:
        full.bind(path)
        full.listen(0)
        connection = Connection(path)
        asking = threading.Thread(target=ask_until_closed, args=(connection, []))
        asking.start()
        accepted, _ = full.accept()
        with contextlib.suppress(BlockingIOError):
            while True:
                other = others.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                other.setblocking(False)
                other.connect(path)
        accepted.close()
        wait_until(lambda: connection._absence and connection._absence._pause > 0.05, "nobody tries")
        connection.close()
        asking.join(DEADLINE)
        assert not asking.is_alive()


# -- giving up --------------------------------------------------------------------------


def test_a_broker_that_never_comes_back_is_given_up_after_the_grace(broker: FakeBroker) -> None:
    broker.grace = 0.3
    why: list[str] = []
    with connected(broker) as connection:
        connection.on_forgotten = why.append
        connection.request("attach", {"enclave": "vault"})
        connection.listen()
        broker.listening = False
        broker.kill()
        with pytest.raises(ConnectionLost, match=r"did not come back within resume_grace = 0\.3 s") as caught:
            ping_for_ever(connection)
        assert caught.value.detail["resume_grace"] == 0.3
        assert connection.lost
        wait_until(lambda: why, "nobody hears of it")
        with pytest.raises(ConnectionLost):
            connection.request("ping")


def test_a_broker_that_accepts_and_never_greets_is_given_up_after_the_grace(broker: FakeBroker) -> None:
    broker.grace = 0.3
    with connected(broker) as connection:
        connection.request("ping")
        broker.answering = lambda op: op != "hello"
        broker.kill()
        with pytest.raises(ConnectionLost, match="did not come back"):
            ping_for_ever(connection)


def test_without_a_store_the_end_is_told_at_once(broker: FakeBroker) -> None:
    broker.store = False
    with connected(broker) as connection:
        connection.request("attach", {"enclave": "vault"})
        broker.kill()
        with pytest.raises(ConnectionLost, match=r"ended|closed the connection|broke"):
            ping_for_ever(connection)
        assert len(broker.hellos) == 1


def test_a_broker_that_dies_before_it_has_greeted_and_leaves_no_socket_is_gone(broker: FakeBroker) -> None:
    broker.listening = False
    broker.die = once("received", "hello")
    with connected(broker) as connection:
        with pytest.raises(ConnectionLost, match="ended before it had greeted us"):
            connection.request("ping")


def test_what_a_broker_says_before_it_closes_is_no_reason_to_come_back(broker: FakeBroker) -> None:
    with connected(broker) as connection:
        connection.request("ping")
        broker.say({"id": None, "error": {"code": "denied", "message": "go away"}})
        broker.kill()
        with pytest.raises(Denied, match="go away"):
            ping_for_ever(connection)
        assert len(broker.hellos) == 1


def test_a_broker_that_has_no_room_yet_is_asked_again(broker: FakeBroker) -> None:
    with connected(broker) as connection:
        connection.request("attach", {"enclave": "vault"})
        broker.refusal = {"code": "limit-reached", "message": "[limits] connections = 4"}
        broker.kill()
        asking = threading.Thread(target=connection.request, args=("ping",))
        asking.start()
        wait_until(lambda: connection._absence and connection._absence.refusal, "nobody is refused")
        assert isinstance(connection._absence.refusal, LimitReached)  # type: ignore[union-attr]
        broker.refusal = None
        asking.join(DEADLINE)
        assert not asking.is_alive()
        assert connection.resumes == 1


# -- a broker that knows nothing ----------------------------------------------------------


@pytest.mark.parametrize("op", ["slots.acquire", "slots.release", "detach"])
def test_a_request_about_a_grant_is_not_made_of_a_broker_that_does_not_know_it(
    broker: FakeBroker, image: int, op: str
) -> None:
    why: list[str] = []
    broker.remember = False
    with connected(broker) as connection:
        connection.on_forgotten = why.append
        connection.request("attach", {"enclave": "vault"})
        broker.performed.clear()
        broker.die = once("received", op)
        with pytest.raises(EnclaveLost, match="attach again"):
            ask(connection, op, image)
        with pytest.raises(EnclaveLost):  # another grant may have this number now
            ask(connection, op, image)
        assert not broker.performed[op]
        assert len(why) == 1
        reply = connection.request("attach", {"enclave": "vault"})
        assert reply.session == 2
        connection.request("detach", {"grant": reply.ok["grant"]}, session=reply.session)


def test_an_attach_is_made_of_whatever_broker_there_is(broker: FakeBroker) -> None:
    broker.remember = False
    with connected(broker) as connection:
        connection.request("ping")
        broker.die = once("done", "attach")
        reply = connection.request("attach", {"enclave": "vault"})
        assert broker.sessions[-1].grants == {reply.ok["grant"]}


def test_a_creation_whose_outcome_is_not_known_is_not_done_again(broker: FakeBroker, image: int) -> None:
    broker.remember = False
    with connected(broker) as connection:
        connection.request("ping")
        broker.die = once("done", "create")
        with pytest.raises(ConnectionLost, match="whether it was done is not known"):
            ask(connection, "create", image)
        assert broker.performed["create"] == 1


def test_a_broker_that_has_lost_its_store_as_well_is_still_a_broker(broker: FakeBroker) -> None:
    with connected(broker) as connection:
        connection.request("attach", {"enclave": "vault"})
        broker.remember = broker.store = False
        broker.kill()
        assert connection.request("attach", {"enclave": "vault"}).session == 2
        broker.kill()
        with pytest.raises(ConnectionLost):
            ping_for_ever(connection)


def test_it_hears_which_grants_are_left(broker: FakeBroker) -> None:
    left: list[frozenset[int]] = []
    with connected(broker) as connection:
        connection.on_resumed = left.append
        connection.request("attach", {"enclave": "vault"})
        connection.request("attach", {"enclave": "vault"})
        broker.sessions[0].grants.remove(1)
        broker.kill()
        wait_until(lambda: broker.lives == 2, "it does not die")
        connection.request("ping")
    assert left == [frozenset({2})]


# -- callers who go -------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818
    """What a caller's check raises."""


def stopping_when(condition: Callable[[], object]) -> Callable[[], None]:
    def check() -> None:
        if condition():
            raise Stop

    return check


@pytest.mark.parametrize("listening", [False, True], ids=["", "listener"])
def test_who_waits_for_a_broker_that_is_away_can_be_cancelled(broker: FakeBroker, listening: bool) -> None:
    with connected(broker) as connection:
        connection.request("attach", {"enclave": "vault"})
        if listening:
            connection.listen()
        broker.listening = False
        broker.kill()
        with pytest.raises(Stop):
            acquire_until_away(connection)
        broker.come_back()
        connection.request("ping")
        # Nobody wants it any more, and the broker never heard of it before.
        assert ("slots.acquire" not in [op for _, op in broker.asked[-2:]]) or broker.performed[
            "slots.acquire"
        ]


def test_what_a_cancelled_request_was_granted_is_given_back_after_the_broker_is_back(
    broker: FakeBroker,
) -> None:
    undone: list[Reply] = []
    with connected(broker) as connection:
        connection.request("ping")
        broker.answering = lambda op: op != "attach"
        broker.die = once("done", "attach")
        broker.listening = False
        with pytest.raises(Stop):
            connection.request(
                "attach",
                {"enclave": "vault"},
                undo=undone.append,
                check=stopping_when(lambda: connection.away),
            )
        broker.answering = lambda _op: True
        broker.come_back()
        connection.request("ping")
        assert [reply.ok for reply in undone] == [GRANT]
        assert broker.performed["attach"] == 1


def test_the_image_of_a_cancelled_creation_is_kept_until_it_is_answered(
    broker: FakeBroker, tmp_path: Path
) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"kept")
    undone: list[Reply] = []
    with connected(broker) as connection:
        connection.request("ping")
        broker.die = once("received", "create")
        broker.listening = False
        with path.open("rb") as file, pytest.raises(Stop):
            connection.request(
                "create",
                {"name": "x"},
                fds=(file.fileno(),),
                undo=undone.append,
                check=stopping_when(lambda: connection.away),
            )
        wait_until(lambda: len(open_descriptors(path)) == 1, "it is not kept")
        broker.come_back()
        connection.request("ping")
        assert [reply.ok["bytes"] for reply in undone] == [b"kept"]
        assert not open_descriptors(path)


def open_descriptors(path: Path) -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(int(name)), path.stat()):
                found.append(int(name))
    return found


def test_what_is_given_back_while_the_broker_is_away_does_not_wait_and_arrives(broker: FakeBroker) -> None:
    with connected(broker) as connection:
        connection.request("attach", {"enclave": "vault"})
        connection.listen()
        broker.listening = False
        broker.kill()
        wait_until(lambda: connection.away, "nobody notices")
        connection.tell("slots.release", {**GRANT, "slots": [1]}, 1)
        connection.post("slots.release", {**GRANT, "slots": [2]}, 1)
        assert not broker.performed["slots.release"]
        broker.come_back()
        wait_until(lambda: broker.performed["slots.release"] == 2, "it does not arrive")


def test_closing_waits_until_a_broker_that_is_away_knows_what_was_given_back(broker: FakeBroker) -> None:
    connection = Connection(broker.path)
    connection.request("attach", {"enclave": "vault"})
    broker.listening = False
    broker.kill()
    wait_until(lambda: not os.path.exists(broker.path), "the socket stays")
    connection.post("detach", GRANT, 1)  # EPIPE, or kept: nobody has read the end yet
    closing = threading.Thread(target=connection.close)
    closing.start()
    wait_until(lambda: connection.away, "it does not wait")
    broker.come_back()
    closing.join(DEADLINE)
    assert not closing.is_alive()
    assert broker.performed["detach"] == 1
    assert connection.lost


@pytest.mark.parametrize("listening", [False, True], ids=["", "listener"])
def test_closing_while_the_broker_is_away_ends_who_waits(broker: FakeBroker, listening: bool) -> None:
    connection = Connection(broker.path)
    connection.request("ping")
    if listening:
        connection.listen()
    broker.listening = False
    broker.kill()
    caught: list[ConnectionLost] = []
    asking = threading.Thread(target=ask_until_closed, args=(connection, caught))
    asking.start()
    wait_until(lambda: connection.away, "nobody notices")
    connection.close()
    asking.join(DEADLINE)
    assert "closed by this program" in str(caught[0])
    wait_until(lambda: connection._socket is None, "the socket stays open")


def test_a_connection_that_is_closed_while_it_waits_for_the_greeting_leaves_no_socket(
    broker: FakeBroker,
) -> None:
    connection = Connection(broker.path)
    connection.request("ping")
    connection.listen()
    broker.answering = lambda op: op != "hello"
    broker.kill()
    wait_until(lambda: connection._absence and connection._absence.dialled, "nobody dials")
    connection.close()
    wait_until(lambda: connection._socket is None, "the socket stays open")


# -- fork -------------------------------------------------------------------------------------


def test_a_child_of_fork_does_not_come_back_in_its_parents_name(broker: FakeBroker) -> None:
    with connected(broker) as connection:
        connection.request("attach", {"enclave": "vault"})
        broker.kill()
        wait_until(lambda: broker.lives == 2, "it does not die")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for attempt in (connection.request, lambda op: connection.post(op, GRANT, 1)):
                    with contextlib.suppress(NotAttached):
                        attempt("ping")
                        os._exit(2)
                connection.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(broker.hellos) == 1
        connection.request("detach", GRANT, session=1)
        assert broker.performed["detach"] == 1


@pytest.mark.parametrize("state", ["away", "greeting"])
def test_a_child_that_is_forked_during_an_absence_holds_nothing_and_the_parent_goes_on(
    broker: FakeBroker, state: str
) -> None:
    with connected(broker) as connection:
        connection.request("attach", {"enclave": "vault"})
        connection.listen()
        if state == "away":
            broker.listening = False
        else:
            broker.answering = lambda op: op != "hello"
        broker.kill()
        wait_until(
            lambda: connection._absence and (state == "away" or connection._absence.dialled),
            "nobody notices",
        )
        child = os.fork()
        if child == 0:
            status = 1
            try:
                connection.request("ping")
            except NotAttached:
                connection.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        broker.answering = lambda _op: True
        if state == "away":
            broker.come_back()
        else:
            broker.kill()
        connection.request("detach", GRANT, session=1)
        assert broker.performed["detach"] == 1


# -- the pauses --------------------------------------------------------------------------------


def test_the_pauses_between_tries_grow_and_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    absence = _resume.Absence(30.0, None)
    pauses = [absence.next_try - now[0]]
    for _ in range(8):
        absence.failed("no")
        pauses.append(round(absence.next_try - now[0], 3))
    assert pauses == [0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5]
    absence.over = now[0]
    again = _resume.Absence(30.0, absence)  # it greeted us, and ended at once
    assert again.next_try - now[0] == 0.5
    now[0] += 1
    assert _resume.Absence(30.0, absence).next_try == now[0]


def test_many_requests_that_the_socket_does_not_take_at_once_are_all_answered(broker: FakeBroker) -> None:
    """Neither side may wait for the other to read: both would for ever."""
    count = 400
    big: dict[str, Any] = {"enclave": "v" * 2000}
    answers: list[int] = []
    with connected(broker) as connection:
        connection.request("ping")
        connection.listen()
        broker.listening = False
        broker.kill()
        wait_until(lambda: connection.away, "nobody notices")
        threads = [
            threading.Thread(target=lambda: answers.append(connection.request("attach", big).ok["grant"]))
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(connection._backlog) == count, "they do not wait")
        broker.come_back()
        for thread in threads:
            thread.join(DEADLINE)
        assert sorted(answers) == list(range(1, count + 1))
