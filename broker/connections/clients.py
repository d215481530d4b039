"""A client: a process, and what it holds.

Apart from its connection (connection.py), which is a socket and its queues: when the broker is
restarted the connections end, and what the clients hold does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, final

import trio

if TYPE_CHECKING:
    from teemate.broker.connections.connection import Connection
    from teemate.broker.connections.identity import Identity, Peer
    from teemate.broker.policy.limits import Account
    from teemate.broker.service import Service
    from teemate.broker.slots.claims import CounterPage
    from teemate.broker.slots.grants import Grant

__all__ = ["Client"]


@final
class Client:
    """One process; `connection` is None while it has none."""

    def __init__(self, service: Service, number: int, peer: Peer, account: Account) -> None:
        self.service = service
        self.number = number
        self.identity: Identity = peer.identity
        self.pidfd = peer.pidfd
        self.account = account
        self.connection: Connection | None = None
        self.name = ""
        self.watched = False
        self.connected_at = trio.current_time()
        self.requests = 0
        self.grants: dict[int, Grant] = {}
        self.withheld: list[Grant] = []
        """Grants that were given up with slots that come back when the process ends."""
        self.left = False
        """Whether its connection has ended for good."""
        # What has to outlive the broker (state.py), besides the grants:
        self.started: int | None = None
        """When the process started: None until somebody has to know."""
        self.tokens: tuple[bytes, ...] = ()
        """Hashes of the resume tokens that are valid, the newest first."""
        self.first_token: bytes | None = None
        """That of the token that it brought along, valid until it has resumed."""
        self.asking = 0
        """Id of the request whose handler is being started."""
        self.outcomes: dict[int, tuple[str, dict[str, object]]] = {}
        """What requests that change something were answered, by id."""
        self.recalled: dict[int, tuple[str, dict[str, object]]] = {}
        """The same of requests before a restart: these may come again."""
        self.replied: list[int] = []
        """Those of `outcomes` whose reply was sent, maybe not read."""
        self.intents: dict[int, dict[str, object]] = {}
        """What requests that are under way are changing, by id."""
        self.returning: dict[tuple[int, int], int] = {}
        """Slots that it had and that the warden is not done with: enclave, index and generation."""
        self.counts = False
        """Whether its library can count calls in a page that it is sent."""
        self.counters: CounterPage | None = None
        """That page, once somebody has looked; it goes with the connection."""
        self.slot_seconds = 0.0
        """How long it has had slots that are back by now."""
        self.recorded = False
        """Whether there is a record of it."""
        self.shelves: tuple[int, list[Any]] = (-1, [])
        """What it may be given ahead, and when that was found out (attendant.py)."""
        self.unwritten = False
        """Whether something was taken from it that its record does not say yet."""

    def held_seconds(self) -> float:
        """Slot time, from each assignment until the slot was back, since this broker started."""
        now = time.monotonic()
        held = (*self.grants.values(), *self.withheld)
        return self.slot_seconds + sum(
            now - grant.enclave.slots.slots[index].since for grant in held for index in grant.charges
        )

    def drop_counters(self) -> None:
        """Nobody looks at the page any more: its connection is over."""
        if self.counters is not None:
            self.counters.close()
            self.counters = None

    def send(self, message: Mapping[str, object], fds: tuple[int, ...] = ()) -> None:
        """Send one message, now or when the client reads again; `fds` stay the caller's."""
        if self.connection is not None:
            self.connection.send(message, fds)

    def dispose(self, fds: Iterable[int]) -> None:
        """Get rid of descriptors that came from the client."""
        if fds:
            self.service.disposal.dispose(self.account, fds)

    def close(self) -> None:
        """End the connection; its task notices and cleans up."""
        if self.connection is not None:
            self.connection.close()
