"""Taking grants back from clients that may not want to give them up."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, final

import trio

from teemate import errors
from teemate.broker.control import SlotWord
from teemate.broker.grants import Grant, Outcome
from teemate.broker.requests import Answer, Revoke
from teemate.broker.slots import SlotState

if TYPE_CHECKING:
    from teemate.broker.clients import Client
    from teemate.broker.service import Service

__all__ = ["Revocation"]

_KILL_PATIENCE = 5.0
"""Seconds until a process that got SIGKILL has to be gone; one in uninterruptible sleep may not be."""


@final
class Revocation:
    """The operation `revoke`, and what `destroy` does with the grants of its enclave."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def revoke(self, client: Client, args: Revoke) -> Awaitable[Answer]:
        """Take back one grant, all of a client, or all on an enclave."""
        service = self._service
        intent = client.intents.get(client.asking)
        if intent is not None:  # the last broker was about to: some are gone already
            numbers = intent["grants"]
            assert isinstance(numbers, list)
            left = [service.grants[number] for number in numbers if number in service.grants]
            return self._revoke(client, args, left, len(numbers))
        if args.grant is not None:
            found = service.grants.get(args.grant)
            if found is None:
                raise errors.NotFound(f"there is no grant {args.grant}: `teemate status` lists them")
            grants = [found]
        elif args.client is not None:
            holder = service.clients.get(args.client)
            if holder is None:
                raise errors.NotFound(f"there is no client {args.client}: `teemate status` lists them")
            grants = list(holder.grants.values())
        else:
            assert args.enclave is not None
            grants = [service.grants[number] for number in service.enclave(args.enclave).grants]
        service.state.intend(client, {"grants": [grant.number for grant in grants]})
        return self._revoke(client, args, grants, len(grants))

    async def _revoke(self, client: Client, args: Revoke, grants: list[Grant], count: int) -> Answer:
        counts: list[dict[str, int]] = []

        async def run() -> None:
            by = f"uid {client.identity.uid}"
            counts.extend(await self.revoke_all(grants, args.grace, by, args.reason or "asked for"))

        await self.finish_in_background(run)
        total = {key: sum(count[key] for count in counts) for key in ("cleared", "quarantined", "leaked")}
        return Answer({"grants": count, **total})

    async def revoke_all(
        self, grants: list[Grant], grace: float | None, by: str, why: str
    ) -> list[dict[str, int]]:
        counts: list[dict[str, int]] = []

        async def run(grant: Grant) -> None:
            counts.append(await self._revoke_grant(grant, grace, by, why))

        async with trio.open_nursery() as nursery:
            for grant in grants:
                nursery.start_soon(run, grant)
        return counts

    async def _revoke_grant(self, grant: Grant, grace: float | None, by: str, why: str) -> dict[str, int]:
        """Clear the keys, tell the client, wait; who does not acknowledge is killed, or counted."""
        service, enclave, client = self._service, grant.enclave, grant.client
        seconds = enclave.policy.revoke_grace if grace is None else grace
        outcome = grant.outcome = grant.outcome or Outcome()
        if not grant.revoked:
            grant.revoked = True
            service.state.write_client(client)  # the next broker goes on with it
            service.audit.revoked(
                client.identity,
                client=client.number,
                enclave=enclave.name,
                grant=grant.number,
                by=by,
                why=why,
            )
            service.reclaimer.refuse(
                [ticket for ticket in enclave.slots.waiting() if ticket.grant == grant.number],
                errors.Revoked(f"grant {grant.number} was taken back: {why}"),
            )
        await self._clear_keys(grant)
        client.send(
            {"event": "revoked", "grant": grant.number, "slots": grant.slots, "deadline": float(seconds)}
        )
        with trio.move_on_after(seconds):
            await outcome.finished.wait()
        if not outcome.finished.is_set() and enclave.policy.revoke_kill and not grant.over:
            service.log.warning(
                "client killed", client=client.number, pid=client.identity.pid, grant=grant.number,
                reason="did not acknowledge a revocation, and revoke_kill = true",
            )  # fmt: skip
            try:
                signal.pidfd_send_signal(client.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # has ended by itself
            except PermissionError:
                service.log.warning("client not killed", pid=client.identity.pid, reason="no permission")
            with trio.move_on_after(_KILL_PATIENCE):
                await outcome.finished.wait()
        leaked = await self._put_aside(grant, why)
        service.state.write_client(client)
        if not leaked and not grant.over and not outcome.finished.is_set():
            leaked = 1  # it holds no slots, but the mapping
        return {"cleared": outcome.cleared, "quarantined": outcome.quarantined, "leaked": leaked}

    async def _clear_keys(self, grant: Grant) -> dict[int, SlotWord | None]:
        """No key of the grant opens anything from here on; returns what each slot was doing."""
        enclave, words = grant.enclave, {}
        for index in grant.slots:
            if index not in grant.charges:  # given back meanwhile: it may have its next holder's key
                continue
            generation = enclave.slot_keys[index].generation
            words[index] = await self._service.reclaimer.clear(enclave, index, generation)
        return words

    async def _put_aside(self, grant: Grant, why: str) -> int:
        """Quarantine or withhold what was not acknowledged; returns how many slots stay mapped."""
        reclaimer, table = self._service.reclaimer, grant.enclave.slots
        outcome = grant.outcome
        assert outcome is not None
        leaked = 0
        for index, word in (await self._clear_keys(grant)).items():
            if index not in grant.charges:  # acknowledged meanwhile
                continue
            leaked += 1
            if word not in (None, SlotWord.FREE, SlotWord.ARMED):
                grant.charges.pop(index).release()
                reclaimer.quarantine(
                    grant.enclave, index, f"revoked ({why}) while its holder had it {word.name.lower()}"
                )
                outcome.quarantined += 1
            elif table.slots[index].state is SlotState.ASSIGNED:
                reclaimer.withhold(grant, [index], f"revoked ({why}) and not acknowledged")
        if leaked and not grant.over:
            self._service.log.warning(
                "mapping leaked", enclave=grant.enclave.name, grant=grant.number,
                pid=grant.client.identity.pid, slots=leaked,
            )  # fmt: skip
        return leaked

    async def finish_in_background(self, run: Callable[[], Awaitable[None]]) -> None:
        """Wait for `run`, which goes on when the connection that asked for it ends in the middle."""
        done = trio.Event()
        failures: list[Exception] = []

        async def guarded() -> None:
            try:
                await run()
            except Exception as error:
                failures.append(error)
            finally:
                done.set()

        self._service.reclaimer.spawn(guarded)
        await done.wait()
        if failures:
            raise failures[0]
