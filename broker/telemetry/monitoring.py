"""Shows administrators the traffic, without the clients noticing.

While nobody looks, a message costs a look at an empty dictionary.  While somebody does, it is noted.  Ten
times a second, or when some have come together, they are described, their secrets are taken out, and they
are encoded once, however many look; what nobody's filter wants is not encoded.  Then everybody is sent what
has gathered.

Who reads too slowly misses messages and is told how many.  Nothing is queued for a viewer in here: what its
socket does not take at once is missed.  So a viewer costs the broker what its socket buffer holds, and what
waits for the next sending is bounded for all of them together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, final

import trio

from teemate import errors, wire
from teemate.broker.connections.identity import command_of
from teemate.broker.connections.requests import Answer, Monitor
from teemate.traffic.concealing import Concealer
from teemate.traffic.description import BROKER, CLIENT, Conversation, Facts, Filter
from teemate.traffic.descriptors import describe_fd, describe_own

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.connections.connection import Connection
    from teemate.broker.policy.rules import Policy

__all__ = ["Monitoring", "MonitoringStatistics"]

GATHER = 0.1
"""Seconds for which messages gather before they are sent."""
_HELD_BYTES = 1 << 20
"""Of messages that wait to be sent; what comes on top is missed by everybody."""
_EVENT_BYTES = 60000
"""Of messages in one event: mostly they fit into a packet then; if not, they are divided once more."""
_NOTED, _NOTED_BYTES = 64, 1 << 17
"""Messages, and bytes of them, that wait to be described."""
_MESSAGE_BYTES = 48000
_AROUND = 1200
"""What is said around a message takes so much, rarely more, and what is said of its sender."""
_BEGINNING = 64
"""An event takes so much more than its peers and messages."""
_LONGEST_CGROUP = 256
"""Characters; a path can have 4095, most of which its user has chosen."""
_TELL_AGAIN = 1.0
"""Seconds until who has missed something and got nothing since is told so again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitoringStatistics:
    """Who looks; messages that were shown to somebody, and that somebody missed, counted for each viewer."""

    viewers: int
    shown: int
    missed: int


class _Followed(NamedTuple):
    """What is known of a connection while somebody looks."""

    number: int
    name: str
    peer: dict[str, object]
    conversation: Conversation


class _Noted(NamedTuple):
    """A message as it was, until it is described."""

    connection: Connection
    sender: str
    data: bytes
    fds: Sequence[dict[str, object]]
    problem: str
    at: float
    """By the monotonic clock."""


class _Gathered(NamedTuple):
    """A message, its secrets taken out, that waits to be sent; several audiences may wait for it."""

    peer: dict[str, object]
    told: dict[str, object]
    size: int
    """In bytes when it is encoded, about."""


_MALFORMED = Facts("malformed", error="protocol-error")
_EVERYTHING = Filter()


@final
@dataclass(slots=True)
class _Audience:
    """Viewers that want the same."""

    filter: Filter
    everything: bool
    """Whether the filter wants every message."""
    viewers: list[Connection] = field(default_factory=list)
    gathered: list[_Gathered] = field(default_factory=list)
    dropped: int = 0
    """There was no room to gather them."""


