"""Draining: no new grants, wait for the old ones; of one enclave, or of the whole host.

`drain` takes the enclave out of use for who comes new, tells who is there, and waits until they have
left, at most for a deadline.  What is left then is said, or revoked when `force` is given; the
enclave stays drained either way, until `undrain`.

With `all` the host is emptied: every enclave is drained, and those that nobody holds any more are taken
down, so that the number of open SGX files falls to 0 (microcode is updated only then).  Their images
are kept, and `undrain` with `all` builds each again: the same image, the next generation.  While the
host is empty no enclave is created.

Who asks again after a restart of the broker is answered about the same enclaves as the first time: what is
done already is told, and the rest is done then, within what is left of the time that the request gave.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, final

import trio

from teemate import errors
from teemate.broker.connections.requests import Answer, Drain, Undrain
from teemate.broker.enclaves.enclave import Enclave, EnclaveState
from teemate.broker.enclaves.source import ImageSource
from teemate.broker.policy.limits import Charge
from teemate.broker.policy.rules import EnclavePolicy, Policy
from teemate.broker.wardens.warden import WardenError

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.service import Service

__all__ = ["Lifecycle", "LifecycleStatistics", "StoredEnclave"]

DEADLINE = 30.0
"""Seconds that the holders get unless the request says otherwise."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEnclave:
    """An enclave that was taken down to empty the host; it owns source and charge."""

    serial: int
    policy: EnclavePolicy
    backend: str
    source: ImageSource
    charge: Charge | None
    generation: int
    payer: int | None
    maker: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleStatistics:
    """Enclaves that are drained, and those that were taken down to empty the host."""

    draining: int
    stored: int


@final
@dataclass(slots=True)
class _Before:
    """How it was when a drain was asked for the first time: grants that were held, and that it took back."""

    until: float
    """Its deadline by CLOCK_MONOTONIC, which the next broker has too."""
    held: dict[str, int] = field(default_factory=dict)
    revoked: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, intent: Mapping[str, object] | None, seconds: float) -> _Before:
        if intent is None:
            return cls(time.monotonic() + seconds)
        held, revoked = intent["held"], intent["revoked"]
        until = intent.get("until", time.monotonic() + seconds)  # an older broker's has none
        assert isinstance(until, float)
        assert isinstance(held, dict)
        assert isinstance(revoked, dict)
        return cls(until, dict(held), dict(revoked))

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.until - time.monotonic())

    def intent(self) -> dict[str, object]:
        return asdict(self)

    def emptied(self, name: str) -> dict[str, object]:
        """What is told of an enclave that the last broker took down."""
        counts = {"held": self.held[name], "revoked": self.revoked.get(name, 0)}
        return {"enclave": name, **counts, "left": 0, "leaked": 0, "busy": 0, "emptied": True}


