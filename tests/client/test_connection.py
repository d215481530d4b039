"""The socket to the broker, against a scripted broker in a thread of the test."""

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

import teemate
from teemate import wire
from teemate._connection import Connection
from teemate._requests import Reply
from teemate.errors import ConnectionLost, Denied, LimitReached, NotAttached, ProtocolError

HELLO = {"version": 1, "broker": "test", "max_message": 65536}


class Peer:
    """The broker's end of one connection."""

    def __init__(self, listener: socket.socket) -> None:
        self.sock, _ = listener.accept()

    def read(self) -> dict[str, Any]:
        packet = wire.receive(self.sock)
        wire.close_all(packet.fds)
        return wire.decode(packet.data)

    def say(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        wire.send(self.sock, wire.encode(message), fds)

    def greet(self) -> None:
        hello = self.read()
        assert hello["op"] == "hello"
        assert hello["args"]["version"] == 1
        self.say({"id": hello["id"], "ok": HELLO})


class Script:
    """Runs a function as the broker and hands its exception to the test."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def run(self, function: Callable[[Peer], None]) -> None:
        def body() -> None:
            peer = Peer(self._listener)
            try:
                function(peer)
            except BaseException as error:
                self._failure = error
            finally:
                peer.sock.close()

        self._thread = threading.Thread(target=body)
        self._thread.start()

    def finish(self) -> None:
        if self._thread is not None:
            self._thread.join(10)
            assert not self._thread.is_alive()
        self._listener.close()
        if self._failure is not None:
            raise self._failure


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    script = Script(str(tmp_path / "socket"))
    yield script
    script.finish()


def is_open(path: Path) -> bool:
    """Whether this process has a descriptor of `path`."""
    wanted = path.stat()
    for fd in range(1024):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(fd), wanted):
                return True
    return False


def test_no_broker_is_an_error_that_names_the_socket(tmp_path: Path) -> None:
    where = str(tmp_path / "nobody")
    with pytest.raises(ConnectionLost, match="TEEMATE_SOCKET") as caught:
        Connection(where)
    assert where in caught.value.message
    assert caught.value.detail["socket"] == where


def test_the_greeting_and_the_first_request_go_out_before_any_answer_is_read(script: Script) -> None:
    def broker(peer: Peer) -> None:
        hello, ping = peer.read(), peer.read()
        assert (hello["op"], ping["op"]) == ("hello", "ping")
        session = hello["args"]["session"]
        assert hello["args"] == {"version": 1, "client": "me", "counters": True, "session": session}
        peer.say({"id": hello["id"], "ok": HELLO})
        peer.say({"id": ping["id"], "ok": {}})
        assert peer.read()["op"] == "ping"
        peer.say({"id": 2, "ok": {}})

    script.run(broker)
    connection = Connection(script.path, "me")
    assert connection.request("ping").ok == {}
    assert connection.request("ping").ok == {}
    connection.close()


def test_a_refused_greeting_is_what_the_request_reports(script: Script) -> None:
    def broker(peer: Peer) -> None:
        hello = peer.read()
        peer.say({"id": hello["id"], "error": {"code": "limit-reached", "message": "clients_per_uid = 4"}})

    script.run(broker)
    connection = Connection(script.path)
    with pytest.raises(LimitReached, match="clients_per_uid"):
        connection.request("ping")
    with pytest.raises(LimitReached):
        connection.request("ping")
    connection.close()


def test_an_error_answer_arrives_as_its_type_with_its_detail(script: Script) -> None:
    def broker(peer: Peer) -> None:
        peer.greet()
        error = {"code": "denied", "message": "not allowed", "detail": {"enclave": "vault"}}
        peer.say({"id": peer.read()["id"], "error": error})

    script.run(broker)
    connection = Connection(script.path)
    with pytest.raises(Denied, match="not allowed") as caught:
        connection.request("attach", {"enclave": "vault"})
    assert caught.value.detail == {"enclave": "vault"}
    connection.close()


def test_threads_get_their_own_answers_whatever_the_order(script: Script) -> None:
    count = 8

    def broker(peer: Peer) -> None:
        peer.greet()
        requests = [peer.read() for _ in range(count)]
        for request in reversed(requests):
            peer.say({"id": request["id"], "ok": {"echo": request["args"]["number"]}})

    script.run(broker)
    connection = Connection(script.path)
    results: dict[int, int] = {}

    def ask(number: int) -> None:
        results[number] = connection.request("echo", {"number": number}).ok["echo"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == {number: number for number in range(count)}
    connection.close()


def test_an_event_between_request_and_answer_reaches_its_handler(script: Script) -> None:
    def broker(peer: Peer) -> None:
        peer.greet()
        request = peer.read()
        peer.say({"event": "draining", "enclave": "vault"})
        peer.say({"id": request["id"], "ok": {}})

    script.run(broker)
    connection = Connection(script.path)
    events: list[dict[str, Any]] = []
    connection.on_event = events.append
    connection.request("ping")
    assert events == [{"event": "draining", "enclave": "vault"}]
    connection.close()


def test_the_listener_hears_events_without_any_request_and_still_serves_requests(script: Script) -> None:
    heard = threading.Event()

    def broker(peer: Peer) -> None:
        peer.greet()
        peer.say({"id": peer.read()["id"], "ok": {}})
        peer.say({"event": "lost", "grant": 1, "enclave": "vault"})
        assert heard.wait(10)
        peer.say({"id": peer.read()["id"], "ok": {"second": True}})

    script.run(broker)
    connection = Connection(script.path)
    connection.on_event = lambda _event: heard.set()
    connection.request("ping")
    connection.listen()
    assert heard.wait(10)
    assert connection.request("ping").ok == {"second": True}
    connection.close()


@pytest.mark.parametrize("call", ["select.epoll", "os.eventfd"])
def test_without_descriptors_to_spare_events_are_heard_and_requests_answered_all_the_same(
    script: Script, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    tried, heard = threading.Event(), threading.Semaphore(0)

    def none_left(*_: object) -> None:
        tried.set()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def broker(peer: Peer) -> None:
        peer.greet()
        peer.say({"id": peer.read()["id"], "ok": {}})
        for number in range(2):
            peer.say({"event": "lost", "grant": 1, "enclave": "vault"})
            peer.say({"id": peer.read()["id"], "ok": {"number": number}})
        assert peer.sock.recv(1) == b""

    script.run(broker)
    monkeypatch.setattr(f"teemate._connection.{call}", none_left)
    with contextlib.closing(Connection(script.path)) as connection:
        connection.on_event = lambda _event: heard.release()
        connection.request("ping")
        connection.listen()
        assert tried.wait(10)
        for number in range(2):
            assert heard.acquire(timeout=10)
            assert connection.request("ping").ok == {"number": number}


def test_after_ctrl_c_at_the_begin_of_a_request_the_listener_hears_events_still(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted, heard = threading.Event(), threading.Event()
    begin = Connection._begin_asking

    def broker(peer: Peer) -> None:
        peer.greet()
        peer.say({"id": peer.read()["id"], "ok": {}})
        assert interrupted.wait(10)
        peer.say({"event": "lost", "grant": 1, "enclave": "vault"})
        assert peer.sock.recv(1) == b""

    def interrupt(connection: Connection, *args: object) -> None:
        begin(connection, *args)
        raise KeyboardInterrupt

    script.run(broker)
    with contextlib.closing(Connection(script.path)) as connection:
        connection.on_event = lambda _event: heard.set()
        connection.request("ping")
        connection.listen()
        monkeypatch.setattr(Connection, "_begin_asking", interrupt)
        with pytest.raises(KeyboardInterrupt):
            connection.request("ping")
        interrupted.set()
        assert heard.wait(10)


def test_an_answer_whose_caller_was_interrupted_is_given_back_and_its_descriptors_closed(
    script: Script, tmp_path: Path
) -> None:
    interrupted = threading.Event()
    granted = tmp_path / "granted"
    granted.touch()

    def broker(peer: Peer) -> None:
        peer.greet()
        attach = peer.read()
        assert interrupted.wait(10)
        with granted.open("rb") as file:
            peer.say({"id": attach["id"], "ok": {"grant": 7}}, (file.fileno(),))
        peer.say({"id": peer.read()["id"], "ok": {}})

    class Stop(Exception):  # noqa: N818
        pass

    def stop() -> None:
        raise Stop

    script.run(broker)
    connection = Connection(script.path)
    undone: list[Reply] = []
    with pytest.raises(Stop):
        connection.request("attach", undo=undone.append, check=stop)
    interrupted.set()
    connection.request("ping")
    assert [reply.ok for reply in undone] == [{"grant": 7}]
    assert not is_open(granted)
    connection.close()


def test_the_brokers_end_is_told_to_everybody_who_waits_and_who_comes_later(script: Script) -> None:
    def broker(peer: Peer) -> None:
        peer.greet()
        peer.read()

    script.run(broker)
    connection = Connection(script.path)
    with pytest.raises(ConnectionLost, match="calls in enclaves go on"):
        connection.request("ping")
    assert connection.lost
    with pytest.raises(ConnectionLost):
        connection.request("ping")
    connection.close()


def test_garbage_from_the_broker_ends_the_connection_with_a_reason(script: Script) -> None:
    def broker(peer: Peer) -> None:
        peer.greet()
        peer.read()
        peer.sock.send(b"\xa1")

    script.run(broker)
    connection = Connection(script.path)
    with pytest.raises(ProtocolError, match="malformed message"):
        connection.request("ping")
    connection.close()


def test_an_answer_that_nobody_asked_for_ends_the_connection(script: Script) -> None:
    def broker(peer: Peer) -> None:
        peer.greet()
        peer.say({"id": peer.read()["id"] + 5, "ok": {}})

    script.run(broker)
    connection = Connection(script.path)
    with pytest.raises(ProtocolError, match="nobody made"):
        connection.request("ping")
    connection.close()


def test_a_child_of_fork_holds_nothing(script: Script) -> None:
    def broker(peer: Peer) -> None:
        peer.greet()
        peer.say({"id": peer.read()["id"], "ok": {}})
        peer.say({"id": peer.read()["id"], "ok": {"still": "here"}})

    script.run(broker)
    connection = Connection(script.path)
    connection.request("ping")
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
    assert connection.request("ping").ok == {"still": "here"}
    connection.close()


def test_a_request_is_answered_while_a_listener_reads(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits hears of an answer from the listener, not from the time-out."""
    monkeypatch.setattr("teemate._requests.REPLY_TIMEOUT", 5.0)
    rounds = 200

    def broker(peer: Peer) -> None:
        peer.greet()
        for _ in range(rounds):
            request = peer.read()
            peer.say({"id": request["id"], "ok": {}})
        assert peer.sock.recv(1) == b""

    script.run(broker)
    with contextlib.closing(Connection(script.path)) as connection:
        connection.listen()
        for _ in range(rounds):
            assert connection.request("ping").ok == {}


def test_statistics_that_come_in_several_replies_are_put_together(script: Script) -> None:
    def page(users: list[int], enclaves: list[str], following: dict[str, object]) -> dict[str, object]:
        lists = {"users": [{"uid": uid} for uid in users], "enclaves": [{"name": name} for name in enclaves]}
        return {"stats": {"clients": 7, **lists}} | ({"next": following} if following else {})

    asked: list[dict[str, object]] = []

    def broker(peer: Peer) -> None:
        peer.greet()
        first, second = {"users_after": 2, "enclaves_after": "a"}, {"users_after": 3, "enclaves_after": "b"}
        for reply in (page([1, 2], ["a"], first), page([3], ["b"], second), page([4], [], {})):
            request = peer.read()
            asked.append(request.get("args") or {})
            peer.say({"id": request["id"], "ok": reply})
        assert peer.sock.recv(1) == b""

    script.run(broker)
    with teemate.connect(script.path) as connection:
        stats = connection.stats()
    assert asked == [{}, {"users_after": 2, "enclaves_after": "a"}, {"users_after": 3, "enclaves_after": "b"}]
    assert stats["clients"] == 7
    assert [user["uid"] for user in stats["users"]] == [1, 2, 3, 4]
    assert [enclave["name"] for enclave in stats["enclaves"]] == ["a", "b"]