@final
class Monitoring:
    """Who looks at the traffic, and what they have not been sent yet."""

    def __init__(self) -> None:
        self.viewers: dict[Connection, _Audience] = {}
        """Empty while nobody looks: then nothing else here is called."""
        self._audiences: dict[Filter, _Audience] = {}
        self._missed: dict[Connection, int] = {}
        """What each has missed and was not told yet."""
        self._followed: dict[Connection, _Followed] = {}
        self._concealer = Concealer()
        self._noted: list[_Noted] = []
        self._noted_bytes = 0
        self._over: list[Connection] = []
        """Connections that are followed until what was noted of them is described."""
        self._held_bytes = 0
        self._due = trio.Event()
        self._since_1970 = time.time() - time.monotonic()
        self._shown = 0
        self._missed_count = 0

    # -- viewers ---------------------------------------------------------------

    def begin(self, client: Client, args: Monitor) -> Answer:
        """Show `client` what it asks for, from its answer on."""
        connection = client.connection
        assert connection is not None  # it has just brought the request

        def add() -> None:
            self._describe_noted()  # this viewer is shown what comes from now on
            self._remove(connection)
            audience = self._audiences.setdefault(
                args.filter, _Audience(args.filter, args.filter == _EVERYTHING)
            )
            audience.viewers.append(connection)
            self.viewers[connection] = audience
            self._missed[connection] = 0

        return Answer({}, after=add)

    def adopt(self, policy: Policy) -> None:
        """End the connections of those who look and may not any more."""
        for connection in list(self.viewers):
            identity = connection.client.identity
            if not policy.administrators.includes(identity):
                self._remove(connection)
                connection.dismiss(
                    errors.Denied(f"the policy has changed, and allows monitor to uid {identity.uid} no more")
                )

    def ended(self, connection: Connection) -> None:
        """A connection is over."""
        if self._noted:  # perhaps its own
            self._over.append(connection)
        else:
            self._followed.pop(connection, None)
        self._remove(connection)

    def _remove(self, connection: Connection) -> None:
        audience = self.viewers.pop(connection, None)
        if audience is None:
            return
        del self._missed[connection]
        audience.viewers.remove(connection)
        if not audience.viewers:
            del self._audiences[audience.filter]
        if not self.viewers:
            self._noted.clear()
            self._over.clear()
            self._noted_bytes = 0
            self._followed.clear()
            self._concealer = Concealer()  # who looks later cannot connect what they see with this

    # -- messages --------------------------------------------------------------

    def received(self, connection: Connection, data: bytes, fds: tuple[int, ...], problem: str = "") -> None:
        """Note a message that came from a client; `fds` are open still, `problem` says that it is none.

        Nobody knows what such a one holds, so it is not shown.
        """
        self._note(connection, CLIENT, data, [describe_fd(fd).as_map() for fd in fds] if fds else (), problem)

    def sent(self, connection: Connection, data: bytes, fds: tuple[int, ...]) -> None:
        """Note a message to a client."""
        self._note(connection, BROKER, data, [describe_own(fd).as_map() for fd in fds] if fds else (), "")

    def _note(
        self,
        connection: Connection,
        sender: str,
        data: bytes,
        fds: Sequence[dict[str, object]],
        problem: str,
    ) -> None:
        """Remember a message for :meth:`_describe_noted`: many at once take half the time of one by one."""
        if connection not in self._followed:
            self._follow(connection)  # now, while its process can be looked at
        self._noted.append(_Noted(connection, sender, data, fds, problem, time.monotonic()))
        self._noted_bytes += len(data)
        if len(self._noted) >= _NOTED or self._noted_bytes >= _NOTED_BYTES:
            self._describe_noted()
        self._due.set()

    def _describe_noted(self) -> None:
        """Describe what was noted, for those who want to see it."""
        noted, self._noted = self._noted, []
        self._noted_bytes = 0
        for message in noted:
            self._describe(message)
        for connection in self._over:
            self._followed.pop(connection, None)
        self._over.clear()

    def _describe(self, noted: _Noted) -> None:
        followed = self._follow(noted.connection)
        told: dict[str, object] = {"from": noted.sender, "size": len(noted.data)}
        if noted.fds:
            told["fds"] = noted.fds
        if noted.problem:
            wanting = self._wanting(followed.number, _MALFORMED)
            self._gather(wanting, followed, _MALFORMED, told | {"problem": noted.problem}, noted.at, 0)
            return
        message = wire.decode_trusted(noted.data)  # what came from a client was checked
        facts = followed.conversation.follow(noted.at, noted.sender, message)
        wanting = self._wanting(followed.number, facts)
        if not wanting:
            return
        try:
            shown = self._concealer.conceal(message, noted.data)
        except errors.Unsupported as error:
            shown = b""
            told["problem"] = error.message
        else:
            if len(shown) <= _MESSAGE_BYTES:
                told["message"] = shown
            else:
                told["problem"] = f"too long to be shown here: {len(shown)} bytes"
        self._gather(wanting, followed, facts, told, noted.at, len(shown))

    def _wanting(self, number: int, facts: Facts) -> list[_Audience]:
        return [a for a in self._audiences.values() if a.everything or a.filter.wants(number, facts)]

    def _gather(
        self,
        wanting: list[_Audience],
        followed: _Followed,
        facts: Facts,
        told: dict[str, object],
        now: float,
        size: int,
    ) -> None:
        """Keep what is told of a message until it is sent to who wants it."""
        if self._held_bytes >= _HELD_BYTES:
            for audience in wanting:
                audience.dropped += 1
            return
        told["at"] = now + self._since_1970
        told["client"] = followed.number
        told["kind"] = facts.kind
        told["op"] = facts.op
        if facts.enclave:
            told["enclave"] = facts.enclave
        if facts.error:
            told["error"] = facts.error
        if facts.latency is not None:
            told["latency"] = facts.latency
        if facts.grant is not None:
            told["grant"] = facts.grant
        gathered = _Gathered(followed.peer, told, size + _AROUND)
        self._held_bytes += gathered.size
        for audience in wanting:
            audience.gathered.append(gathered)

    def _follow(self, connection: Connection) -> _Followed:
        client = connection.client
        followed = self._followed.get(connection)
        if followed is not None and followed.number == client.number and followed.name is client.name:
            return followed
        if followed is None:
            conversation = Conversation()
            conversation.grants = {number: grant.enclave.name for number, grant in client.grants.items()}
        else:
            conversation = followed.conversation
        identity = client.identity
        command = followed.peer["command"] if followed else command_of(identity.pid, client.pidfd)
        peer: dict[str, object] = {
            "client": client.number, "pid": identity.pid, "uid": identity.uid,
            "cgroup": identity.cgroup_text[:_LONGEST_CGROUP], "name": client.name, "command": command,
        }  # fmt: skip
        followed = _Followed(client.number, client.name, peer, conversation)
        self._followed[connection] = followed
        return followed

    # -- sending ---------------------------------------------------------------

    async def run(self) -> None:
        """Send what has gathered, for as long as the broker runs."""
        while True:
            if any(self._missed.values()):
                with trio.move_on_after(_TELL_AGAIN):
                    await self._due.wait()
            else:
                await self._due.wait()
            await trio.sleep(GATHER)
            self._due = trio.Event()
            await self._send_all()

    async def _send_all(self) -> None:
        self._describe_noted()
        self._held_bytes = 0
        self._since_1970 = time.time() - time.monotonic()  # the clock may be set meanwhile
        for audience in list(self._audiences.values()):
            gathered, audience.gathered = audience.gathered, []
            dropped, audience.dropped = audience.dropped, 0
            for event in _events(gathered):
                for viewer in list(audience.viewers):
                    self._send(viewer, event)
                await trio.lowlevel.checkpoint()  # others have their turn between two events
            if dropped:
                for viewer in audience.viewers:
                    self._miss(viewer, dropped)

    def _send(self, viewer: Connection, event: _Event) -> None:
        """Send one viewer an event, if it can take it now."""
        missed = self._missed[viewer]
        if not event.count and not missed:
            return
        if event.fits and viewer.outbox.offer(event.encoded(missed)):
            self._missed[viewer] = 0
            self._shown += event.count
        else:
            self._miss(viewer, event.count)

    def _miss(self, viewer: Connection, count: int) -> None:
        self._missed[viewer] += count
        self._missed_count += count

    def statistics(self) -> MonitoringStatistics:
        """What was shown so far, and to how many now."""
        return MonitoringStatistics(viewers=len(self.viewers), shown=self._shown, missed=self._missed_count)


