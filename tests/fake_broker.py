"""A broker that keeps its sessions when it dies, and dies where a test wants it to.

It lives in a thread and a real socket.  What is granted is made up, or granted by a real broker
behind it (:class:`Upstream`).  Dying closes every connection; the listening socket stays, as
with systemd or ``--keeper``, unless the test has it closed.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from backends import PATIENCE

from teemate.wire import close_all, decode, encode, receive, send  # by name: what a test records is not ours

DEADLINE = 60.0 * PATIENCE
"""Seconds after which what another thread or process has to do hangs."""
HELLO = {"version": 1, "broker": "fake", "max_message": 65536}
MUTATING = {"attach", "slots.acquire", "slots.release", "detach", "create", "destroy", "revoke"}

Outcome = tuple[dict[str, Any], tuple[int, ...]]
"""What a reply says (`ok` or `error`), and its descriptors, which stay whose they are."""


class Session:
    """What the broker keeps of one client."""

    def __init__(self, first_token: bytes | None) -> None:
        self.tokens = {first_token}
        self.next_token: bytes | None = None
        self.grants: set[int] = set()
        self.outcomes: dict[int, Outcome] = {}


class MadeUp:
    """Grants what nobody has."""

    def __init__(self) -> None:
        self.last = 0
        self.answer: dict[str, dict[str, Any]] = {}
        """What an operation's `ok` has instead."""

    def perform(self, op: str, args: dict[str, Any], fds: tuple[int, ...]) -> Outcome:
        """Do `op`."""
        if op == "attach":
            self.last += 1
            return {"ok": {"grant": self.last}}, ()
        if op == "create":
            return {"ok": {"bytes": os.pread(fds[0], 100, 0)}}, ()
        return {"ok": self.answer.get(op, {})}, ()


