"""What the broker holds together, and the operations of ordinary clients over it.

Nothing on the path of `attach` waits for a warden, a thread or a file: slots are armed ahead,
so an attach that finds slots free is answered in the task that received it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import trio
from structlog.typing import FilteringBoundLogger

from teemate import errors
from teemate._backend import choose_backend
from teemate.broker import requests
from teemate.broker.addresses import Addresses
from teemate.broker.administration import Administration
from teemate.broker.audit import Audit, Complaints
from teemate.broker.cgroups import find_tree
from teemate.broker.descriptor_store import DescriptorStore
from teemate.broker.disposal import Disposal
from teemate.broker.enclaves import Enclave, EnclaveState
from teemate.broker.generations import Generations
from teemate.broker.grants import Grant, Waiter
from teemate.broker.identity import principal
from teemate.broker.intruders import Intruders
from teemate.broker.lifecycle import Lifecycle
from teemate.broker.limits import Charge, Ledger, Resource
from teemate.broker.policy import EnclavePolicy, Policy
from teemate.broker.processes import Processes
from teemate.broker.reclaim import Reclaimer
from teemate.broker.requests import Answer
from teemate.broker.restoration import Found, Restoration
from teemate.broker.resumption import Resumption
from teemate.broker.revocation import Revocation
from teemate.broker.slots import SlotState, Ticket
from teemate.broker.state import State
from teemate.broker.upgrade import Upgrades

if TYPE_CHECKING:
    from teemate.broker.clients import Client

__all__ = ["ServerStatistics", "Service"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatistics:
    """Connections that were accepted, refused before they became clients, and ended by a breach."""

    accepted: int
    refused: int
    breaches: int


def _demand(enclave: EnclavePolicy) -> None:
    """Refuse to start without a backend that an enclave is to have."""
    try:
        choose_backend(enclave.backend)
    except errors.Unsupported as error:
        raise errors.Unsupported(f"enclave {enclave.name}: {error.message}", error.detail) from None


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
        self.state = State(store, found.snapshot)
        self.choice = choose_backend(policy.broker.backend)
        self.backend = self.choice.backend
        for enclave in policy.enclaves:
            if enclave.backend != "auto":
                _demand(enclave)
        self.audit = Audit(log)
        self.complaints = Complaints(log)
        self.ledger = Ledger(policy.limits)
        self.cgroup_tree = find_tree(policy.broker.cgroup_hierarchy)
        self.addresses = Addresses()
        self.processes = Processes()
        self.disposal = Disposal()
        self.reclaimer = Reclaimer(self.processes, log, self._unusable)
        self.administration = Administration(self)
        self.generations = Generations(self)
        self.lifecycle = Lifecycle(self)
        self.intruders = Intruders(self)
        self.upgrades = Upgrades(self)
        self.revocation = Revocation(self)
        self.resumption = Resumption(self)
        self.clients: dict[int, Client] = {}
        self.enclaves: dict[str, Enclave] = {}
        self.grants: dict[int, Grant] = {}
        self.running = trio.Event()
        """Set when requests can be answered."""
        self.leaving = False
        """Whether the broker ends and leaves everything to the next one."""
        self.server_statistics: Callable[[], ServerStatistics] | None = None
        self.restoration = Restoration(self, found)
        self.restoration.place()

    # -- clients ---------------------------------------------------------------

    def next_client(self) -> int:
        """Return the number of a new connection."""
        return self.state.next_number("client")

    def client_left(self, client: Client, why: str) -> None:
        """The connection is over: end its grants; closes the client's pidfd, now or when it has fired.

        The process may live on (it closed the connection, or another program runs in it now): until it
        ends its slots are withheld.  In the common case it is ending, and they are back soon.
        """
        if self.leaving:
            self.processes.forget(client.pidfd)
            os.close(client.pidfd)
            return
        client.left = True
        held = client.withheld
        for grant in list(client.grants.values()):
            indices = [index for index in grant.slots if self._state(grant, index) is SlotState.ASSIGNED]
            if indices:
                self.reclaimer.withhold(grant, indices, f"the connection ended ({why}), its process has not")
            self._end(grant, why)
            if grant.charges:
                held.append(grant)
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
        error = errors.ConnectionLost(f"{why}: what this client holds is gone, connect and attach again")
        for client in self.clients.values():
            client.send({"id": None, "error": {"code": error.code, "message": error.message}})

    def require_administrator(self, client: Client, operation: str) -> None:
        """Raise Denied unless the client is an administrator."""
        if not self.policy.administrators.includes(client.identity):
            raise self.denied(client, operation, "[administrators] uids or gids")

    def denied(self, client: Client, operation: str, rule: str) -> errors.Denied:
        """Return the error for a denial, recorded: the log names the rule, the client hears nothing of it."""
        self.audit.denied(client.identity, client=client.number, operation=operation, rule=rule)
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
            raise errors.Busy(f"enclave {name!r} is still being built: try again")
        if enclave is None and self.lifecycle.stored(name):
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
            or self._missing_rule(client, enclave) is None
        ]

    def _missing_rule(self, client: Client, enclave: Enclave) -> str | None:
        return enclave.policy.missing_for_attach(
            client.identity, self.cgroup_tree, backend=enclave.backend, debug=enclave.built.debug
        )

    # -- attach and acquire ------------------------------------------------------

    def attach(self, client: Client, args: requests.Attach) -> requests.Result:
        """Give a grant with `args.slots` slots, now or when they are free."""
        enclave = self.enclave(args.enclave)
        missing = self._missing_rule(client, enclave)
        if missing is not None:
            raise self.denied(client, "attach", missing)
        rebuilt = self.generations.pending(enclave.name)
        if rebuilt is not None:
            return self._attach_when_rebuilt(client, args, enclave, rebuilt)
        self._require_ready(enclave)
        policy = enclave.policy
        uid = client.identity.uid
        first = not any(grant.enclave is enclave for grant in client.grants.values())
        if first and enclave.clients_by_uid.get(uid, 0) >= policy.clients_per_uid:
            raise errors.LimitReached(
                f"uid {uid} has {policy.clients_per_uid} clients on enclave {enclave.name!r}:"
                f" the policy sets this in [[enclave]] clients_per_uid",
                {"limit": "clients_per_uid", "maximum": policy.clients_per_uid},
            )
        self._require_possible(client, enclave, args.slots)
        charge = client.account.charge(Resource.GRANTS)
        grant = Grant(self.state.next_number("grant"), client, enclave, charge)
        try:
            ticket = self._request_slots(grant, args.slots)
        except BaseException:
            charge.release()
            raise
        # From here on the grant counts, so that two attaches cannot both pass the limits above.
        client.grants[grant.number] = grant
        self.grants[grant.number] = grant
        enclave.grants.add(grant.number)
        if first:
            enclave.clients_by_uid[uid] = enclave.clients_by_uid.get(uid, 0) + 1
        if ticket.slots is not None:
            return self._attached(grant, ticket.slots)
        return self._attach_later(grant, ticket, args.wait)

    async def _attach_when_rebuilt(
        self, client: Client, args: requests.Attach, enclave: Enclave, rebuilt: trio.Event
    ) -> Answer:
        """Wait for the next generation as for slots, then attach to it."""
        longest = enclave.policy.wait if args.wait is None else min(args.wait, enclave.policy.wait)
        started = trio.current_time()
        with trio.move_on_after(longest):
            await rebuilt.wait()
        if not rebuilt.is_set():
            raise errors.EnclaveLost(
                f"enclave {enclave.name!r} is {enclave.state.value}: {enclave.reason}; its next generation"
                f" was not there within {longest:g} s, which [[enclave]] wait bounds: attach again later"
            )
        left = max(0.0, longest - (trio.current_time() - started))
        result = self.attach(client, replace(args, wait=left))
        return result if isinstance(result, Answer) else await result

    async def _attach_later(self, grant: Grant, ticket: Ticket, wait: float | None) -> Answer:
        try:
            return self._attached(grant, await self._wait(grant, ticket, wait))
        except BaseException:
            if not grant.over:
                self._end(grant, "no slots")
            raise

    def _attached(self, grant: Grant, slots: tuple[int, ...]) -> Answer:
        enclave = grant.enclave
        built = enclave.built
        enclave.attaches += 1
        grant.handed_out = True
        ok = self._attach_ok(grant, slots)
        outcome: dict[str, object] = {"grant": grant.number, "slots": slots}
        return Answer(
            ok,
            (built.fd, built.arena),
            lambda: self._handed_out(grant, slots),
            outcome=outcome,
            undo=lambda: self._not_handed_out(grant, slots),
        )

    def _attach_ok(self, grant: Grant, slots: tuple[int, ...]) -> dict[str, object]:
        enclave = grant.enclave
        return {
            "grant": grant.number,
            "enclave": enclave.info(),
            "segments": enclave.segments,
            "arena": enclave.built.base + enclave.built.size + 4096,
            "slots": self._hand_out(grant, slots),
        }

    def _not_handed_out(self, grant: Grant, slots: tuple[int, ...]) -> None:
        """The reply could not be sent: nobody has seen the keys, so the slots are as good as new."""
        for index in slots:
            grant.charges.pop(index).release()
            grant.enclave.slots.returned(index)
            self.reclaimer.serve(grant.enclave.slots.armed(index))
        self._end(grant, "its descriptors could not be sent")

    def acquire(self, client: Client, args: requests.Acquire) -> requests.Result:
        """Give a grant more slots, now or when they are free."""
        grant = self._grant(client, args.grant)
        if grant.revoked:
            raise errors.Revoked(f"grant {grant.number} was taken back: detach it, then attach again")
        self._require_ready(grant.enclave)
        self._require_possible(client, grant.enclave, args.count)
        ticket = self._request_slots(grant, args.count)
        if ticket.slots is not None:
            return self._acquired(grant, ticket.slots)
        return self._acquire_later(grant, ticket, args.wait)

    async def _acquire_later(self, grant: Grant, ticket: Ticket, wait: float | None) -> Answer:
        return self._acquired(grant, await self._wait(grant, ticket, wait))

    def _acquired(self, grant: Grant, slots: tuple[int, ...]) -> Answer:
        outcome: dict[str, object] = {"grant": grant.number, "slots": slots}
        ok = {"slots": self._hand_out(grant, slots)}
        return Answer(ok, after=lambda: self._handed_out(grant, slots), outcome=outcome)

    def repeat(self, client: Client, operation: str, outcome: dict[str, Any]) -> Answer:
        """Answer what the last broker did and maybe answered.

        Raises
        ------
        Revoked
            It was an attach or acquire, and what it gave has been taken back since.

        """
        if operation not in ("attach", "slots.acquire"):
            return Answer(outcome)
        grant = client.grants.get(outcome["grant"])
        if grant is None:
            raise errors.Revoked(f"grant {outcome['grant']} was taken back meanwhile")
        slots = tuple(index for index in outcome["slots"] if index in grant.charges)
        if operation == "slots.acquire":
            return Answer({"slots": self._hand_out(grant, slots)}, outcome=outcome)
        built = grant.enclave.built
        return Answer(self._attach_ok(grant, slots), (built.fd, built.arena), outcome=outcome)

    @staticmethod
    def _require_ready(enclave: Enclave) -> None:
        name, state = enclave.name, enclave.state
        if state is EnclaveState.DRAINING:
            raise errors.Draining(f"enclave {name!r} takes no new clients: {enclave.reason}")
        if state is not EnclaveState.READY:
            raise errors.EnclaveLost(f"enclave {name!r} is {state.value}: {enclave.reason}")

    def _require_possible(self, client: Client, enclave: Enclave, count: int) -> None:
        """Refuse at once what waiting could not help."""
        allowed = enclave.policy.slots_per_client
        left_behind = self.reclaimer.left_behind.get(client.identity.pid, ())
        grants = [*client.grants.values(), *client.withheld, *left_behind]
        held = sum(len(grant.charges) + grant.awaited for grant in grants if grant.enclave is enclave)
        if held + count > allowed:
            before = sum(len(grant.charges) for grant in left_behind if grant.enclave is enclave)
            earlier = f" ({before} withheld from earlier connections of its process)" if before else ""
            raise errors.Busy(
                f"at most {allowed} slots a client of enclave {enclave.name!r}, this has {held}{earlier}"
                f" and asked for {count}: the policy sets this in [[enclave]] slots_per_client",
                {"limit": "slots_per_client", "maximum": allowed, "held": held, "asked": count},
            )
        usable = enclave.slots.usable
        if count > usable:
            raise errors.Busy(
                f"enclave {enclave.name!r} has {usable} usable slots, {count} were asked for:"
                f" `teemate image build --slots` makes an image with more",
                {"limit": "slots of the image", "maximum": usable, "asked": count},
            )

    def _request_slots(self, grant: Grant, count: int) -> Ticket:
        """Charge the user for the slots and queue for them; a Waiter keeps those of a request."""
        account = grant.client.account
        charges: list[Charge] = []
        try:
            charges.extend(account.charge(Resource.SLOTS) for _ in range(count))
        except errors.LimitReached:
            for charge in charges:
                charge.release()
            raise
        ticket = grant.enclave.slots.request(grant.client.identity.uid, grant.number, count)
        if ticket.slots is None:
            self.reclaimer.waiters[ticket] = Waiter(charges)
            grant.awaited += count
        else:
            grant.charges.update(zip(ticket.slots, charges, strict=True))
        self.reclaimer.serve(grant.enclave.slots.serve_waiting())
        return ticket

    async def _wait(self, grant: Grant, ticket: Ticket, wait: float | None) -> tuple[int, ...]:
        """Return the ticket's slots when it is served; gives everything back when it is not."""
        enclave = grant.enclave
        waiter = self.reclaimer.waiters[ticket]
        longest = enclave.policy.wait if wait is None else min(wait, enclave.policy.wait)
        taken = False
        try:
            await enclave.recovered.wait()  # after a restart slots are not free yet that were, or will be
            with trio.move_on_after(longest):
                await waiter.event.wait()
            if waiter.error is not None:
                raise waiter.error
            if ticket.slots is None:
                counts = enclave.slots.statistics()
                raise errors.Busy(
                    f"no {ticket.count} slots of enclave {enclave.name!r} came free within {longest:g} s: of"
                    f" {counts.total}, {counts.assigned} are in use, {counts.withheld} withheld,"
                    f" {counts.quarantined} quarantined ([[enclave]] wait bounds the waiting)",
                    {
                        "limit": "slots of the image",
                        "maximum": enclave.slots.usable,
                        "asked": ticket.count,
                        "waited": longest,
                    },
                )
            if grant.revoked or grant.over:
                raise errors.Revoked(f"grant {grant.number} was taken back while it waited for slots")
            taken = True
            grant.charges.update(zip(ticket.slots, waiter.charges, strict=True))
            return ticket.slots
        finally:
            del self.reclaimer.waiters[ticket]
            grant.awaited -= ticket.count
            if not taken:
                for charge in waiter.charges:
                    charge.release()
                if ticket.slots is None:
                    self.reclaimer.serve(enclave.slots.cancel(ticket))
                else:  # nobody has seen their keys: they are as good as new
                    for index in ticket.slots:
                        enclave.slots.returned(index)
                        self.reclaimer.serve(enclave.slots.armed(index))

    def _hand_out(self, grant: Grant, slots: tuple[int, ...]) -> list[dict[str, object]]:
        """Return the slots as the protocol has them, each bound to the client's identity."""
        enclave, identity = grant.enclave, grant.client.identity
        if enclave.warden is None:
            enclave.used.update(slots)
            enclave.on_change(enclave)
        text = identity.principal_text(with_cgroup=enclave.policy.with_cgroup, tree=self.cgroup_tree)
        digest = principal(text)
        handed = []
        for index in slots:
            key = enclave.slot_keys[index]
            handed.append(
                {
                    "slot": index,
                    "tcs": enclave.built.tcs[index],
                    "generation": key.generation,
                    "key": key.key,
                    "bind": enclave.key.bind(
                        index, key.generation, digest, identity.uid, identity.gid, grant.number
                    ),
                }
            )
        return handed

    def _handed_out(self, grant: Grant, slots: tuple[int, ...]) -> None:
        """Record it and watch the process, once the reply is on its way."""
        client = grant.client
        if not client.watched:  # a child of fork() may hold the connection open beyond the process's end
            client.watched = True
            self.processes.watch(client.pidfd, client.close)
        self.audit.granted(
            client.identity,
            client=client.number,
            enclave=grant.enclave.name,
            grant=grant.number,
            slots=list(slots),
        )

    # -- release and detach ------------------------------------------------------

    def release(self, client: Client, args: requests.Release) -> requests.Result:
        """Take slots back; without `clean` they are withheld for as long as the process lives."""
        grant = self._grant(client, args.grant)
        foreign = [index for index in args.slots if index not in grant.charges]
        if foreign:
            raise errors.NotFound(
                f"grant {grant.number} does not hold slot {foreign[0]}; nothing was released"
            )
        if args.stolen:
            self.intruders.stolen(grant, args.slots)
        withheld = self._give_back(grant, list(args.slots), clean=args.clean)
        answer: dict[str, object] = {"released": len(args.slots) - withheld}
        if withheld:
            answer["withheld"] = withheld
        return Answer(answer)

    def detach(self, client: Client, args: requests.Detach) -> requests.Result:
        """End a grant; its slots go the way of `release`."""
        grant = self._grant(client, args.grant)
        self._give_back(grant, grant.slots, clean=args.clean)
        if grant.charges:
            client.withheld.append(grant)
        self._end(grant, "detached")
        return Answer({})

    def _give_back(self, grant: Grant, indices: list[int], *, clean: bool) -> int:
        """Returns how many of the slots are withheld."""
        if clean:
            for index in indices:
                self.reclaimer.take_back(grant, index, dead=False)
            return 0
        fresh = [index for index in indices if self._state(grant, index) is SlotState.ASSIGNED]
        if fresh:
            self.reclaimer.withhold(grant, fresh, "given back without word that it is clean")
        return len(indices)

    @staticmethod
    def _state(grant: Grant, index: int) -> SlotState:
        return grant.enclave.slots.slots[index].state

    def _grant(self, client: Client, number: int) -> Grant:
        """Return a grant of this client; others' are not there for it."""
        grant = client.grants.get(number)
        if grant is None:
            raise errors.NotFound(f"this connection holds no grant {number}")
        return grant

    def _end(self, grant: Grant, why: str) -> None:
        """The client holds the grant no more; slots that are not back yet come back by themselves."""
        enclave, client = grant.enclave, grant.client
        grant.over = True
        del client.grants[grant.number], self.grants[grant.number]
        enclave.grants.discard(grant.number)
        if not any(other.enclave is enclave for other in client.grants.values()):
            uid = client.identity.uid
            enclave.clients_by_uid[uid] -= 1
            if not enclave.clients_by_uid[uid]:
                del enclave.clients_by_uid[uid]
        grant.charge.release()
        grant.settle()
        enclave.changed.unpark_all()
        self.audit.ended(
            client.identity, client=client.number, enclave=enclave.name, grant=grant.number, why=why
        )

    # -- administrators ------------------------------------------------------------

    def create(self, client: Client, args: requests.Create, image_fd: int) -> requests.Result:
        """See :class:`Administration`; the descriptor is its own."""
        return self.administration.create(client, args, image_fd)

    def destroy(self, client: Client, args: requests.Destroy) -> requests.Result:
        """See :class:`Administration`."""
        return self.administration.destroy(client, args)

    def drain(self, client: Client, args: requests.Drain) -> requests.Result:
        """See :class:`Lifecycle`."""
        return self.lifecycle.drain(client, args)

    def undrain(self, client: Client, args: requests.Undrain) -> requests.Result:
        """See :class:`Lifecycle`."""
        return self.lifecycle.undrain(client, args)

    def upgrade(self, client: Client, args: requests.Upgrade, image_fd: int) -> requests.Result:
        """See :class:`Upgrades`; the descriptor is its own."""
        return self.upgrades.upgrade(client, args, image_fd)

    def revoke(self, client: Client, args: requests.Revoke) -> requests.Result:
        """See :class:`Revocation`."""
        return self.revocation.revoke(client, args)

    def list_clients(self, args: requests.Clients) -> Answer:
        """See :class:`Administration`."""
        return self.administration.list_clients(args)

    def stats(self) -> Answer:
        """Return the statistics of every part."""
        parts: dict[str, object] = {
            "clients": len(self.clients),
            "grants": len(self.grants),
            "granted": self.audit.granted_count,
            "denied": self.audit.denied_count,
            "revoked": self.audit.revoked_count,
            "server": asdict(self.server_statistics()) if self.server_statistics else {},
            "addresses": asdict(self.addresses.statistics()),
            "processes": asdict(self.processes.statistics()),
            "disposal": asdict(self.disposal.statistics()),
            "users": [asdict(account) for account in self.ledger.statistics().accounts],
            "enclaves": [asdict(enclave.statistics()) for enclave in self.enclaves.values()],
            "state": asdict(self.state.statistics()),
            "resumption": asdict(self.resumption.statistics()),
            "revocations": asdict(self.revocation.statistics()),
            "generations": asdict(self.generations.statistics()),
            "intruders": asdict(self.intruders.statistics()),
            "lifecycle": asdict(self.lifecycle.statistics()),
        }
        return Answer({"stats": parts})

    # -- running ---------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch processes and keep enclaves until cancelled; started when the boot enclaves are there."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.processes.run)
                await nursery.start(self.reclaimer.run)
                nursery.start_soon(self.state.run)
                nursery.start_soon(self.resumption.run)
                self.running.set()
                await self.restoration.recover()
                await self.administration.start_boot_enclaves()
                task_status.started()
        finally:
            with trio.CancelScope(shield=True):
                await self.administration.close()
