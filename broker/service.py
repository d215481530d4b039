"""What the broker holds together: its parts, and the clients, enclaves and grants that they share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import trio
from structlog.typing import FilteringBoundLogger

from teemate import errors
from teemate._backend import choose_backend
from teemate.broker.connections.attendant import Attendant
from teemate.broker.connections.cgroups import find_tree
from teemate.broker.connections.disposal import Disposal
from teemate.broker.connections.door import DoorStatistics
from teemate.broker.connections.pages import fill_page
from teemate.broker.connections.processes import Processes
from teemate.broker.connections.requests import Answer, Stats
from teemate.broker.enclaves.addresses import Addresses
from teemate.broker.enclaves.administration import Administration
from teemate.broker.enclaves.destruction import Destruction
from teemate.broker.enclaves.draining import Lifecycle
from teemate.broker.enclaves.enclave import Enclave, EnclaveState
from teemate.broker.enclaves.generations import Generations
from teemate.broker.enclaves.upgrade import Upgrades
from teemate.broker.policy.limits import Ledger
from teemate.broker.policy.reloading import Reloading, demand_backends
from teemate.broker.policy.rules import DenialReason, Missing, Policy
from teemate.broker.restart.descriptor_store import DescriptorStore
from teemate.broker.restart.restoration import Found, Restoration
from teemate.broker.restart.resumption import Resumption
from teemate.broker.restart.state import State
from teemate.broker.slots.granting import Granting
from teemate.broker.slots.grants import Grant
from teemate.broker.slots.holders import Looking
from teemate.broker.slots.intruders import Intruders
from teemate.broker.slots.lending import Lending
from teemate.broker.slots.reclaim import Reclaimer
from teemate.broker.slots.revocation import Revocation
from teemate.broker.telemetry.audit import Audit, Complaints
from teemate.broker.telemetry.monitoring import Monitoring

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.connections.identity import Identity
    from teemate.broker.telemetry.metrics_server import MetricsServerStatistics

__all__ = ["ServerStatistics", "Service"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatistics:
    """Connections that were accepted, refused before they became clients, and ended by a breach."""

    accepted: int
    refused: int
    breaches: int
    door: DoorStatistics | None


class Service:
    """The broker's state; everything runs in trio's one thread.

    Raises
    ------
    Unsupported
        The policy wants a backend that this host does not have.

    """

    def __init__(
        self,
        policy: Policy,
        log: FilteringBoundLogger,
        store: DescriptorStore | None = None,
        found: Found | None = None,
    ) -> None:
        self.policy = policy
        self.log = log
        found = found or Found()
        self.state = State(store, found.snapshot, found.cells)
        self.choice = choose_backend(policy.broker.backend)
        self.backend = self.choice.backend
        demand_backends(policy)
        self.audit = Audit(log)
        self.complaints = Complaints(log)
        self.ledger = Ledger(policy.limits)
        self.cgroup_tree = find_tree(policy.broker.cgroup_hierarchy)
        self.addresses = Addresses()
        self.processes = Processes()
        self.disposal = Disposal()
        self.reclaimer = Reclaimer(self.processes, log, self._unusable)
        self.granting = Granting(self)
        self.lending = Lending(self)
        self.administration = Administration(self)
        self.generations = Generations(self)
        self.destruction = Destruction(self)
        self.lifecycle = Lifecycle(self)
        self.intruders = Intruders(self)
        self.upgrades = Upgrades(self)
        self.revocation = Revocation(self)
        self.resumption = Resumption(self)
        self.reloading = Reloading(self)
        self.looking = Looking(self)
        self.monitoring = Monitoring()
        self.attendant = Attendant(self)
        self.clients: dict[int, Client] = {}
        self.enclaves: dict[str, Enclave] = {}
        self.grants: dict[int, Grant] = {}
        self.running = trio.Event()
        """Set when requests can be answered."""
        self.leaving = False
        """Whether the broker ends and leaves everything to the next one."""
        self.server_statistics: Callable[[], ServerStatistics] | None = None
        self.metrics_statistics: Callable[[], MetricsServerStatistics] | None = None
        self.started_at = time.time()
        self.restoration = Restoration(self, found)
        self.restoration.place()

    # -- clients ---------------------------------------------------------------

    def next_client(self) -> int:
        """Return the number of a new connection."""
        return self.state.next_number("client")

    def client_left(self, client: Client, why: str) -> None:
        """The connection is over: end its grants; closes the client's pidfd, now or when it has fired."""
        if self.leaving:
            self.processes.forget(client.pidfd)
            os.close(client.pidfd)
            return
        client.left = True
        client.drop_counters()
        self.granting.left(client, why)
        held = client.withheld
        self.state.write_client(client)
        self.processes.forget(client.pidfd)
        if held:
            self.reclaimer.take_back_at_end(client.pidfd, held)
        else:
            os.close(client.pidfd)

    def say_farewell(self, why: str) -> None:
        """Tell every client that has a resume token that there will be nothing to resume."""
        if not self.state.kept:
            return
        self.attendant.guests.end()  # who was just greeted is a client too
        error = errors.ConnectionLost(f"{why}: what this client holds is gone, connect and attach again")
        for client in self.clients.values():
            client.send({"id": None, "error": {"code": error.code, "message": error.message}})

    def require_administrator(self, client: Client, operation: str) -> None:
        """Raise Denied unless the client is an administrator."""
        if not self.policy.administrators.includes(client.identity):
            missing = Missing(DenialReason.ADMINISTRATORS, "[administrators] uids or gids")
            raise self.denied(client, operation, missing)

    def denied(self, client: Client, operation: str, missing: Missing) -> errors.Denied:
        """Return the error for a denial, recorded: the log names the rule, the client hears nothing of it."""
        self.audit.denied(client.identity, client=client.number, operation=operation, missing=missing)
        return errors.Denied(
            f"the policy does not allow {operation} to uid {client.identity.uid}: its log names the rule"
        )

    # -- enclaves --------------------------------------------------------------

    def enclave(self, name: str) -> Enclave:
        """Return the enclave of that name.

        Raises
        ------
        NotFound

        """
        enclave = self.enclaves.get(name)
        if enclave is None and name in self.administration.building:
            raise errors.Busy(f"enclave {name!r} is being built: try again")
        if enclave is None and self.lifecycle.stored(name) is not None:
            raise errors.Draining(
                f"enclave {name!r} was taken down to empty the host: `teemate undrain --all` brings it back"
            )
        if enclave is None and name in self.administration.not_built:
            raise errors.NotFound(f"enclave {name!r} could not be built: the broker's log has the reason")
        if enclave is None:
            raise errors.NotFound(f"there is no enclave {name!r}: `teemate status` lists those that are")
        return enclave

    def _unusable(self, enclave: Enclave) -> None:
        """Nobody new gets into the enclave any more: who holds a lost one is told, and it is built again."""
        if enclave.state is EnclaveState.LOST:
            self.tell_lost(enclave)
        self.generations.replace(enclave)

    def tell_lost(self, enclave: Enclave) -> None:
        """Send every holder of a grant on the enclave the event that it is gone."""
        for number in enclave.grants:
            grant = self.grants[number]
            grant.client.send({"event": "lost", "grant": number, "enclave": enclave.name})

    def tell_holders(self, enclave: Enclave, event: str) -> None:
        """Send every connection that holds a grant on the enclave an event about all of it, once each."""
        for client in {self.grants[number].client for number in enclave.grants}:
            client.send({"event": event, "enclave": enclave.name, "generation": enclave.generation})

    def list_enclaves(self, client: Client) -> list[dict[str, object]]:
        """Return what the client may attach to, owns, or administers."""
        everything = self.policy.administrators.includes(client.identity)
        return [
            enclave.info()
            for enclave in self.enclaves.values()
            if everything
            or enclave.policy.owner == client.identity.uid
            or self.missing_rule(client, enclave) is None
        ]

    def missing_rule(self, client: Client, enclave: Enclave) -> Missing | None:
        """Return the rule that the client would need to attach, None when it may."""
        return self.missing_for(client.identity, enclave)

    def missing_for(self, identity: Identity, enclave: Enclave) -> Missing | None:
        """Return the same for whoever is that."""
        return enclave.policy.missing_for_attach(
            identity, self.cgroup_tree, backend=enclave.backend, debug=enclave.built.debug
        )

    def stats(self, args: Stats) -> Answer:
        """Return the statistics of every part; of users and enclaves as many as fit, and where to go on."""
        users = [(account.uid, asdict(account)) for account in self.ledger.statistics().accounts]
        users_page = fill_page(users, after=args.users_after)
        enclaves = [(name, asdict(enclave.statistics())) for name, enclave in self.enclaves.items()]
        enclaves_page = fill_page(enclaves, after=args.enclaves_after)
        parts: dict[str, object] = {
            "clients": len(self.clients),
            "grants": len(self.grants),
            "granted": self.audit.granted_count,
            "denied": self.audit.denied_count,
            "revoked": self.audit.revoked_count,
            "server": asdict(self.server_statistics()) if self.server_statistics else {},
            "metrics": asdict(self.metrics_statistics()) if self.metrics_statistics else {},
            "addresses": asdict(self.addresses.statistics()),
            "processes": asdict(self.processes.statistics()),
            "disposal": asdict(self.disposal.statistics()),
            "users": users_page.entries,
            "granting": asdict(self.granting.statistics()),
            "attendant": asdict(self.attendant.statistics()),
            "refused": self.ledger.statistics().refused,
            "enclaves": enclaves_page.entries,
            "state": asdict(self.state.statistics()),
            "resumption": asdict(self.resumption.statistics()),
            "revocations": asdict(self.revocation.statistics()),
            "generations": asdict(self.generations.statistics()),
            "intruders": asdict(self.intruders.statistics()),
            "lifecycle": asdict(self.lifecycle.statistics()),
            "reloading": asdict(self.reloading.statistics()),
            "monitoring": asdict(self.monitoring.statistics()),
        }
        if not (users_page.more or enclaves_page.more):
            return Answer({"stats": parts})
        last = {"users_after": users_page.last, "enclaves_after": enclaves_page.last}
        return Answer({"stats": parts, "next": {key: at for key, at in last.items() if at is not None}})

    # -- running ---------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch processes and keep enclaves until cancelled; started when the boot enclaves are there."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.processes.run)
                await nursery.start(self.reclaimer.run)
                await nursery.start(self.attendant.run)
                nursery.start_soon(self.state.run)
                nursery.start_soon(self.resumption.run)
                nursery.start_soon(self.monitoring.run)
                expected = self.administration.expect_boot_enclaves()
                self.running.set()
                await self.restoration.recover()
                await self.administration.start_boot_enclaves(expected)
                task_status.started()
        finally:
            with trio.CancelScope(shield=True):
                await self.administration.close()
