"""Taking a new image into use for an enclave that is in use: the operation `upgrade`.

In this order: build the next generation from the new image, beside the old one and at an address of
its own; drain the old one; hand its state over; let clients attach to the new one.  Who attaches while
this goes on waits, and gets the new one.  Calls of the old one's holders go on until they leave; they
are told (`draining`).

What is promised: the hand-over begins when nobody holds a grant on the old enclave any more and every
slot that was taken back is closed, so no write comes after it, and none is lost.  When holders do not
leave until the deadline they are revoked with `force`; without it, and whenever a later step fails, the
new generation is thrown away and the old one goes on as if nothing had been.  So it does when the broker
ends in the middle: until it has everything the new one is written down as one that has no name.  The request
that is asked again after that begins anew, within what is left of the time that it gave, or is answered when
the new one has the name.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, final

import trio

from teemate import errors
from teemate._backend import choose_backend
from teemate.broker.connections.requests import Answer, Result, Upgrade
from teemate.broker.enclaves.draining import DEADLINE
from teemate.broker.enclaves.enclave import Enclave, EnclaveState, measure_image
from teemate.broker.enclaves.handover import HandedOver, hand_over
from teemate.broker.enclaves.source import ImageSource
from teemate.broker.policy.limits import Resource
from teemate.broker.policy.rules import CreateRule
from teemate.broker.wardens.warden import WardenError

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.service import Service

__all__ = ["Upgrades"]


@final
class Upgrades:
    """The operation `upgrade`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def upgrade(self, client: Client, args: Upgrade, image_fd: int) -> Result:
        """Replace an enclave by one from another image; `image_fd` is ours."""
        service = self._service
        source = ImageSource(image_fd, args.sigstruct, f"sent by uid {client.identity.uid}")
        intent, there = client.intents.get(client.asking), service.enclaves.get(args.enclave)
        if intent is not None and there is not None and there.serial == intent.get("new"):
            source.close()  # it was done, and the last broker died before it could say so
            ok = intent["ok"]
            assert isinstance(ok, dict)
            return Answer(ok)
        try:
            old = service.lifecycle.owned(client, args.enclave, "upgrade")
            rules = service.administration.create_rules(client, "upgrade")
            self._require_quiet(old)
            done = service.generations.begin(old)
        except BaseException:
            source.close()
            raise
        until = None if intent is None else intent.get("until")
        assert until is None or isinstance(until, float)
        return self._upgrade(client, client.asking, args, old, source, rules, done, until)

    def _require_quiet(self, old: Enclave) -> None:
        """Refuse while something else is done with the enclave."""
        if self._service.generations.pending(old) is not None:
            raise errors.Busy(f"the next generation of enclave {old.name!r} is being built already")
        if old.drained or old.state is not EnclaveState.READY:
            raise errors.Draining(f"enclave {old.name!r} is {old.state.value}: {old.reason}")

    async def _upgrade(
        self,
        client: Client,
        request: int,
        args: Upgrade,
        old: Enclave,
        source: ImageSource,
        rules: list[CreateRule],
        done: trio.Event,
        until: float | None,
    ) -> Answer:
        """`until`: the deadline that an earlier broker had begun to wait for, by CLOCK_MONOTONIC."""
        service = self._service
        answers: list[dict[str, object]] = []

        async def run() -> None:
            new: Enclave | None = None
            try:
                new = await self._build(client, old, source, rules)
                answers.append(await self._replace(client, request, args, old, new, until))
            except BaseException:
                if new is not None:
                    with trio.CancelScope(shield=True):
                        await service.administration.take_down(new)
                source.close()
                if old.upgrading:  # nobody had it drained for something else meanwhile
                    service.lifecycle.resume(old)
                raise
            finally:
                service.generations.finish(old, done)
                if old.state in (EnclaveState.LOST, EnclaveState.QUARANTINED):
                    service.generations.replace(old)

        try:
            await service.revocation.finish_in_background(run)
        except WardenError as error:
            raise errors.ImageError(f"nothing was changed, since a control ECALL failed: {error}") from error
        return Answer(answers[0])

    async def _build(
        self, client: Client, old: Enclave, source: ImageSource, rules: list[CreateRule]
    ) -> Enclave:
        service, administration = self._service, self._service.administration
        await trio.to_thread.run_sync(choose_backend, old.backend)
        facts = await trio.to_thread.run_sync(measure_image, source.fd, source.sigstruct)
        administration.require_rule(client, "upgrade", rules, facts, debug=old.policy.debug)
        charge = None
        if old.payer is not None:  # both are there for a while
            charge = service.ledger.account(old.payer).charge(Resource.PAGES, facts.pages)
        new = await administration.build(
            old.policy, old.backend, source, charge, generation=old.generation + 1, aside=True
        )
        new.source = source
        new.payer, new.maker, new.requested = old.payer, old.maker, True
        return new

    async def _replace(
        self,
        client: Client,
        request: int,
        args: Upgrade,
        old: Enclave,
        new: Enclave,
        until: float | None,
    ) -> dict[str, object]:
        service, by = self._service, f"uid {client.identity.uid}"
        if until is None:  # what is built anew after a restart takes none of the holders' time again
            until = time.monotonic() + (DEADLINE if args.deadline is None else args.deadline)
            service.state.intend(client, {"until": until}, request)
        deadline = trio.current_time() + max(0.0, until - time.monotonic())
        old.upgrading = True
        service.lifecycle.begin(old, f"upgraded by {by} to MRENCLAVE {new.built.mrenclave.hex()}")
        drained = await service.lifecycle.drain_one(old, deadline, args.force, by)
        if drained["left"] or drained["busy"]:
            raise errors.Busy(
                f"{drained['left']} grants on enclave {old.name!r} are held still, and threads are in"
                f" {drained['busy']} slots: nothing was changed; force revokes them",
                {"grants": drained["left"], "busy": drained["busy"]},
            )
        try:
            handed = await hand_over(old, new)
        except errors.Unsupported as error:
            if not args.lose_state:
                raise errors.Unsupported(f"{error.message}: lose_state upgrades without it") from error
            handed = HandedOver(0, 0)
        current = service.enclaves.get(old.name) is old and not old.ending
        if old.state is not EnclaveState.DRAINING or not current:
            raise errors.EnclaveLost(f"enclave {old.name!r} is {old.state.value} meanwhile: {old.reason}")
        if old.upgrading:
            old.drained = ""
        ok = {
            "generation": new.generation,
            "mrenclave": new.built.mrenclave,
            "held": drained["held"],
            "revoked": drained["revoked"],
            "entries": handed.entries,
            "bytes": handed.bytes,
        }
        # Written before the new one has the name: when it has it after a restart, this is the answer.
        service.state.intend(client, {"until": until, "new": new.serial, "ok": ok}, request)
        service.generations.succeed(old, new)
        service.audit.changed(client.identity, client=client.number, operation="upgrade", enclave=new.name)
        service.log.info(
            "upgraded", enclave=new.name, generation=new.generation, entries=handed.entries,
            sealed_bytes=handed.bytes, revoked=drained["revoked"],
        )  # fmt: skip
        return ok