@final
class _Event:
    """An event for all viewers of an audience; only what each has missed is its own."""

    def __init__(self, gathered: list[_Gathered]) -> None:
        self.count = len(gathered)
        peers = {message.told["client"]: message.peer for message in gathered}
        self._peers = wire.Encoded(list(peers.values()))
        self._messages = wire.Encoded([message.told for message in gathered])
        self._last: tuple[int, bytes] = (-1, b"")
        self.fits = len(self._peers.data) + len(self._messages.data) + _BEGINNING <= wire.MAX_MESSAGE

    def encoded(self, missed: int) -> bytes:
        """Return it for who has missed so many messages before."""
        if self._last[0] != missed:
            event = {
                "event": "traffic", "missed": missed, "peers": self._peers, "messages": self._messages,
            }  # fmt: skip
            self._last = missed, wire.encode_part(event)
        return self._last[1]


def _events(gathered: list[_Gathered]) -> Iterator[_Event]:
    """Yield events that fit into a packet each, unless one message alone does not.

    Clients choose much of what is told of them, and one that is more than was thought must not cost a viewer
    its connection.
    """
    for part in _parts(gathered):
        event = _Event(part)
        if event.fits or len(part) == 1:
            yield event
        else:
            for message in part:
                yield _Event([message])


def _parts(gathered: list[_Gathered]) -> Iterator[list[_Gathered]]:
    """Divide messages into as few events as they fit into; there is one also when there are none."""
    part: list[_Gathered] = []
    size = 0
    for message in gathered:
        if part and size + message.size > _EVENT_BYTES:
            yield part
            part, size = [], 0
        part.append(message)
        size += message.size
    yield part
