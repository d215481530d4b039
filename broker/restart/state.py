"""Keeps what the next broker has to know, where there is a descriptor store; else does nothing.

Descriptors go into the store when an enclave is made and out of it when it is destroyed, confirmed by
the service manager before anybody is told.  Everything else is records of the snapshot, written before
the reply to the request that changed them: no message to the service manager, no system call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import trio

from teemate import errors
from teemate.broker.connections.identity import Identity, start_time
from teemate.broker.restart.cells import Cells
from teemate.broker.restart.descriptor_store import DescriptorStore
from teemate.broker.restart.kept import LISTENER
from teemate.broker.restart.records import (
    GUEST,
    client_content,
    enclave_content,
    guest_content,
    stored_content,
)
from teemate.broker.restart.snapshot import Name, Snapshot, SnapshotStatistics

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.enclaves.draining import StoredEnclave
    from teemate.broker.enclaves.enclave import Enclave
    from teemate.broker.enclaves.source import ImageSource

__all__ = [
    "AHEAD",
    "COUNTERS",
    "EMPTIED",
    "SNAPSHOT",
    "State",
    "StateStatistics",
    "arena_name",
    "enclave_name",
    "image_name",
]

SNAPSHOT = "snapshot"
"""The snapshot's name in the store."""
AHEAD = "ahead"
"""The name there of what was given ahead of the snapshot (cells.py)."""
COUNTERS = Name("counters", 0)
EMPTIED = Name("emptied", 0)
_BLOCK = 1024
"""Numbers that are taken from the record at once: those that were left when the broker died are skipped."""
_OUTCOMES = 1024
"""Requests behind the newest whose outcome is still kept: more than can be under way."""


def enclave_name(serial: int) -> str:
    """Return the name of an enclave's descriptor in the store."""
    return f"enclave-{serial}"


def arena_name(serial: int) -> str:
    """Return the name of its arena's."""
    return f"arena-{serial}"


def image_name(serial: int) -> str:
    """Return the name of the descriptor that its next generation is built from."""
    return f"image-{serial}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateStatistics:
    """What is kept for the next broker; None where nothing is.  `starts`: of brokers over what is kept."""

    snapshot: SnapshotStatistics | None
    stored: int
    starts: int


