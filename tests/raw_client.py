"""A client that speaks the protocol by hand, so that it can also break it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from backends import PATIENCE

from teemate import wire

TIMEOUT = 30.0 * PATIENCE
"""Seconds after which a broker that does not answer has failed the test."""


class RawClient:
    """One connection.  Descriptors of replies are in `fds` until :meth:`close`."""

    def __init__(self, path: str, *, hello: bool = True, name: str = "test", patient: bool = False) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        if not patient:  # else connecting waits while the kernel's queue is full
            self.sock.settimeout(TIMEOUT)
        self.sock.connect(path)
        self.sock.settimeout(TIMEOUT)
        self.fds: list[int] = []
        self.events: list[dict[str, Any]] = []
        self._number = 0
        self.token = b""
        self.resumed: list[int] = []
        self._path = path
        self._name = name
        if hello:
            self.hello()

    def hello(self, **args: Any) -> dict[str, Any]:
        """Say hello; keeps the resume token, if there is one."""
        ok = self.ok("hello", version=1, client=self._name, **args)
        self.token = ok.get("token", b"")
        self.resumed = ok.get("resumed", [])
        return ok

    def reconnect(self) -> dict[str, Any]:
        """Connect again and resume; returns what `hello` was answered.  The numbering goes on."""
        self.sock.close()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)
        return self.hello(resume=self.token)

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        wire.send(self.sock, wire.encode(message), fds)

    def post(self, op: str, fds: tuple[int, ...] = (), **args: object) -> int:
        """Send a request without waiting; returns its id."""
        self._number += 1
        self.send({"id": self._number, "op": op, "args": args}, fds)
        return self._number

    def receive(self) -> dict[str, Any] | None:
        """The next message, None at the end of the connection."""
        packet = wire.receive(self.sock)
        self.fds += packet.fds
        return wire.decode(packet.data) if packet.data else None

    def reply(self, number: int) -> dict[str, Any]:
        """The reply to a request; events before it are kept in `events`."""
        while True:
            message = self.receive()
            assert message is not None, "the broker closed the connection"
            if "event" in message:
                self.events.append(message)
                continue
            assert message["id"] == number, message
            return message

    def event(self) -> dict[str, Any]:
        """The next event."""
        if not self.events:
            message = self.receive()
            assert message is not None
            assert "event" in message, message
            self.events.append(message)
        return self.events.pop(0)

    def call(self, op: str, fds: tuple[int, ...] = (), **args: object) -> dict[str, Any]:
        """A request and its whole reply."""
        return self.reply(self.post(op, fds, **args))

    def ok(self, op: str, fds: tuple[int, ...] = (), **args: object) -> dict[str, Any]:
        """A request that has to succeed."""
        reply = self.call(op, fds, **args)
        assert "ok" in reply, reply
        ok: dict[str, Any] = reply["ok"]
        return ok

    def fails(self, op: str, code: str, fds: tuple[int, ...] = (), **args: object) -> dict[str, Any]:
        """A request that has to fail with `code`; returns the error."""
        reply = self.call(op, fds, **args)
        assert reply.get("error", {}).get("code") == code, reply
        error: dict[str, Any] = reply["error"]
        return error

    def breaks_protocol(self) -> dict[str, Any]:
        """The broker answers with a protocol error without an id, then closes."""
        message = self.receive()
        assert message is not None
        assert message["id"] is None
        error: dict[str, Any] = message["error"]
        assert error["code"] == "protocol-error"
        assert self.receive() is None
        return error

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        self.sock.close()


@contextmanager
def raw_client(path: str, **options: Any) -> Iterator[RawClient]:
    client = RawClient(path, **options)
    try:
        yield client
    finally:
        client.close()
