"""The operations of ordinary clients: grants, and the slots that go with them.

Nothing on the path of `attach` waits for a warden, a thread or a file: slots are armed ahead,
so an attach that finds slots free is answered in the task that received it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, final

import trio

from teemate import errors
from teemate.broker.connections import requests
from teemate.broker.connections.identity import principal
from teemate.broker.connections.requests import Answer
from teemate.broker.enclaves.enclave import Enclave, EnclaveState
from teemate.broker.policy.limits import Charge, Resource
from teemate.broker.slots.grants import Grant, Waiter
from teemate.broker.slots.shortage import grants_text, shortage
from teemate.broker.slots.table import SlotState, Ticket
from teemate.broker.telemetry.durations import ATTACH_BOUNDS, Durations, DurationStatistics

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.policy.rules import EnclavePolicy
    from teemate.broker.service import Service

__all__ = ["Granting", "GrantingStatistics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantingStatistics:
    """How long attaches took: from when the request was read until its reply was sent or queued."""

    attaches: DurationStatistics


@final
class Granting:
    """Gives grants and slots, and takes back what is given up."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._attaches = Durations(ATTACH_BOUNDS)

    # -- attach and acquire ----------------------------------------------------

    def attach(self, client: Client, args: requests.Attach, asked: float | None = None) -> requests.Result:
        """Give a grant with `args.slots` slots, now or when they are free; `asked`: if that was before."""
        asked = time.monotonic() if asked is None else asked
        build = self._service.administration.building.get(args.enclave)
        if build is not None:
            missing = build.missing_rule(client.identity, self._service.cgroup_tree)
            if missing is not None:
                raise self._service.denied(client, "attach", missing)
            return self._attach_when(build.over, build.policy, build.late, client, args, asked)
        enclave = self._service.enclave(args.enclave)
        missing = self._service.missing_rule(client, enclave)
        if missing is not None:
            raise self._service.denied(client, "attach", missing)
        rebuilt = self._service.generations.pending(enclave)
        if rebuilt is not None:
            late = partial(self._service.generations.late, enclave)
            return self._attach_when(rebuilt, enclave.policy, late, client, args, asked)
        self._require_ready(enclave)
        policy = enclave.policy
        uid = client.identity.uid
        first = self._is_first(client, enclave)
        ahead = client.account.ahead
        if first and ahead and enclave.clients_by_uid.get(uid, 0) + ahead >= policy.clients_per_uid:
            self._service.attendant.call_in(client.account)
        if first and enclave.clients_by_uid.get(uid, 0) >= policy.clients_per_uid:
            held = [self._service.grants[number] for number in enclave.grants]
            where = grants_text(grant for grant in held if grant.client.identity.uid == uid)
            client.account.bucket.take(len(held) / 64)
            raise errors.LimitReached(
                f"uid {uid} has {enclave.clients_by_uid[uid]} of {policy.clients_per_uid} clients on enclave"
                f" {enclave.name!r} ({where}): the policy sets this in [[enclave]] clients_per_uid",
                {
                    "limit": "clients_per_uid",
                    "maximum": policy.clients_per_uid,
                    "used": enclave.clients_by_uid[uid],
                    "setting": "[[enclave]] clients_per_uid",
                },
            )
        self._require_possible(client, enclave, args.slots)
        charge = self._charge(client, Resource.GRANTS)
        grant = Grant(self._service.state.next_number("grant"), client, enclave, charge)
        try:
            ticket = self._request_slots(grant, args.slots)
        except BaseException:
            charge.release()
            raise
        # From here on the grant counts, so that two attaches cannot both pass the limits above.
        self._list(grant, first=first)
        if ticket.slots is not None:
            return self._attached(grant, ticket.slots, asked)
        return self._attach_later(grant, ticket, args.wait, asked)

    @staticmethod
    def _is_first(client: Client, enclave: Enclave) -> bool:
        """Whether the client has no grant on the enclave yet."""
        return not any(grant.enclave is enclave for grant in client.grants.values())

    def _list(self, grant: Grant, *, first: bool) -> None:
        client, enclave = grant.client, grant.enclave
        client.grants[grant.number] = grant
        self._service.grants[grant.number] = grant
        enclave.grants.add(grant.number)
        if first:
            uid = client.identity.uid
            enclave.clients_by_uid[uid] = enclave.clients_by_uid.get(uid, 0) + 1

    def given(
        self, client: Client, enclave: Enclave, number: int, index: int, request: int, seconds: float
    ) -> None:
        """Have as a grant what the attendant gave to a client that held nothing."""
        account = client.account
        grant = Grant(number, client, enclave, account.owe(Resource.GRANTS))
        grant.charges[index] = account.owe(Resource.SLOTS)
        enclave.slots.take_ahead(index, client.identity.uid, number)
        self._list(grant, first=self._is_first(client, enclave))
        enclave.attaches += 1
        grant.handed_out = True
        client.requests += 1
        outcome: dict[str, object] = {"grant": number, "slots": (index,)}
        self._service.state.answered(client, request, "attach", outcome)
        self._attaches.observe(seconds)
        self._handed_out(grant, (index,))

    async def _attach_when(
        self,
        there: trio.Event,
        policy: EnclavePolicy,
        late: Callable[[float], errors.Error],
        client: Client,
        args: requests.Attach,
        asked: float,
    ) -> Answer:
        """Wait for an enclave as for slots, then attach to it within what is left of the time."""
        longest = _longest(policy, args.wait)
        started = trio.current_time()
        with trio.move_on_after(longest):
            await there.wait()
        if not there.is_set():
            raise late(longest)
        left = max(0.0, longest - (trio.current_time() - started))
        result = self.attach(client, replace(args, wait=left), asked)
        return result if isinstance(result, Answer) else await result

    async def _attach_later(self, grant: Grant, ticket: Ticket, wait: float | None, asked: float) -> Answer:
        try:
            return self._attached(grant, await self._wait(grant, ticket, wait), asked)
        except BaseException:
            if not grant.over:
                self._end(grant, "no slots")
            raise

    def _attached(self, grant: Grant, slots: tuple[int, ...], asked: float) -> Answer:
        enclave = grant.enclave
        built = enclave.built
        enclave.attaches += 1
        grant.handed_out = True
        ok = self._attach_ok(grant, slots)
        outcome: dict[str, object] = {"grant": grant.number, "slots": slots}

        def sent() -> None:
            self._service.attendant.count(enclave)
            self._attaches.observe(time.monotonic() - asked)
            self._handed_out(grant, slots)

        return Answer(
            ok,
            (built.fd, built.arena),
            sent,
            outcome=outcome,
            undo=lambda: self._not_handed_out(grant, slots),
        )

    def _attach_ok(self, grant: Grant, slots: tuple[int, ...]) -> dict[str, object]:
        enclave = grant.enclave
        return {
            "grant": grant.number,
            "enclave": enclave.info(),
            "segments": enclave.segments,
            "arena": enclave.arena_address,
            "slots": self._hand_out(grant, slots),
        }

    def _not_handed_out(self, grant: Grant, slots: tuple[int, ...]) -> None:
        """The reply could not be sent: nobody has seen the keys, so the slots are as good as new."""
        for index in slots:
            grant.give_back(index)
            grant.enclave.slots.returned(index)
            self._service.reclaimer.serve(grant.enclave.slots.armed(index))
        self._end(grant, "its descriptors could not be sent")

    def acquire(self, client: Client, args: requests.Acquire) -> requests.Result:
        """Give a grant more slots, now or when they are free."""
        grant = self.grant_of(client, args.grant)
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
        left_behind = self._service.reclaimer.left_behind.get(client.identity.pid, ())
        grants = [*client.grants.values(), *client.withheld, *left_behind]
        held = sum(len(grant.charges) + grant.awaited for grant in grants if grant.enclave is enclave)
        if held + count > allowed:
            before = sum(len(grant.charges) for grant in left_behind if grant.enclave is enclave)
            earlier = f" ({before} withheld from earlier connections of its process)" if before else ""
            raise errors.Busy(
                f"at most {allowed} slots a client of enclave {enclave.name!r}, this has {held}{earlier}"
                f" and asked for {count}: the policy sets this in [[enclave]] slots_per_client",
                {
                    "limit": "slots_per_client",
                    "maximum": allowed,
                    "held": held,
                    "asked": count,
                    "setting": "[[enclave]] slots_per_client",
                },
            )
        usable = enclave.slots.usable
        if count > usable:
            counts = enclave.slots.statistics()
            lost = f" ({counts.quarantined} of {counts.total} in quarantine)" if counts.quarantined else ""
            raise errors.Busy(
                f"enclave {enclave.name!r} has {usable} usable slots{lost}, {count} were asked for; slots is"
                " set at image build, see `teemate image build --slots`",
                {
                    "limit": "slots of the image",
                    "maximum": usable,
                    "asked": count,
                    "setting": "teemate image build --slots",
                },
            )

    def _charge(self, client: Client, resource: Resource) -> Charge:
        """Charge the user, or say where its other processes are that have it all."""
        try:
            return client.account.charge(resource)
        except errors.LimitReached as error:
            uid = client.identity.uid
            client.account.bucket.take(len(self._service.grants) / 64)
            mine = [grant for grant in self._service.grants.values() if grant.client.identity.uid == uid]
            held = [grant for grant in mine for _ in (grant.charges if resource is Resource.SLOTS else (0,))]
            where = f" (its processes: {grants_text(held)})" if held else ""
            raise errors.LimitReached(f"{error.message}{where}", error.detail) from None

    def _request_slots(self, grant: Grant, count: int) -> Ticket:
        """Charge the user for the slots and queue for them; a Waiter keeps those of a request."""
        charges: list[Charge] = []
        try:
            charges.extend(self._charge(grant.client, Resource.SLOTS) for _ in range(count))
        except errors.LimitReached:
            for charge in charges:
                charge.release()
            raise
        ticket = grant.enclave.slots.request(grant.client.identity.uid, grant.number, count)
        if ticket.slots is None:
            self._service.reclaimer.waiters[ticket] = Waiter(charges)
            grant.awaited += count
        else:
            grant.charges.update(zip(ticket.slots, charges, strict=True))
        self._service.reclaimer.serve(grant.enclave.slots.serve_waiting())
        return ticket

    async def _wait(self, grant: Grant, ticket: Ticket, wait: float | None) -> tuple[int, ...]:
        """Return the ticket's slots when it is served; gives everything back when it is not."""
        enclave = grant.enclave
        waiter = self._service.reclaimer.waiters[ticket]
        longest = _longest(enclave.policy, wait)
        taken = False
        try:
            await enclave.recovered.wait()  # after a restart slots are not free yet that were, or will be
            with trio.move_on_after(longest):
                await waiter.event.wait()
            if waiter.error is not None:
                raise waiter.error
            if ticket.slots is None:
                found = shortage(self._service, grant.client, enclave)
                wanted = "a slot" if ticket.count == 1 else f"{ticket.count} slots"
                raise errors.Busy(
                    f"{found.text}; wait={longest:g} s for {wanted} elapsed ([[enclave]] wait bounds it,"
                    f" {enclave.policy.wait:g} s); slots is set at image build, see `teemate image build"
                    " --slots`",
                    {
                        **found.detail,
                        "asked": ticket.count,
                        "waited": longest,
                        "setting": "teemate image build --slots",
                    },
                )
            if grant.revoked or grant.over:
                raise errors.Revoked(f"grant {grant.number} was taken back while it waited for slots")
            taken = True
            grant.charges.update(zip(ticket.slots, waiter.charges, strict=True))
            return ticket.slots
        finally:
            del self._service.reclaimer.waiters[ticket]
            enclave.waits.observe(time.monotonic() - waiter.since)
            grant.awaited -= ticket.count
            if not taken:
                for charge in waiter.charges:
                    charge.release()
                if ticket.slots is None:
                    self._service.reclaimer.serve(enclave.slots.cancel(ticket))
                else:  # nobody has seen their keys: they are as good as new
                    for index in ticket.slots:
                        enclave.slots.returned(index)
                        self._service.reclaimer.serve(enclave.slots.armed(index))

    def _hand_out(self, grant: Grant, slots: tuple[int, ...]) -> list[dict[str, object]]:
        """Return the slots as the protocol has them, each bound to the client's identity."""
        enclave, identity = grant.enclave, grant.client.identity
        if enclave.warden is None:
            enclave.used.update(slots)
            enclave.on_change(enclave)
        text = identity.principal_text(with_cgroup=enclave.policy.with_cgroup, tree=self._service.cgroup_tree)
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
            self._service.processes.watch(client.pidfd, client.close)
        self._service.audit.granted(
            client.identity,
            client=client.number,
            enclave=grant.enclave.name,
            grant=grant.number,
            slots=list(slots),
        )

    def statistics(self) -> GrantingStatistics:
        """What was given so far."""
        return GrantingStatistics(attaches=self._attaches.statistics())

    # -- release and detach ----------------------------------------------------

    def release(self, client: Client, args: requests.Release) -> requests.Result:
        """Take slots back; without `clean` they are withheld for as long as the process lives."""
        grant = self.grant_of(client, args.grant)
        foreign = [index for index in args.slots if index not in grant.charges]
        if foreign:
            raise errors.NotFound(
                f"grant {grant.number} does not hold slot {foreign[0]}; nothing was released"
            )
        if args.stolen:
            self._service.intruders.stolen(grant, args.slots)
        withheld = self._give_back(grant, list(args.slots), clean=args.clean)
        answer: dict[str, object] = {"released": len(args.slots) - withheld}
        if withheld:
            answer["withheld"] = withheld
        return Answer(answer)

    def detach(self, client: Client, args: requests.Detach) -> requests.Result:
        """End a grant; its slots go the way of `release`."""
        grant = self.grant_of(client, args.grant)
        self._give_back(grant, grant.slots, clean=args.clean)
        self._end(grant, "detached")
        return Answer({})

    def left(self, client: Client, why: str) -> None:
        """End the grants of a client whose connection is over.

        The process may live on (it closed the connection, or another program runs in it now): until it
        ends its slots are withheld.  In the common case it is ending, and they are back soon.
        """
        for grant in list(client.grants.values()):
            indices = [index for index in grant.slots if self._state(grant, index) is SlotState.ASSIGNED]
            if indices:
                self._service.reclaimer.withhold(
                    grant, indices, f"the connection ended ({why}), its process has not"
                )
            self._end(grant, why)

    def _give_back(self, grant: Grant, indices: list[int], *, clean: bool) -> int:
        """Returns how many of the slots are withheld."""
        if clean:
            for index in indices:
                self._service.reclaimer.take_back(grant, index, dead=False)
            return 0
        fresh = [index for index in indices if self._state(grant, index) is SlotState.ASSIGNED]
        if fresh:
            self._service.reclaimer.withhold(grant, fresh, "given back without word that it is clean")
        return len(indices)

    @staticmethod
    def _state(grant: Grant, index: int) -> SlotState:
        return grant.enclave.slots.slots[index].state

    def grant_of(self, client: Client, number: int) -> Grant:
        """Return a grant of this client; others' are not there for it, nor is one that it was not told of.

        Who guesses the number of a grant that still waits for its slots would get some for it, and
        when the waiting fails afterwards they would be nobody's.
        """
        grant = client.grants.get(number)
        if grant is None or not grant.handed_out:
            raise errors.NotFound(f"this connection holds no grant {number}")
        return grant

    def _end(self, grant: Grant, why: str) -> None:
        """The client holds the grant no more; slots that are not back come back when its process ends."""
        enclave, client = grant.enclave, grant.client
        grant.over = True
        if grant.charges:
            client.withheld.append(grant)
        del client.grants[grant.number], self._service.grants[grant.number]
        enclave.grants.discard(grant.number)
        if not any(other.enclave is enclave for other in client.grants.values()):
            uid = client.identity.uid
            enclave.clients_by_uid[uid] -= 1
            if not enclave.clients_by_uid[uid]:
                del enclave.clients_by_uid[uid]
        grant.charge.release()
        grant.settle()
        self._service.attendant.count(enclave)
        if client.connection is not None:
            client.connection.passed_on = 0
        enclave.changed.unpark_all()
        self._service.audit.ended(
            client.identity, client=client.number, enclave=enclave.name, grant=grant.number, why=why
        )


def _longest(policy: EnclavePolicy, wait: float | None) -> float:
    """How many seconds a request waits that said `wait`."""
    return policy.wait if wait is None else min(wait, policy.wait)
