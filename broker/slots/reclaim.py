"""Bringing slots back: clear the key, repair and scrub the slot, arm it anew.

A slot comes here when its holder gave it back with word that it is clean, or has ended: then in
whatever state that left it.  What cannot be repaired is put into quarantine, with the reason.
Everything runs in tasks of the broker's own, off the path of any request, so a client that leaves
interrupts nothing.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import final

import trio
from structlog.typing import FilteringBoundLogger

from teemate import errors
from teemate.broker.connections.processes import Processes
from teemate.broker.enclaves.control import ControlOp, SlotKey, SlotWord
from teemate.broker.enclaves.enclave import Enclave, EnclaveState
from teemate.broker.slots.grants import Grant, Waiter
from teemate.broker.slots.repair import Repair, UnrepairableError, renew_slot, repair_slot, require_done
from teemate.broker.slots.table import Ticket
from teemate.broker.wardens.protocol import RenewStep
from teemate.broker.wardens.warden import EnclaveBrokenError, EnclaveGoneError, WardenError

__all__ = ["Reclaimer"]

_BUSY_AFTER_DEATH = "its holder has ended, but another process enters it again and again"
_CLEAR_ATTEMPTS = 3
"""Of a CLEAR, with two wardens each: a key that stays must not be for one that happened to be killed."""
_BUSY_BUT_CLEAN = "its holder said that it is clean, but a thread runs in it or no SSA frame is left"


@final
class Reclaimer:
    """Moves slots from their holders back into the tables."""

    def __init__(
        self, processes: Processes, log: FilteringBoundLogger, on_unusable: Callable[[Enclave], None]
    ) -> None:
        self._processes = processes
        self._log = log
        self._on_unusable = on_unusable
        self._nursery: trio.Nursery | None = None
        self.waiters: dict[Ticket, Waiter] = {}
        self.left_behind: dict[int, list[Grant]] = {}
        """By pid, what earlier connections of a process that lives still have withheld: it counts against
        ``slots_per_client``, else who connects, attaches and leaves again and again gets everything."""

        self.on_left_behind: Callable[[int], None] = lambda _pid: None
        """Called when a process has left something behind, and when all of that is back."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the tasks; for as long as the broker runs."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def spawn(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """Start work that no client's end may interrupt; a bug in it is logged and ends nothing else."""

        async def guarded() -> None:
            try:
                await function(*args)
            except Exception as error:
                self._log.error("internal error", task=function.__name__, exc_info=error)

        assert self._nursery is not None
        self._nursery.start_soon(guarded)

    # -- ways back ---------------------------------------------------------------

    def take_back(self, grant: Grant, index: int, *, dead: bool) -> None:
        """The slot is the broker's again: its holder said that it is clean, or has ended (`dead`)."""
        enclave, client = grant.enclave, grant.client
        grant.give_back(index)
        grant.in_reclaim += 1
        client.returning[enclave.serial, index] = enclave.slot_keys[index].generation
        client.unwritten = True
        enclave.slots.returned(index)
        self.spawn(self._recycle, grant, index, dead)

    def withhold(self, grant: Grant, indices: list[int], reason: str) -> None:
        """The slots are not the client's any more, but its process may still use them."""
        for index in indices:
            grant.enclave.slots.withhold(index, reason)
            self.spawn(self.clear, grant.enclave, index, grant.enclave.slot_keys[index].generation)
        self._log.warning(
            "slots withheld", enclave=grant.enclave.name, grant=grant.number, pid=grant.client.identity.pid,
            slots=indices, reason=reason,
        )  # fmt: skip

    def take_back_at_end(self, pidfd: int, grants: list[Grant]) -> None:
        """Take back what `grants` of one process still hold when it ends; `pidfd` is the reclaimer's now."""
        pid = grants[0].client.identity.pid
        self.left_behind.setdefault(pid, []).extend(grants)
        self.on_left_behind(pid)

        def ended() -> None:
            os.close(pidfd)
            self.left_behind.pop(pid, None)
            self.on_left_behind(pid)
            for grant in grants:
                self.take_all_back(grant, dead=True)

        self._processes.watch(pidfd, ended)

    def take_all_back(self, grant: Grant, *, dead: bool) -> None:
        """Every slot that the grant still has."""
        for index in grant.slots:
            self.take_back(grant, index, dead=dead)
        grant.settle()

    # -- with the warden -----------------------------------------------------------

    async def clear(self, enclave: Enclave, index: int, generation: int) -> SlotWord | None:
        """Take the slot's key away; returns what the slot was doing, None when nobody could tell.

        Where no warden gets it done the enclave is given up: whoever has the key can go on entering it, but
        nobody new is let in beside him.
        """
        warden = enclave.warden
        if warden is None or enclave.state is EnclaveState.LOST:
            return None
        reason = ""
        for _ in range(_CLEAR_ATTEMPTS):
            try:
                reply = await warden.control(ControlOp.CLEAR, index, generation=generation)
            except EnclaveGoneError as error:
                self.lose(enclave, str(error))
                return None
            except EnclaveBrokenError as error:
                reason = str(error)
                break
            except WardenError as error:
                reason = str(error)
                self._log.warning("slot key not cleared", enclave=enclave.name, slot=index, reason=reason)
            else:
                return SlotWord.of(reply.result.word)
        self.give_up(enclave, f"the key of slot {index} could not be taken away: {reason}")
        return None

    async def repair_slot(self, enclave: Enclave, index: int, *, holder_dead: bool) -> Repair:
        """Take the slot's key away, undo what was interrupted in it and scrub it; it is not armed.

        Call it for a slot that is not free, and as often as it takes: each step can be repeated.
        When somebody else repaired and armed the slot meanwhile, there is nothing left to do.

        Raises
        ------
        WardenError
            The slot is to be quarantined with that reason.
        EnclaveGoneError
            The enclave is lost, with all of its slots.

        """
        generation = enclave.slot_keys[index].generation
        async with enclave.slot_work[index]:
            if enclave.slot_keys[index].generation != generation:
                return Repair.REPAIRED
            return await repair_slot(enclave, index, holder_dead=holder_dead, log=self._log)

    async def _recycle(self, grant: Grant, index: int, dead: bool) -> None:
        enclave, client = grant.enclave, grant.client
        client.service.state.write_changed(client)  # before anybody else can have the slot
        try:
            if enclave.state is EnclaveState.LOST:
                return  # its slots went with it
            await self._renew(enclave, index, dead)
        except EnclaveGoneError as error:
            self.lose(enclave, str(error), grant)
        except Exception as error:
            if isinstance(error, EnclaveBrokenError):
                self.give_up(enclave, str(error))
            elif not isinstance(error, WardenError):
                self._log.error("internal error", task="recycle", exc_info=error)
            elif await self.clear(enclave, index, enclave.slot_keys[index].generation) is None:
                grant.uncleared.add(index)  # it failed before the key was gone
            self.quarantine(enclave, index, str(error))
            if grant.outcome is not None:
                grant.outcome.quarantined += 1
        else:
            enclave.recycled += 1
            if grant.outcome is not None:
                grant.outcome.cleared += 1
        finally:
            grant.in_reclaim -= 1
            grant.settle()
            client.returning.pop((enclave.serial, index), None)
            if client.left and not client.returning:
                client.service.state.write_client(client)
            enclave.changed.unpark_all()

    async def recover(self, enclave: Enclave, index: int, *, held_until: int, dead: bool) -> str:
        """After a restart, bring a slot back that nobody holds.

        `held_until` is the last generation that is known to have had a holder, `dead` whether that
        holder's process has ended; of later generations nobody has seen a key.  Returns why no warden can
        be had any more, when that is so.
        """
        try:
            assert enclave.warden is not None
            # It has no generation 0 any more: this only asks which one it has.
            reply = await enclave.warden.control(ControlOp.CLEAR, index)
            generation = reply.result.generation
            enclave.slot_keys[index] = SlotKey(max(generation, held_until), bytes(16))
            await self._renew(enclave, index, dead and generation <= held_until)
        except EnclaveGoneError as error:
            self.lose(enclave, str(error))
        except EnclaveBrokenError as error:
            self.give_up(enclave, str(error))
            self.quarantine(enclave, index, str(error))
            return str(error)
        except WardenError as error:
            self.quarantine(enclave, index, str(error))
        return ""

    async def clear_again(self, enclave: Enclave, index: int) -> None:
        """After a restart, take the key of a quarantined slot away: maybe no warden could before."""
        try:
            assert enclave.warden is not None
            reply = await enclave.warden.control(ControlOp.CLEAR, index)
        except EnclaveGoneError as error:
            self.lose(enclave, str(error))
        except WardenError as error:
            self.give_up(enclave, f"the key of slot {index} could not be taken away: {error}")
        else:
            generation = reply.result.generation
            enclave.slot_keys[index] = SlotKey(generation, bytes(16))
            await self.clear(enclave, index, generation)

    async def _renew(self, enclave: Enclave, index: int, dead: bool) -> None:
        async with enclave.slot_work[index]:
            key = self._next_key(enclave, index)
            outcome = await renew_slot(enclave, index, key, holder_dead=dead, log=self._log)
            if outcome is Repair.BUSY:
                raise UnrepairableError(_BUSY_AFTER_DEATH if dead else _BUSY_BUT_CLEAN)
            if outcome is Repair.ARMED:
                self._armed(enclave, index, key)
            else:
                await self.arm(enclave, index)

    async def arm(self, enclave: Enclave, index: int) -> None:
        """Give a clean slot its next key; it is free then, and goes to whoever waits."""
        key = enclave.slot_keys[index]
        if enclave.warden is not None:
            key = self._next_key(enclave, index)
            reply = await enclave.warden.control(
                ControlOp.ARM, index, generation=key.generation, key=key.key,
                argument=lambda: enclave.slots.is_wanted(index),
            )  # fmt: skip
            require_done(reply, RenewStep.ARM)
        self._armed(enclave, index, key)

    @staticmethod
    def _next_key(enclave: Enclave, index: int) -> SlotKey:
        return enclave.key.new_slot_key(enclave.slot_keys[index].generation + 1)

    def _armed(self, enclave: Enclave, index: int, key: SlotKey) -> None:
        enclave.slot_keys[index] = key
        self.serve(enclave.slots.armed(index))
        enclave.on_armed()

    # -- the queue -------------------------------------------------------------------

    def serve(self, tickets: list[Ticket]) -> None:
        """Wake the requests whose tickets were served."""
        for ticket in tickets:
            self.waiters[ticket].event.set()

    def refuse(self, tickets: list[Ticket], error: errors.Error) -> None:
        """Wake requests that will get no slots."""
        for ticket in tickets:
            waiter = self.waiters[ticket]
            waiter.error = error
            waiter.event.set()

    def quarantine(self, enclave: Enclave, index: int, reason: str) -> None:
        """Never hand the slot out again."""
        enclave.slots.quarantine(index, reason)
        enclave.on_change(enclave)
        self._log.warning("slot quarantined", enclave=enclave.name, slot=index, reason=reason)
        self.refuse(
            enclave.slots.impossible(),
            errors.Busy(
                f"enclave {enclave.name!r} has {enclave.slots.usable} usable slots, fewer than asked for: a"
                " slot of it was put into quarantine just now (`teemate slots` says why)",
                {
                    "limit": "slots of the image",
                    "maximum": enclave.slots.usable,
                    "setting": "teemate image build --slots",
                },
            ),
        )
        if not enclave.slots.usable:
            self.give_up(enclave, "none of its slots is left: all are in quarantine")

    def lose(self, enclave: Enclave, reason: str, grant: Grant | None = None) -> None:
        """The enclave's memory is gone: nobody new gets in, and who is in is told.

        `grant` is the one whose slot came back when the warden's own entry failed: mostly of the client
        that was the first to meet the loss, which makes it no culprit.
        """
        if enclave.state is EnclaveState.LOST or enclave.ending:
            return
        enclave.state = EnclaveState.LOST
        enclave.reason = reason
        met = {}
        if grant is not None:
            identity = grant.client.identity
            met = {"client": grant.client.number, "pid": identity.pid, "uid": identity.uid}
            met["grant"] = grant.number
        enclave.lost_first_seen_by = met
        self._log.warning(
            "enclave lost", enclave=enclave.name, generation=enclave.generation, reason=reason,
            **{f"first_seen_by_{key}": value for key, value in met.items()},
        )  # fmt: skip
        self.refuse(
            enclave.slots.waiting(), errors.EnclaveLost(f"enclave {enclave.name!r} is lost: {reason}")
        )
        self._on_unusable(enclave)

    def give_up(self, enclave: Enclave, reason: str) -> None:
        """No warden can be had for the enclave: nobody new gets in."""
        if enclave.state in (EnclaveState.READY, EnclaveState.BUILDING):
            enclave.state = EnclaveState.QUARANTINED
            enclave.reason = reason
            self._log.warning("enclave quarantined", enclave=enclave.name, reason=reason)
            lost = errors.EnclaveLost(f"enclave {enclave.name!r} is out of use: {reason}")
            self.refuse(enclave.slots.waiting(), lost)
            self._on_unusable(enclave)
