"""Going on where the last broker stopped: enclaves and clients from its records and descriptors.

First everything is put in its place, before anybody is listened to: enclaves with their keys and
addresses, clients with their grants, suspended until they resume.  Then, while requests are
answered, each enclave gets a warden, and every slot that no client holds is brought back: repaired if a
holder had died, scrubbed, armed with a generation above what the enclave says.  What the last broker
had begun to make or to destroy when it died is undone, or finished.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import trio

from teemate.broker.connections.clients import Client
from teemate.broker.connections.identity import Peer, reopen_process
from teemate.broker.enclaves.control import ControlKey, SlotKey
from teemate.broker.enclaves.draining import StoredEnclave
from teemate.broker.enclaves.enclave import Enclave, EnclaveState
from teemate.broker.enclaves.source import ImageSource
from teemate.broker.policy.limits import Resource
from teemate.broker.policy.rules import EnclavePolicy
from teemate.broker.restart.cells import Cells
from teemate.broker.restart.records import (
    GUEST,
    ClientRecord,
    EnclaveRecord,
    GrantRecord,
    StoredRecord,
    read_client,
    read_enclave,
    read_stored,
)
from teemate.broker.restart.service_manager import Inherited
from teemate.broker.restart.snapshot import DamagedSnapshotError, Snapshot
from teemate.broker.restart.state import (
    AHEAD,
    COUNTERS,
    EMPTIED,
    SNAPSHOT,
    arena_name,
    enclave_name,
    image_name,
)
from teemate.broker.slots.grants import Grant
from teemate.broker.slots.table import SlotState
from teemate.broker.wardens.warden import EnclaveBrokenError, EnclaveGoneError, WardenError

if TYPE_CHECKING:
    from teemate.broker.service import Service

__all__ = ["Found", "Restoration", "read_found"]


@final
@dataclass(slots=True)
class Found:
    """What the last broker left; `descriptors` are owned by whoever takes them out."""

    snapshot: Snapshot | None = None
    cells: Cells | None = None
    descriptors: dict[str, int] = field(default_factory=dict)
    enclaves: list[EnclaveRecord] = field(default_factory=list)
    clients: dict[int, ClientRecord] = field(default_factory=dict)
    stored: list[StoredRecord] = field(default_factory=list)
    given: set[int] = field(default_factory=set)
    """Grants that the last broker gave, and did not come to note in the audit records."""
    emptied: str = ""


def read_found(kept: list[Inherited]) -> Found:
    """Read what was kept; the descriptors are the result's.

    Raises
    ------
    ForeignSnapshotError, DamagedSnapshotError
        There is something that cannot be gone on with; every descriptor stays open.

    """
    found = Found(descriptors={name: fd for name, fd in kept if name != SNAPSHOT})
    snapshots = [fd for name, fd in kept if name == SNAPSHOT]
    if not snapshots:
        if found.descriptors:
            raise DamagedSnapshotError(
                "descriptors of enclaves were kept, but nothing of what is known of them"
            )
        return found
    found.snapshot = Snapshot.open(snapshots[0])
    cells = found.descriptors.pop(AHEAD, None)  # a broker that gave nothing ahead has left none
    if cells is not None:
        found.cells = Cells.open(cells)
        found.given = found.cells.take_up(found.snapshot)
    for (kind, number), content in found.snapshot.contents.items():
        if kind == "enclave":
            found.enclaves.append(read_enclave(number, content))
        elif kind == "client":
            found.clients[number] = read_client(number, content)
        elif kind == "stored":
            found.stored.append(read_stored(number, content))
        elif kind == EMPTIED.kind:
            found.emptied = str(content["reason"])
        elif kind not in (COUNTERS.kind, GUEST):  # guests of the last broker are nobody's
            raise DamagedSnapshotError(f"the state that was kept has a record of {kind!r}")
    return found


@final
class Restoration:
    """Puts what was found into a new service, once."""

    def __init__(self, service: Service, found: Found) -> None:
        self._service = service
        self._found = found
        self._enclaves: dict[int, Enclave] = {}
        self._dropped: list[int] = []
        self._held_until: dict[tuple[int, int], tuple[int, bool]] = {}
        """Of slots that nobody holds: the last generation that somebody had, and whether it has ended."""
        self._unheld: dict[int, list[int]] = {}
        """Slots that nobody held, by the enclave's serial; whoever ends from now on gives its own back."""
        self._ended: list[int] = []
        self._returning: list[tuple[Client, Mapping[tuple[int, int], int]]] = []
        """Whose slots were on their way back when the last broker ended: until all are recovered."""
        self._ending: set[int] = set()
        """Enclaves whose destruction the last broker had begun."""
        self.tidied = trio.Event()
        """Set when nothing is left of what it was making or taking down."""

    # -- in its place ------------------------------------------------------------------

    def place(self) -> None:
        """Make the objects; nobody is asked for anything."""
        for record in self._found.enclaves:
            self._place_enclave(record)
        for stored in self._found.stored:
            self._place_stored(stored)
        self._service.lifecycle.emptied = self._found.emptied
        for number, client in self._found.clients.items():
            self._place_client(number, client)
        for enclave in self._enclaves.values():
            slots = enclave.slots.slots.items()
            self._unheld[enclave.serial] = [i for i, slot in slots if slot.state is SlotState.ARMING]

    def _place_enclave(self, record: EnclaveRecord) -> None:
        service, descriptors = self._service, self._found.descriptors
        names = (enclave_name(record.serial), arena_name(record.serial))
        if record.state == EnclaveState.BUILDING.value or any(name not in descriptors for name in names):
            # Nobody has seen it yet, or it was being taken down: that is finished now.
            self._dropped.append(record.serial)
            return
        built = record.with_descriptors(*(descriptors.pop(name) for name in names))
        charge = None
        if record.payer is not None and not record.retired:
            charge = service.ledger.account(record.payer).owe(Resource.PAGES, built.pages)
        enclave = Enclave(
            self._policy(record), record.backend, built, charge,
            generation=record.generation, key=ControlKey(record.control_key),
        )  # fmt: skip
        enclave.serial, enclave.requested = record.serial, record.requested
        enclave.payer, enclave.maker = record.payer, record.maker
        enclave.made_from = (record.sigstruct, record.origin)
        enclave.drained, enclave.ending = record.drained, record.ending
        enclave.used = set(record.used)
        image = descriptors.pop(image_name(record.serial), None)
        if image is not None:
            enclave.source = ImageSource(image, record.sigstruct, record.origin)
        for index, reason in record.quarantined.items():
            enclave.slots.quarantine(index, reason, record.former.get(index))
        enclave.state, enclave.reason = EnclaveState(record.state), record.reason
        if record.upgrading and not record.ending and not record.retired:
            enclave.drained, enclave.upgrade_broke_off = "", True
            if enclave.state is EnclaveState.DRAINING:
                enclave.state, enclave.reason = EnclaveState.READY, ""
        enclave.recovered = trio.Event()
        service.addresses.take(built.base, built.size)
        if built.sdk:
            enclave.warden = service.administration.new_warden(enclave, with_storage=not record.retired)
        service.state.watch(enclave)
        self._enclaves[enclave.serial] = enclave
        if record.ending:
            self._ending.add(enclave.serial)
        enclave.retired = record.retired
        if not enclave.retired:
            self._name(enclave)

    def _name(self, enclave: Enclave) -> None:
        """Let it be the enclave of its name, unless its next generation is that already.

        Both are when the last broker had written that the new one is, and not yet that the old one is not.
        """
        enclaves = self._service.enclaves
        other = enclaves.get(enclave.name)
        new = enclave if other is None or other.generation < enclave.generation else other
        enclaves[enclave.name] = new
        old = other if new is enclave else enclave
        if old is not None:
            old.retired = True
            if old.warden is not None:
                old.warden.forget_storage()
            if old.charge is not None:
                old.charge.release()
                old.charge = None

    def _place_stored(self, record: StoredRecord) -> None:
        service = self._service
        image = self._found.descriptors.get(image_name(record.serial))
        if image is None or record.policy.name in service.enclaves:
            # It was not taken down yet, or is built again: what was kept for that is a leftover.
            self._dropped.append(record.serial)
            return
        del self._found.descriptors[image_name(record.serial)]
        charge = None
        if record.payer is not None:
            charge = service.ledger.account(record.payer).owe(Resource.PAGES, record.pages)
        stored = StoredEnclave(
            serial=record.serial, policy=record.policy, backend=record.backend, charge=charge,
            source=ImageSource(image, record.sigstruct, record.origin), generation=record.generation,
            payer=record.payer, maker=record.maker,
        )  # fmt: skip
        service.lifecycle.restore(stored)

    def _policy(self, record: EnclaveRecord) -> EnclavePolicy:
        """What the policy's file says now, else what it said when the enclave was made."""
        found = self._service.policy.entry_for(record.policy, requested=record.requested)
        if found is None and not record.requested:
            self._service.reloading.warn_of_missing(record.policy.name)
        return found or record.policy

    def _place_client(self, number: int, record: ClientRecord) -> None:
        service = self._service
        for grant in record.grants:
            if grant.number in self._found.given and grant.enclave in self._enclaves:
                service.audit.granted(
                    record.identity, client=number, enclave=self._enclaves[grant.enclave].name,
                    grant=grant.number, slots=[slot.index for slot in grant.slots],
                )  # fmt: skip
        pidfd = reopen_process(record.identity.pid, record.started)
        for (serial, index), generation in record.returning.items():
            self._note_holder(serial, index, generation, dead=pidfd is None)
        if pidfd is None:
            for grant in record.grants:
                for slot in grant.slots:
                    self._note_holder(grant.enclave, slot.index, slot.generation, dead=True)
            self._ended.append(number)
            service.log.info("client has ended", client=number, pid=record.identity.pid)
            return
        peer = Peer(identity=record.identity, pidfd=pidfd)
        client = Client(service, number, peer, service.ledger.account(record.identity.uid))
        client.started, client.name, client.left = record.started, record.name, record.left
        client.tokens, client.recalled = record.tokens, dict(record.outcomes)
        client.intents, client.returning = dict(record.intents), dict(record.returning)
        self._returning.append((client, record.returning))
        for grant in record.grants:
            self._place_grant(client, grant)
        if not client.left:
            client.watched = True
            service.clients[number] = client
            service.resumption.suspend(client)
            service.processes.watch(pidfd, lambda: service.resumption.process_ended(client))
        elif client.withheld:
            service.reclaimer.take_back_at_end(pidfd, client.withheld)
        else:
            os.close(pidfd)
            self._ended.append(number)

    def _note_holder(self, serial: int, index: int, generation: int, *, dead: bool) -> None:
        known = self._held_until.get((serial, index), (0, False))
        self._held_until[serial, index] = max(known, (generation, dead))

    def _place_grant(self, client: Client, record: GrantRecord) -> None:
        service, account, uid = self._service, client.account, client.identity.uid
        enclave = self._enclaves.get(record.enclave)
        if enclave is None:
            return  # it was taken down, and the client was told or finds out when it resumes
        grant = Grant(record.number, client, enclave, account.owe(Resource.GRANTS))
        grant.handed_out, grant.revoked, grant.over = True, record.revoked, record.over
        for slot in record.slots:
            if enclave.slots.slots[slot.index].state is not SlotState.ARMING:
                continue  # in quarantine since
            enclave.slots.restore(slot.index, uid, record.number, slot.withheld)
            enclave.slot_keys[slot.index] = SlotKey(slot.generation, slot.key)
            grant.charges[slot.index] = account.owe(Resource.SLOTS)
        if record.revoked:
            service.revocation.note_leaked(grant)
        if record.over:
            grant.charge.release()
            if grant.charges:
                client.withheld.append(grant)
            return
        if not any(other.enclave is enclave for other in client.grants.values()):
            enclave.clients_by_uid[uid] = enclave.clients_by_uid.get(uid, 0) + 1
        client.grants[record.number] = service.grants[record.number] = grant
        enclave.grants.add(record.number)

    # -- into use again ------------------------------------------------------------------

    async def recover(self) -> None:
        """Give every enclave a warden and bring back what nobody holds."""
        service = self._service
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drop_leftovers)
            for enclave in self._enclaves.values():
                nursery.start_soon(self._recover_enclave, enclave)
        for number in self._ended:
            service.state.erase("client", number)
        for client, returning in self._returning:
            for slot, generation in returning.items():
                if client.returning.get(slot) == generation:  # else it gave the slot back again since
                    del client.returning[slot]
        if self._enclaves:
            service.log.info(
                "gone on from the last broker", enclaves=sorted(e.name for e in self._enclaves.values()),
                suspended=service.resumption.statistics().suspended, ended=len(self._ended),
            )  # fmt: skip

    async def _drop_leftovers(self) -> None:
        """What was being made or destroyed when the last broker died."""
        state = self._service.state
        for fd in self._found.descriptors.values():
            os.close(fd)
        serials = {int(name.rpartition("-")[2]) for name in self._found.descriptors}
        for serial in serials.union(self._dropped):
            confirmed = await state.drop_descriptors(serial)
            self._service.log.info("leftover of the last broker dropped", serial=serial, confirmed=confirmed)
            state.erase("enclave", serial)
            state.erase("stored", serial)
        self.tidied.set()

    async def _recover_enclave(self, enclave: Enclave) -> None:
        service = self._service
        try:
            # Also where nobody new gets in: it is taken down when the warden is done with every slot.
            if enclave.state is not EnclaveState.LOST:
                await self._recover_slots(enclave)
        finally:
            enclave.recovered.set()
        if enclave.serial in self._ending:
            service.reclaimer.spawn(service.destruction.finish, enclave)
            return
        if enclave.retired:
            service.generations.retire(enclave)
        elif enclave.state in (EnclaveState.LOST, EnclaveState.QUARANTINED):
            service.generations.replace(enclave)
        revoked = [grant for number in enclave.grants if (grant := service.grants[number]).revoked]
        if revoked:
            service.reclaimer.spawn(
                service.revocation.revoke_all, revoked, None, "the broker", "revoked before its restart"
            )

    async def _recover_slots(self, enclave: Enclave) -> None:
        reclaimer = self._service.reclaimer
        waiting = self._unheld[enclave.serial]
        if enclave.warden is None:
            for index in waiting:
                if index in enclave.used:
                    reclaimer.quarantine(enclave, index, "its image has no SDK, and it was used once")
                else:
                    reclaimer.serve(enclave.slots.armed(index))
            return
        broken = ""
        try:
            await enclave.warden.start()
        except EnclaveGoneError as error:
            reclaimer.lose(enclave, str(error))
        except EnclaveBrokenError as error:
            broken = str(error)
            reclaimer.give_up(enclave, broken)
        except WardenError as error:
            self._service.log.warning("warden not started", enclave=enclave.name, reason=str(error))
        for index in waiting:
            if enclave.state is EnclaveState.LOST:
                return
            if broken:  # to try it with each would take as long as starting a warden may, each time
                reclaimer.quarantine(enclave, index, broken)
                continue
            generation, dead = self._held_until.get((enclave.serial, index), (0, False))
            broken = await reclaimer.recover(enclave, index, held_until=generation, dead=dead)
        for index, slot in enclave.slots.slots.items():
            if slot.state is SlotState.QUARANTINED and not broken:
                await reclaimer.clear_again(enclave, index)
            elif slot.state is SlotState.WITHHELD:  # the last broker may have died before it did
                await reclaimer.clear(enclave, index, enclave.slot_keys[index].generation)