@final
class Lifecycle:
    """The operations `drain` and `undrain`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stored: dict[str, StoredEnclave] = {}
        self.emptied = ""
        """Why no enclave is made: the host is being emptied, or is empty."""

    def stored(self, name: str) -> StoredEnclave | None:
        """Return what comes back under that name when the host is filled again."""
        return self._stored.get(name)

    # -- draining ------------------------------------------------------------------

    def drain(self, client: Client, args: Drain) -> Awaitable[Answer]:
        """Take enclaves out of use; the request may end before the draining does."""
        service = self._service
        if args.enclave is None:
            service.require_administrator(client, "drain all")
            enclaves = [enclave for enclave in service.enclaves.values() if not enclave.ending]
            self.emptied = f"the host is being emptied by uid {client.identity.uid}"
            service.state.write_emptied(self.emptied)
        else:
            enclaves = [self.owned(client, args.enclave, "drain")]
        seconds = DEADLINE if args.deadline is None else args.deadline
        before = _Before.of(client.intents.get(client.asking), seconds)
        for enclave in enclaves:
            before.held.setdefault(enclave.name, len(enclave.grants))
        service.state.intend(client, before.intent())
        return self._drain(client, client.asking, args, enclaves, before)

    def owned(self, client: Client, name: str, operation: str) -> Enclave:
        """Return an enclave that the client owns or may administer, and that is not being destroyed."""
        service = self._service
        enclave = service.enclaves.get(name)
        if enclave is None or enclave.policy.owner != client.identity.uid:
            service.require_administrator(client, operation)
        enclave = service.enclave(name)
        if enclave.ending:
            raise errors.Draining(f"enclave {name!r} is being destroyed")
        return enclave

    async def _drain(
        self, client: Client, request: int, args: Drain, enclaves: list[Enclave], before: _Before
    ) -> Answer:
        service = self._service
        by = f"uid {client.identity.uid}"
        there = {enclave.name for enclave in enclaves}
        told = [before.emptied(name) for name in before.held if name not in there and name in self._stored]

        async def one(enclave: Enclave, deadline: float) -> None:
            revoked = before.revoked.get(enclave.name, 0)

            def revoking(count: int) -> None:
                before.revoked[enclave.name] = revoked + count
                service.state.intend(client, before.intent(), request)

            info = await self.drain_one(enclave, deadline, args.force, by, revoking)
            info |= {"held": before.held[enclave.name], "revoked": before.revoked.get(enclave.name, 0)}
            if args.enclave is None:
                info["emptied"] = await self._store(enclave)
            told.append(info)

        async def run() -> None:
            deadline = trio.current_time() + before.left
            for enclave in enclaves:
                enclave.upgrading = False  # what becomes of the upgrade changes nothing of this
                self.begin(enclave, f"drained by {by}" + (f": {args.reason}" if args.reason else ""))
                service.audit.changed(
                    client.identity, client=client.number, operation="drain", enclave=enclave.name
                )
            async with trio.open_nursery() as nursery:
                for enclave in enclaves:
                    nursery.start_soon(one, enclave, deadline)
            if args.enclave is None:  # what is being made is taken down again
                with trio.move_on_at(deadline):
                    await service.administration.building.wait_all()

        await service.revocation.finish_in_background(run)
        return Answer({"enclaves": sorted(told, key=lambda info: str(info["enclave"]))})

    def begin(self, enclave: Enclave, reason: str) -> None:
        """No new grants from here on; who waits for slots hears at once that none will come."""
        first = not enclave.drained
        enclave.drained = reason
        enclave.on_change(enclave)
        if enclave.state in (EnclaveState.READY, EnclaveState.DRAINING):
            enclave.state = EnclaveState.DRAINING
            enclave.reason = reason
        refusal = errors.Draining(f"enclave {enclave.name!r} takes no new clients: {reason}")
        self._service.reclaimer.refuse(enclave.slots.waiting(), refusal)
        self._service.state.write_enclaves()  # the next broker must know what was told
        if first:
            self._service.tell_holders(enclave, "draining")

    async def drain_one(
        self,
        enclave: Enclave,
        deadline: float,
        force: bool,
        by: str,
        revoking: Callable[[int], None] = lambda _count: None,
    ) -> dict[str, object]:
        """Wait for the holders; `revoking` is called with how many of them, before they are revoked."""
        service = self._service
        held = len(enclave.grants)
        with trio.move_on_at(deadline):
            await enclave.wait_ungranted()
        revoked = leaked = busy = 0
        if enclave.grants and force and enclave.drained:
            grants = [service.grants[number] for number in enclave.grants]
            revoked = sum(not grant.revoked for grant in grants)
            revoking(revoked)
            why = f"enclave {enclave.name} is drained"
            counts = await service.revocation.revoke_all(grants, None, by, why)
            leaked = sum(count["leaked"] for count in counts)
            busy = sum(count["busy"] for count in counts)
        # Who was revoked holds a mapping at most, which `leaked` tells.
        left = sum(not service.grants[number].revoked for number in enclave.grants)
        if left:
            service.log.warning(
                "not drained", enclave=enclave.name, grants=left, revoked=revoked, leaked=leaked,
                reason="the deadline is over; force revokes what is held",
            )  # fmt: skip
        return {
            "enclave": enclave.name,
            "held": held,
            "revoked": revoked,
            "left": left,
            "leaked": leaked,
            "busy": busy,
        }

    # -- emptying the host ---------------------------------------------------------------

    async def _store(self, enclave: Enclave) -> bool:
        """Take down a drained enclave that nobody holds, keeping what it is built from."""
        service, name = self._service, enclave.name
        current = service.enclaves.get(name) is enclave
        if enclave.grants or enclave.slots.in_use or not current or enclave.ending or not enclave.drained:
            return False
        source, enclave.source = enclave.source, None
        if source is None:
            service.log.warning("enclave not taken down", enclave=name, reason="its image was not kept")
            return False
        charge, enclave.charge = enclave.charge, None
        stored = self._stored[name] = StoredEnclave(
            serial=service.state.next_number("enclave"), policy=enclave.policy, backend=enclave.backend,
            source=source, charge=charge, generation=enclave.generation, payer=enclave.payer,
            maker=enclave.maker,
        )  # fmt: skip
        service.administration.close_name(enclave)
        await service.state.keep_stored(stored)
        await service.administration.take_down(enclave)
        service.log.info(
            "enclave taken down", enclave=name, generation=enclave.generation, reason=enclave.drained
        )
        return True

    # -- and back -------------------------------------------------------------------------

    def undrain(self, client: Client, args: Undrain) -> Awaitable[Answer]:
        """Take enclaves into use again, and build those again that were taken down."""
        service = self._service
        intent = client.intents.get(client.asking)
        if args.enclave is None:
            service.require_administrator(client, "undrain all")
            names = [enclave.name for enclave in service.enclaves.values() if enclave.drained]
            names += self._stored
        elif args.enclave in self._stored:
            service.require_administrator(client, "undrain")
            if self.emptied:
                raise errors.Draining(f"{self.emptied}: undrain with all brings its enclaves back")
            names = [args.enclave]
        else:
            names = [self.owned(client, args.enclave, "undrain").name]
        if intent is not None:
            before = intent["names"]
            assert isinstance(before, list)
            names = [*before, *(name for name in names if name not in before)]
        service.state.intend(client, {"names": names})
        if args.enclave is None:
            self.emptied = ""
            service.state.write_emptied("")
        return self._undrain(client, names)

    async def _undrain(self, client: Client, names: list[str]) -> Answer:
        service = self._service
        back: list[str] = []
        failed: list[dict[str, str]] = []

        async def run() -> None:
            stored: list[str] = []
            for name in names:
                enclave = service.enclaves.get(name)
                if enclave is None or enclave.ending:
                    stored.append(name)
                else:
                    self.resume(enclave)
                    back.append(name)
            for name in stored:
                reason = await self._restore(name)
                if reason:
                    failed.append({"enclave": name, "reason": reason})
                else:
                    back.append(name)
            for name in back:
                service.audit.changed(
                    client.identity, client=client.number, operation="undrain", enclave=name
                )

        await service.revocation.finish_in_background(run)
        return Answer({"enclaves": back, "failed": failed})

    def resume(self, enclave: Enclave) -> None:
        """Take one enclave into use again, if it is drained."""
        if not enclave.drained:
            return
        enclave.drained, enclave.upgrading = "", False
        enclave.on_change(enclave)
        if enclave.state is EnclaveState.DRAINING and not enclave.ending:
            enclave.state = EnclaveState.READY
            enclave.reason = ""
            self._service.tell_holders(enclave, "ready")
        if not enclave.slots.usable:
            self._service.reclaimer.give_up(enclave, "none of its slots is left: all are in quarantine")

    async def _restore(self, name: str) -> str:
        """Build a stored enclave again; returns why that failed, and keeps it stored then."""
        service = self._service
        stored = self._stored.get(name)
        if stored is None:
            return "it is being built already, or was destroyed"
        del self._stored[name]
        building = service.administration.building
        building.begin(stored.policy, stored.backend, requested=stored.payer is not None)
        try:
            enclave = await service.administration.build(
                stored.policy, stored.backend, stored.source, None, generation=stored.generation + 1
            )
            if self.emptied:  # again
                await service.administration.take_down(enclave)
                raise errors.Draining(self.emptied)
        except (OSError, errors.Error, WardenError) as error:
            self._stored[name] = stored
            image = stored.source.origin
            service.log.warning("enclave not built", enclave=name, image=image, reason=str(error))
            return str(error)
        finally:
            building.end(name)
        enclave.source, enclave.charge = stored.source, stored.charge
        enclave.payer, enclave.maker = stored.payer, stored.maker
        enclave.requested = stored.payer is not None
        service.administration.open(enclave)
        service.state.write_enclaves()
        await service.state.drop_stored(stored.serial)
        return ""

    def adopt(self, policy: Policy) -> None:
        """Bring enclaves back as `policy` has them, not as it was when they were taken down."""
        for name, stored in self._stored.items():
            found = policy.entry_for(stored.policy, requested=stored.payer is not None)
            self._stored[name] = replace(stored, policy=found or stored.policy)

    async def forget(self, stored: StoredEnclave) -> bool:
        """Give up what was kept of an enclave; False when it is being built again."""
        found = self._stored.get(stored.policy.name)
        if found is None or found.serial != stored.serial:
            return False
        del self._stored[stored.policy.name]
        _close(found)
        await self._service.state.drop_stored(stored.serial)
        return True

    def restore(self, stored: StoredEnclave) -> None:
        """Keep what the last broker kept of an enclave that it had taken down."""
        self._stored[stored.policy.name] = stored

    def close(self) -> None:
        """The broker ends: close what is kept of enclaves that were taken down."""
        for stored in self._stored.values():
            _close(stored)
        self._stored.clear()

    def statistics(self) -> LifecycleStatistics:
        """What is drained and what was taken down."""
        draining = sum(bool(enclave.drained) for enclave in self._service.enclaves.values())
        return LifecycleStatistics(draining=draining, stored=len(self._stored))


def _close(stored: StoredEnclave) -> None:
    stored.source.close()
    if stored.charge is not None:
        stored.charge.release()
