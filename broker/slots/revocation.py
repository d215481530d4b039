"""Taking grants back from clients that may not want to give them up.

The kernel takes neither the descriptor nor the mapping back, and ERESUME has no gate.  So the keys are
cleared first, which closes the gate for every new entry and for the return of every OCALL; a call
that ends from here on arrives at the landing page without a result.  Then the holder is told, and has
its grace to leave: to unmap its slots, and to say so.  Who does not is killed where the policy has
`revoke_kill`.  Else its slots are *repaired* under it, so that nothing that was interrupted in them
can be resumed, and *withheld*: handed out again only when the process has acknowledged, or ended.

`revoke` returns after that.  It counts slots that the holder can still map as leaked, and those among
them in which a thread of it runs without ever being met at an interrupt as busy: that thread never gets a
result, and the slot is repaired as soon as it leaves.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import trio

from teemate import errors
from teemate.broker.connections.requests import Answer, Revoke
from teemate.broker.enclaves.enclave import EnclaveState
from teemate.broker.slots.grants import Grant, Outcome
from teemate.broker.slots.repair import Repair
from teemate.broker.slots.table import SlotState
from teemate.broker.wardens.warden import EnclaveBrokenError, EnclaveGoneError, WardenError

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.service import Service

__all__ = ["Revocation", "RevocationStatistics"]

_KILL_PATIENCE = 5.0
"""Seconds until a process that got SIGKILL has to be gone; one in uninterruptible sleep may not be."""
_BUSY_PATIENCE = 2.0
"""Seconds for which a slot is tried again in which a thread runs, before `revoke` returns saying so."""
_COUNTS = ("cleared", "quarantined", "leaked", "busy")
_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.05
_LATER_PAUSE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationStatistics:
    """Clients that were killed, slots that stayed mapped, and of those in which a thread stayed too.

    `cleared` and `quarantined` are slots as well.  `outcomes` counts grants by how their revocation ended:
    ``returned`` (acknowledged, or ended by themselves), ``killed``, ``leaked`` or ``uncleared``.  `mapped`:
    grants that leaked and whose holders can map their slots still.
    """

    killed: int
    leaked: int
    busy: int
    cleared: int
    quarantined: int
    mapped: int
    outcomes: dict[str, int]


@final
class Revocation:
    """The operation `revoke`, and what `destroy` does with the grants of its enclave."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._killed = 0
        self._leaked = 0
        self._busy = 0
        self._cleared = 0
        self._quarantined = 0
        self._mapped: set[Grant] = set()
        self._outcomes = dict.fromkeys(("returned", "killed", "leaked", "uncleared"), 0)

    def revoke(self, client: Client, args: Revoke) -> Awaitable[Answer]:
        """Take back one grant, all of a client, or all on an enclave."""
        service = self._service
        intent = client.intents.get(client.asking)
        if intent is not None:  # the last broker was about to: some are gone already
            numbers = intent["grants"]
            assert isinstance(numbers, list)
            left = [service.grants[number] for number in numbers if number in service.grants]
            begun = intent.get("begun", time.monotonic())  # an older broker's has none
            assert isinstance(begun, float)
            return self._revoke(client, args, left, len(numbers), begun, after_restart=True)
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
        begun = time.monotonic()
        service.state.intend(client, {"grants": [grant.number for grant in grants], "begun": begun})
        return self._revoke(client, args, grants, len(grants), begun)

    async def _revoke(
        self,
        client: Client,
        args: Revoke,
        grants: list[Grant],
        count: int,
        begun: float,
        *,
        after_restart: bool = False,
    ) -> Answer:
        """`begun`: when it was asked for first, by CLOCK_MONOTONIC, which the next broker has too."""
        service = self._service
        counts: list[dict[str, int]] = []

        async def run() -> None:
            if after_restart:  # what came back of grants that are over may not be closed yet
                for enclave in [*service.enclaves.values(), *service.generations.retired]:
                    await enclave.recovered.wait()
            by = f"uid {client.identity.uid}"
            spent = time.monotonic() - begun if after_restart else 0.0
            why = args.reason or "asked for"
            counts.extend(await self.revoke_all(grants, args.grace, by, why, spent=spent))

        await self.finish_in_background(run)
        uncleared = sum(count["uncleared"] for count in counts)
        if uncleared:  # no count of an answer may hide it
            raise errors.EnclaveLost(
                f"the keys of {uncleared} slots could not be taken away, since no warden got it done: their"
                " enclaves are out of use (`teemate status` says why), but their holders can still enter: end"
                " those processes (`teemate status` names them)",
                {"uncleared": uncleared},
            )
        total = {key: sum(count[key] for count in counts) for key in _COUNTS}
        return Answer({"grants": count, **total})

    async def revoke_all(
        self, grants: list[Grant], grace: float | None, by: str, why: str, *, spent: float = 0.0
    ) -> list[dict[str, int]]:
        """Take them back at once; `spent` is how much of their grace is over already."""
        counts: list[dict[str, int]] = []

        async def run(grant: Grant) -> None:
            seconds = grant.enclave.policy.revoke_grace if grace is None else grace
            counts.append(await self._revoke_grant(grant, max(0.0, seconds - spent), by, why))

        async with trio.open_nursery() as nursery:
            for grant in grants:
                nursery.start_soon(run, grant)
        return counts

    async def _revoke_grant(self, grant: Grant, seconds: float, by: str, why: str) -> dict[str, int]:
        """Clear the keys, tell the client and wait; then the ladder: kill it, or repair what it has left."""
        service, enclave, client = self._service, grant.enclave, grant.client
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
        uncleared = await self._clear_keys(grant)
        client.send({"event": "revoked", "grant": grant.number, "slots": grant.slots, "deadline": seconds})
        with trio.move_on_after(seconds):
            await outcome.finished.wait()
        kill = not outcome.finished.is_set() and enclave.policy.revoke_kill and not grant.over
        if kill:
            await self._kill(grant, outcome)
        ruined: list[int] = []
        busy = await self._repair_left(grant, ruined)
        await self._wait_returned(grant)
        # Of what came back meanwhile the reclaimer knows whether its key is gone.
        uncleared = [index for index in uncleared if index in grant.charges or index in ruined]
        grant.uncleared.update(index for index in uncleared if index in ruined)
        leaked = self._put_aside(grant, busy, ruined, why)
        service.state.write_client(client)
        if not leaked and not grant.over and not outcome.finished.is_set():
            leaked = 1  # it holds no slots, but the mapping
        if leaked:
            self.note_leaked(grant)
        counts = {
            "cleared": outcome.cleared,
            "quarantined": outcome.quarantined + len(ruined),
            "leaked": leaked,
            "busy": len(busy),
            "uncleared": 0 if enclave.state is EnclaveState.LOST else len(grant.uncleared.union(uncleared)),
        }
        self._count(counts, killed=kill)
        return counts

    def _count(self, counts: dict[str, int], *, killed: bool) -> None:
        self._leaked += counts["leaked"]
        self._busy += counts["busy"]
        self._cleared += counts["cleared"]
        self._quarantined += counts["quarantined"]
        fallback = "killed" if killed else "returned"
        how = next((how for how in ("uncleared", "leaked") if counts[how]), fallback)
        self._outcomes[how] += 1

    @staticmethod
    async def _wait_returned(grant: Grant) -> None:
        """Wait for the slots that were given back in time: their keys may not be gone yet."""
        await grant.enclave.recovered.wait()  # also those that came back just before a restart
        while grant.in_reclaim:
            await grant.enclave.changed.park()

    async def _clear_keys(self, grant: Grant) -> list[int]:
        """No key of the grant opens anything from here on, but those of the slots that are returned.

        Those that an earlier attempt left are tried again: their slots are in quarantine.
        """
        enclave, uncleared = grant.enclave, []
        for index in sorted(grant.uncleared.union(grant.charges)):
            if index not in grant.charges and index not in grant.uncleared:
                continue  # given back meanwhile: it may have its next holder's key
            generation = enclave.slot_keys[index].generation
            word = await self._service.reclaimer.clear(enclave, index, generation)
            if word is None and enclave.warden is not None:
                uncleared.append(index)
            else:
                grant.uncleared.discard(index)
        return uncleared

    async def _kill(self, grant: Grant, outcome: Outcome) -> None:
        """End the process that did not acknowledge, and wait until its slots are back."""
        service, client = self._service, grant.client
        service.log.warning(
            "client killed", client=client.number, pid=client.identity.pid, grant=grant.number,
            reason="did not acknowledge a revocation, and revoke_kill = true",
        )  # fmt: skip
        self._killed += 1
        try:
            signal.pidfd_send_signal(client.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass  # has ended by itself
        except PermissionError:
            service.log.warning("client not killed", pid=client.identity.pid, reason="no permission")
        with trio.move_on_after(_KILL_PATIENCE):
            await outcome.finished.wait()

    # -- what is left when the holder does nothing ----------------------------------------

    async def _repair_left(self, grant: Grant, ruined: list[int]) -> list[int]:
        """Repair the slots that the client keeps mapped: what was interrupted in them never goes on.

        Returns those in which a thread runs all the time.  It cannot be stopped from outside, but it stands
        still at every interrupt, so a few tries mostly meet it there.  `ruined` gets the slots that cannot be
        repaired.
        """
        left, pause = grant.slots, _FIRST_PAUSE
        deadline = trio.current_time() + _BUSY_PATIENCE
        while True:
            left = [index for index in left if await self._repair(grant, index, ruined) is Repair.BUSY]
            if not left or trio.current_time() >= deadline:
                return left
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _repair(self, grant: Grant, index: int, ruined: list[int]) -> Repair | None:
        """One try; a slot that cannot be repaired is put into quarantine.  None: nothing is left to do."""
        enclave, reclaimer = grant.enclave, self._service.reclaimer
        if index not in grant.charges or enclave.state is EnclaveState.LOST:
            return None
        try:
            return await reclaimer.repair_slot(enclave, index, holder_dead=False)
        except EnclaveGoneError as error:
            reclaimer.lose(enclave, str(error), grant)
        except WardenError as error:
            if isinstance(error, EnclaveBrokenError):
                reclaimer.give_up(enclave, str(error))
            if grant.give_back(index):  # else it came back meanwhile, and is not this grant's any more
                reclaimer.quarantine(enclave, index, f"revoked, and not to be repaired: {error}")
                ruined.append(index)
                grant.settle()
                enclave.changed.unpark_all()
        return None

    def _put_aside(self, grant: Grant, busy: list[int], ruined: list[int], why: str) -> int:
        """Withhold what was not acknowledged; returns how many slots the client can map still."""
        enclave, reclaimer = grant.enclave, self._service.reclaimer
        for inside, how in ((False, "repaired but not acknowledged"), (True, "a thread runs in it still")):
            fresh = [
                index
                for index in grant.slots
                if (index in busy) is inside and enclave.slots.slots[index].state is SlotState.ASSIGNED
            ]
            if fresh:
                reclaimer.withhold(grant, fresh, f"revoked ({why}): {how}")
        for index in busy:
            reclaimer.spawn(self._repair_when_left, grant, index)
        leaked = len(grant.charges) + len(ruined)
        if leaked and not grant.over:
            self._service.log.warning(
                "mapping leaked", enclave=enclave.name, grant=grant.number,
                pid=grant.client.identity.pid, slots=leaked, busy=len(busy),
            )  # fmt: skip
        return leaked

    async def _repair_when_left(self, grant: Grant, index: int) -> None:
        """Try until the thread has left, so that a lock which it holds inside is not kept for ever."""
        pause = _LONGEST_PAUSE
        while await self._repair(grant, index, []) is Repair.BUSY:
            await trio.sleep(pause)
            pause = min(2 * pause, _LATER_PAUSE)

    def note_leaked(self, grant: Grant) -> None:
        """Its holder can map its slots still, though it was revoked."""
        grant.leaked = True
        self._mapped = {*self._mapped_still(), grant}

    def _mapped_still(self) -> set[Grant]:
        return {grant for grant in self._mapped if grant.mapped_still}

    def statistics(self) -> RevocationStatistics:
        """What revocations ended with so far."""
        self._mapped = self._mapped_still()
        return RevocationStatistics(
            killed=self._killed,
            leaked=self._leaked,
            busy=self._busy,
            cleared=self._cleared,
            quarantined=self._quarantined,
            mapped=len(self._mapped),
            outcomes=dict(self._outcomes),
        )

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