class Upstream:
    """A real broker does it, for this process."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(path)
        self._last = 0
        self.perform("hello", {"version": 1}, ())

    def perform(self, op: str, args: dict[str, Any], fds: tuple[int, ...]) -> Outcome:
        """Have the real broker do `op`."""
        self._last += 1
        send(self.sock, encode({"id": self._last, "op": op, "args": args}), fds)
        while True:
            packet = receive(self.sock)
            message = decode(packet.data)
            if message.pop("id", None) == self._last:
                return message, packet.fds


class FakeBroker:
    """Start with :func:`running`; everything but `say` is for before that, or for afterwards."""

    def __init__(self, path: str, performer: MadeUp | Upstream | None = None) -> None:
        self.path = path
        self.performer = performer or MadeUp()
        self.store = True
        self.grace = 20.0
        self.die: Callable[[str, str], bool] = lambda _point, _op: False
        """Asked at ``accepted``, and at ``received``, ``done`` and ``answered`` of every operation."""
        self.answering: Callable[[str], bool] = lambda _op: True
        self.remember = True
        """Whether the next life knows the sessions of this one."""
        self.listening = True
        """Whether the socket is there; looked at after each death."""
        self.refusal: dict[str, Any] | None = None
        """An error that greets whoever comes."""
        self.after_hello: list[dict[str, Any]] = []
        """Events for the next client that has resumed."""
        self.lives = 1
        self.performed: Counter[str] = Counter()
        self.asked: list[tuple[int, str]] = []
        self.hellos: list[dict[str, Any]] = []
        self.sessions: list[Session] = []
        self._listener: socket.socket | None = None
        self._clients: dict[int, tuple[socket.socket, Session | None]] = {}
        self._stop, self._stopped = os.pipe()
        self._lock = threading.Lock()
        self.failure: BaseException | None = None
        self._listen()

    # -- for tests ------------------------------------------------------------

    def kill(self) -> None:
        """Die now, from the test's thread."""
        os.write(self._stopped, b"k")

    def say(self, event: dict[str, Any]) -> None:
        """Tell every client."""
        with self._lock:
            for sock, _ in self._clients.values():
                send(sock, encode(event))

    def come_back(self) -> None:
        """Listen again."""
        self.listening = True
        os.write(self._stopped, b"l")

    # -- the thread -------------------------------------------------------------

    def run(self) -> None:
        """Serve until stopped."""
        try:
            while True:
                poll = select.poll()
                poll.register(self._stop, select.POLLIN)
                if self._listener is not None:
                    poll.register(self._listener, select.POLLIN)
                for number in self._clients:
                    poll.register(number, select.POLLIN)
                ready = [number for number, _ in poll.poll()]
                if self._stop in ready:
                    word = os.read(self._stop, 1)
                    if word == b"s":
                        return
                    if word == b"k":
                        self._die()
                    elif self._listener is None:
                        self._listen()
                    continue
                with self._lock:
                    for number in ready:
                        if self._listener is not None and number == self._listener.fileno():
                            self._accept()
                        elif number in self._clients:
                            self._serve(number)
        except BaseException as error:
            self.failure = error
        finally:
            self._end_clients()
            if self._listener is not None:
                self._listener.close()

    def stop(self) -> None:
        """End the thread's loop."""
        os.write(self._stopped, b"s")

    def _listen(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen(64)

    def _end_clients(self) -> None:
        for sock, _ in self._clients.values():
            sock.close()
        self._clients.clear()

    def _die(self) -> None:
        self._end_clients()
        self.lives += 1
        if not self.remember:
            self.sessions.clear()
        if not self.listening and self._listener is not None:
            self._listener.close()
            self._listener = None
            os.unlink(self.path)

    def _dies(self, point: str, op: str) -> bool:
        if self.die(point, op):
            self._die()
            return True
        return False

    def _accept(self) -> None:
        assert self._listener is not None
        sock, _ = self._listener.accept()
        self._clients[sock.fileno()] = (sock, None)
        if self.refusal is not None:
            send(sock, encode({"id": None, "error": self.refusal}))
            del self._clients[sock.fileno()]
            sock.close()
        else:
            self._dies("accepted", "")

    def _serve(self, number: int) -> None:
        sock, session = self._clients[number]
        try:
            packet = receive(sock)
        except ConnectionResetError:
            return
        if not packet.data:
            del self._clients[number]
            sock.close()
            return
        try:
            message = decode(packet.data)
            op, args = str(message["op"]), message.get("args", {})
            assert isinstance(args, dict)
            if self._dies("received", op):
                return
            if op == "hello":
                self._greet(number, sock, message["id"], args)
            else:
                assert session is not None
                self._answer(sock, session, message["id"], op, args, packet.fds)
        finally:
            close_all(packet.fds)

    def _greet(self, number: int, sock: socket.socket, request: Any, args: dict[str, Any]) -> None:
        self.hellos.append(args)
        ok: dict[str, Any] = dict(HELLO)
        session: Session | None = None
        if "resume" in args:
            found = [session for session in self.sessions if args["resume"] in session.tokens]
            if found:
                session = found[0]
                ok["resumed"] = sorted(session.grants)
        if session is None:
            session = Session(args.get("session"))
            self.sessions.append(session)
        if self.store:
            token = os.urandom(32)
            # The old one is good until the first request with the new one.
            session.tokens.add(token)
            session.next_token = token
            ok |= {"token": token, "resume_grace": self.grace}
        self._clients[number] = (sock, session)
        if self._dies("done", "hello"):
            return
        if self.answering("hello"):
            send(sock, encode({"id": request, "ok": ok}))
        if self._dies("answered", "hello"):
            return
        if "resumed" in ok:
            for event in self.after_hello:
                send(sock, encode(event))
            self.after_hello.clear()

    def _answer(
        self,
        sock: socket.socket,
        session: Session,
        request: Any,
        op: str,
        args: dict[str, Any],
        fds: tuple[int, ...],
    ) -> None:
        if session.next_token is not None and len(session.tokens) > 2:
            session.tokens = {session.next_token}
        self.asked.append((request, op))
        outcome = session.outcomes.get(request)
        if outcome is None:
            self.performed[op] += 1
            outcome = self.performer.perform(op, args, fds)
            if op in MUTATING:
                session.outcomes[request] = outcome
            if op == "attach" and "ok" in outcome[0]:
                session.grants.add(outcome[0]["ok"]["grant"])
            if op == "detach":
                session.grants.discard(args["grant"])
        if self._dies("done", op):
            return
        if self.answering(op):
            send(sock, encode({"id": request, **outcome[0]}), outcome[1])
        self._dies("answered", op)


@contextlib.contextmanager
def running(broker: FakeBroker) -> Iterator[FakeBroker]:
    """Run the broker's thread until the block ends; its failure is the block's."""
    thread = threading.Thread(target=broker.run)
    thread.start()
    try:
        yield broker
    finally:
        broker.stop()
        thread.join(DEADLINE)
        assert not thread.is_alive()
    if broker.failure is not None:
        raise broker.failure


def once(point: str, op: str) -> Callable[[str, str], bool]:
    """Die the first time that `op` comes to `point`."""
    left = [1]

    def die(at: str, of: str) -> bool:
        if (at, of) == (point, op) and left[0]:
            left[0] -= 1
            return True
        return False

    return die
