"""Looking at the broker again and again: what is there, and what has changed since the last look."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from teemate._containers import container_name
from teemate.errors import Denied, Error

if TYPE_CHECKING:
    from teemate._broker import Broker
    from teemate._looking import Holders
    from teemate._types import ClientInfo, EnclaveInfo

__all__ = ["SORTS", "ClientRow", "EnclaveRow", "Observer", "View", "select"]


class EnclaveRow(NamedTuple):
    """One enclave; `calls` a second are the gate's own count, None while there is no rate yet."""

    name: str
    state: str
    backend: str
    pages: int
    total: int
    used: int
    free: int
    withheld: int
    quarantined: int
    queue: int
    clients: int
    calls: float | None


class ClientRow(NamedTuple):
    """One client; `calls` a second and threads `inside` on average are what it says of itself."""

    client: int
    name: str
    uid: int
    pid: int
    where: str
    """Its container or unit."""
    enclaves: str
    slots: int
    waiting: int
    """Slots that it waits for."""
    waited: float
    """Seconds since the longest of those requests."""
    held: float
    """Slot time in seconds, the broker's."""
    calls: float | None
    inside: float | None


class View(NamedTuple):
    """What there was at one look."""

    enclaves: tuple[EnclaveRow, ...]
    clients: tuple[ClientRow, ...]
    note: str
    """Why there is less than there could be."""


_Key = Callable[[ClientRow], tuple[float, ...]]
SORTS: dict[str, _Key] = {
    "calls": lambda row: (-(row.calls or 0.0), -row.slots, row.client),
    "inside": lambda row: (-(row.inside or 0.0), -row.slots, row.client),
    "slots": lambda row: (-row.slots, row.client),
    "waiting": lambda row: (-row.waiting, -row.waited, row.client),
    "held": lambda row: (-row.held, row.client),
    "uid": lambda row: (row.uid, row.client),
    "pid": lambda row: (row.pid,),
}
"""By what clients can be sorted."""


def select(clients: Iterable[ClientRow], sort: str, wanted: str = "") -> list[ClientRow]:
    """Return those that have `wanted` in one of their texts or numbers, sorted."""
    found = [row for row in clients if not wanted or any(wanted in text for text in _texts(row))]
    return sorted(found, key=SORTS[sort])


def _texts(row: ClientRow) -> tuple[str, ...]:
    return (row.name, row.where, row.enclaves, f"uid {row.uid}", f"pid {row.pid}", f"client {row.client}")


class _Count(NamedTuple):
    at: float
    calls: int
    inside: float


class Observer:
    """Looks, and remembers the last look; `clock` is monotonic."""

    def __init__(self, broker: Broker, clock: Callable[[], float] = time.monotonic) -> None:
        self._broker = broker
        self._clock = clock
        self._clients: dict[int, _Count] = {}
        self._enclaves: dict[tuple[str, int], _Count] = {}

    def look(self) -> View:
        """Ask the broker.

        Raises
        ------
        ConnectionLost
            It is not there.

        """
        enclaves = self._broker.enclaves()
        try:
            clients = self._broker.clients(activity=True)
        except Denied:
            note = "who holds what is told to administrators only ([administrators] in the policy)"
            return View(tuple(_enclave_row(info, None) for info in enclaves), (), note)
        holders = {info.name: self._holders(info.name) for info in enclaves}
        rows = [_enclave_row(info, self._enclave_rate(info, holders[info.name])) for info in enclaves]
        waiting: dict[int, list[tuple[int, float]]] = {}
        for found in holders.values():
            for request in found.waiting if found is not None else ():
                waiting.setdefault(request.process.client, []).append((request.slots, request.waited))
        told = tuple(self._client_row(info, waiting.get(info.client, [])) for info in clients)
        there = {row.client for row in told}
        self._clients = {number: count for number, count in self._clients.items() if number in there}
        return View(tuple(rows), told, "")

    def _holders(self, name: str) -> Holders | None:
        try:
            return self._broker.holders(name, calls=True)
        except Error:  # it was destroyed meanwhile, for example
            return None

    def _enclave_rate(self, info: EnclaveInfo, holders: Holders | None) -> float | None:
        if holders is None or any(slot.calls is None for slot in holders.slots):
            return None
        now = _Count(self._clock(), sum(slot.calls or 0 for slot in holders.slots), 0.0)
        key = info.name, info.generation
        before, self._enclaves[key] = self._enclaves.get(key), now
        if before is None or now.at <= before.at:
            return None
        return max(0, now.calls - before.calls) / (now.at - before.at)

    def _client_row(self, info: ClientInfo, waiting: list[tuple[int, float]]) -> ClientRow:
        activity = info.activity
        calls = inside = None
        if activity is not None and activity.calls is not None and activity.inside is not None:
            now = _Count(self._clock(), activity.calls, activity.inside)
            before, self._clients[info.client] = self._clients.get(info.client), now
            if before is not None and now.at > before.at:
                calls = max(0, now.calls - before.calls) / (now.at - before.at)
                inside = max(0.0, now.inside - before.inside) / (now.at - before.at)
        return ClientRow(
            client=info.client,
            name=info.name,
            uid=info.uid,
            pid=info.pid,
            where=container_name(info.cgroup),
            enclaves=",".join(dict.fromkeys(grant.enclave for grant in info.grants)),
            slots=sum(len(grant.slots) for grant in info.grants),
            waiting=sum(slots for slots, _ in waiting),
            waited=max((waited for _, waited in waiting), default=0.0),
            held=activity.held if activity is not None else 0.0,
            calls=calls,
            inside=inside,
        )


def _enclave_row(info: EnclaveInfo, calls: float | None) -> EnclaveRow:
    slots = info.slots
    return EnclaveRow(
        name=info.name,
        state=info.state,
        backend=info.backend,
        pages=info.pages,
        total=slots.total,
        used=slots.used,
        free=slots.free,
        withheld=slots.withheld,
        quarantined=slots.quarantined,
        queue=slots.waiting,
        clients=info.clients,
        calls=calls,
    )