@final
class State:
    """The store and the snapshot of one broker; without a store nothing is written anywhere."""

    def __init__(
        self, store: DescriptorStore | None, snapshot: Snapshot | None, cells: Cells | None = None
    ) -> None:
        self._store = store
        self._snapshot = snapshot
        self.cells = cells or Cells.create(kept=store is not None)
        self._numbers = {"client": 0, "grant": 0, "enclave": 0, "start": 0, "guest": 0}
        self._reserved = dict(self._numbers)
        self._changed: set[Enclave] = set()
        self._wake = trio.Event()
        if snapshot is not None:
            for kind, number in snapshot.contents.get(COUNTERS, {}).items():
                assert isinstance(number, int)
                self._numbers[kind] = self._reserved[kind] = number

    @property
    def kept(self) -> bool:
        """Whether anything outlives this broker."""
        return self._snapshot is not None

    async def begin(self) -> None:
        """Count this start; make the snapshot, where there is a store and none came with it."""
        if self._store is not None and self._snapshot is None:
            self._snapshot = Snapshot.create()
            await self._store.put(SNAPSHOT, self._snapshot.fd)
            await self._store.confirm()
        if self._store is not None and AHEAD not in self._store:
            await self._store.put(AHEAD, self.cells.fd)
            await self._store.confirm()
        self._numbers["start"] += 1
        self._reserved["start"] = self._numbers["start"]
        if self._snapshot is not None:
            self._snapshot.write(COUNTERS, dict(self._reserved))

    def next_number(self, kind: str) -> int:
        """Return a number that no client, grant or enclave has had."""
        number = self._numbers[kind] = self._numbers[kind] + 1
        if self._snapshot is not None and number > self._reserved[kind]:
            self._reserved[kind] = number + _BLOCK
            self._snapshot.write(COUNTERS, dict(self._reserved))
        return number

    # -- clients -------------------------------------------------------------------

    def write_client(self, client: Client) -> None:
        """Write what the client holds; of one that has left and holds nothing, nothing stays."""
        client.unwritten = False
        if self._snapshot is None:
            return
        name = Name("client", client.number)
        if client.left and not client.returning and not any(grant.charges for grant in client.withheld):
            self._snapshot.erase(name)
            client.recorded = False
            return
        if client.started is None:
            if client.left:
                return
            # It has a pidfd: when it lives now, the number was its own when we looked.
            client.started = start_time(client.identity.pid, client.pidfd)
            if client.started is None:
                return  # its end is news that comes anyway, and ends what it holds
        self._snapshot.write(name, client_content(client, client.started))
        client.recorded = True

    def write_guest(self, number: int, identity: Identity) -> None:
        """Write whom clients are like that may be greeted without us (guests.py)."""
        if self._snapshot is not None:
            self._snapshot.write(Name(GUEST, number), guest_content(identity))

    def has_written(self, client: Client) -> bool:
        """Whether the client has a record, written now if need be; True if nothing is kept."""
        if self._snapshot is None:
            return True
        if not client.recorded:
            self.write_client(client)
        return client.recorded

    def write_changed(self, client: Client) -> None:
        """Write the client's record if something was taken from it that is not written yet."""
        if client.unwritten:
            self.write_client(client)

    def answered(self, client: Client, request: int, operation: str, outcome: Mapping[str, object]) -> None:
        """Record what a request that changes something is answered, before the answer is sent."""
        if self._snapshot is None:
            return
        self.write_enclaves()
        client.intents.pop(request, None)
        if client.connection is not None and client.connection.outbox.everything_was_read():
            for known in client.replied:
                client.outcomes.pop(known, None)
            client.replied.clear()
        for old in (client.outcomes, client.recalled):
            for known in [known for known in old if known < request - _OUTCOMES]:
                del old[known]
        client.recalled.pop(request, None)
        client.outcomes[request] = (operation, dict(outcome))
        client.replied.append(request)
        self.write_client(client)

    def intend(self, client: Client, intent: dict[str, object], request: int | None = None) -> None:
        """Record what a request is about to change, before it does; by default the one that begins."""
        if self._snapshot is not None:
            client.intents[client.asking if request is None else request] = intent
            self.write_client(client)

    def failed(self, client: Client, request: int) -> None:
        """A request that was to change something did not, or its answer could not be sent."""
        known = client.intents.pop(request, None), client.outcomes.pop(request, None)
        if any(known):
            self.write_client(client)

    # -- enclaves ------------------------------------------------------------------

    async def keep_enclave(self, enclave: Enclave, source: ImageSource) -> None:
        """Put a new enclave into the store with the image that it came from, and write its record then.

        Raises
        ------
        LimitReached, Busy
            The service manager takes no more, or does not confirm.

        """
        enclave.serial = self.next_number("enclave")
        enclave.made_from = (source.sigstruct, source.origin)
        if self._store is None or self._snapshot is None:
            return
        self._store.require_room(3)
        await self._store.put(enclave_name(enclave.serial), enclave.built.fd)
        await self._store.put(arena_name(enclave.serial), enclave.built.arena)
        await self._store.put(image_name(enclave.serial), source.fd)
        await self._store.confirm()
        self.watch(enclave)
        self._write_enclave(enclave)

    def watch(self, enclave: Enclave) -> None:
        """Hear of the changes of an enclave that is kept."""
        if self._snapshot is not None:
            enclave.on_change = self._note

    async def drop_all(self) -> None:
        """Have the store close everything but the sockets: nobody governs by it any more."""
        if self._store is not None:
            for name in self._store.names():
                if name != LISTENER:
                    await self._store.remove(name)
            await self._store.confirm()

    async def drop_enclave(self, enclave: Enclave) -> bool:
        """Forget an enclave, as :meth:`drop_descriptors`; those of the broker stay open."""
        enclave.on_change = lambda _enclave: None
        self._changed.discard(enclave)
        if self._snapshot is None:
            return True
        confirmed = await self.drop_descriptors(enclave.serial)
        self._snapshot.erase(Name("enclave", enclave.serial))
        return confirmed

    async def drop_descriptors(self, serial: int) -> bool:
        """Have the store close what it has of an enclave; returns whether that was confirmed.

        What was asked for and not confirmed is done later, or by the next broker, to which it is a leftover.
        """
        if self._store is None:
            return True
        made = (enclave_name(serial), arena_name(serial), image_name(serial))
        names = [name for name in made if name in self._store]
        with contextlib.suppress(OSError):  # the manager has ended, and its store with it
            try:
                for name in names:
                    await self._store.remove(name)
                if names:
                    await self._store.confirm()
            except errors.Busy:
                return False
        return True

    def _note(self, enclave: Enclave) -> None:
        self._changed.add(enclave)
        self._wake.set()

    async def run(self) -> None:
        """Write what changes by itself, for as long as the broker runs."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            self.write_enclaves()

    # -- of an emptied host ----------------------------------------------------------

    def write_emptied(self, reason: str) -> None:
        """Write that the host is being emptied, or with no reason that it is not."""
        if self._snapshot is not None:
            self._snapshot.write(EMPTIED, {"reason": reason})

    async def keep_stored(self, stored: StoredEnclave) -> None:
        """Keep what an enclave is built from that is about to be taken down."""
        if self._store is not None and self._snapshot is not None:
            await self._store.put(image_name(stored.serial), stored.source.fd)
            await self._store.confirm()
            self._snapshot.write(Name("stored", stored.serial), stored_content(stored))

    async def drop_stored(self, serial: int) -> None:
        """Forget what was kept: the enclave is there again."""
        await self.drop_descriptors(serial)
        self.erase("stored", serial)

    # -- records that are due ----------------------------------------------------------

    def write_enclaves(self) -> None:
        """Write the records of the enclaves that have changed."""
        while self._changed:
            self._write_enclave(self._changed.pop())

    def _write_enclave(self, enclave: Enclave) -> None:
        if self._snapshot is not None:
            self._snapshot.write(Name("enclave", enclave.serial), enclave_content(enclave))

    def erase(self, kind: str, number: int) -> None:
        """Forget a record of the last broker that holds no more."""
        if self._snapshot is not None:
            self._snapshot.erase(Name(kind, number))

    def close(self) -> None:
        """The broker ends; what is in the store stays there."""
        self.write_enclaves()
        if self._snapshot is not None:
            self._snapshot.close()
            self._snapshot = None
        self.cells.close()

    def statistics(self) -> StateStatistics:
        """What is kept at this moment."""
        return StateStatistics(
            snapshot=self._snapshot.statistics() if self._snapshot is not None else None,
            stored=len(self._store) if self._store is not None else 0,
            starts=self._numbers["start"],
        )
