"""Somebody who looks at a broker's traffic, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cbor2
from backends import PATIENCE
from recorder import schema

from teemate import wire
from teemate.traffic.description import Described, parse_event
from teemate.traffic.plain import PlainConnection

TIMEOUT = 60.0 * PATIENCE


class Viewer:
    """A connection with `monitor` on; what it was shown is in `seen`."""

    def __init__(self, path: str, **chosen: object) -> None:
        self.connection = PlainConnection(path)
        self.connection.ask("hello", {"version": 1, "client": "viewer"})
        self.connection.ask("monitor", chosen, 1)
        self.seen: list[Described] = []
        self.missed = 0
        self.counted = 0

    def take(self, patience: float = TIMEOUT) -> bool:
        """Receive an event; returns whether one came in time."""
        packet = self.connection.receive(patience)
        if packet is None:
            return False
        assert packet.data, "the broker ended the connection"
        schema("traffic-event").validate_cbor(packet.data)
        event: dict[str, Any] = wire.decode_trusted(packet.data)
        for message in event["messages"]:
            if "message" in message:
                cbor2.loads(message["message"])
        self.missed += event["missed"]
        self.seen += parse_event(event)
        return True

    def count(self, patience: float) -> bool:
        """Receive an event and only count what is in it; returns whether one came in time."""
        packet = self.connection.receive(patience)
        if packet is None:
            return False
        event: dict[str, Any] = wire.decode_trusted(packet.data)
        self.missed += event["missed"]
        self.counted += len(event["messages"])
        return True

    def watch(self, until: Callable[[Viewer], bool]) -> list[Described]:
        """Receive events until it is so; returns all messages."""
        while not until(self):
            assert self.take(), f"not shown in time; so far: {[message.head() for message in self.seen]}"
        return self.seen


def shown(kind: str, op: str) -> Callable[[Viewer], bool]:
    """Whether such a message was shown."""
    return lambda viewer: any((m.facts.kind, m.facts.op) == (kind, op) for m in viewer.seen)
