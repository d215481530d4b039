"""Model check of the life of slots and grants: every order of events that hypothesis can think of.

The broker's real parts (modelled_world.py) against processes that attach, enter, park, are interrupted,
give back honestly or not at all, are revoked, die with or without their connection closing first, and a
warden that hangs or fails.  After each step, when the broker has nothing left to do:

1. **One holder.**  At most one living process has a key that opens a slot, and a slot is handed out only
   when no other living process has it mapped undeclared, stands at its AEP, or has a call in it.  The
   slot table and the grants agree about who holds what.
2. **A right holds.**  Who holds a slot and is not being revoked can enter it.
3. **A revoked key never opens**: from the answer to `revoke` on, none of the keys that the grant ever had,
   given back or not; when the warden cannot take one away, `revoke` fails and the enclave is given up.
4. **Every slot ends** free, scrubbed and armed with a key that nobody has; or quarantined with a reason,
   and only if a warden failed at it or its holder had it in use when the grace of a revocation was over.
5. **Charges balance**: what the accounts say is what the grants and connections hold, to the slot, and
   nothing is left when everybody has left.
6. The broker meets no bug of its own on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from charged_slots import charged_slots, owned_slots
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from modelled_enclave import NSSA, ModelledSlot
from modelled_process import Held, ModelledProcess, Reply
from modelled_world import ENCLAVE, World

from teemate.broker.enclaves.control import SlotWord
from teemate.broker.policy.limits import Resource
from teemate.broker.slots.table import SlotState

__all__ = ["Lifecycle"]

SLOTS = 4
PROCESSES = 5
T = TypeVar("T")


class Lifecycle(RuleBasedStateMachine):
    """The events, and what always holds."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self.closed_keys: set[Held] = set()
        """Of grants whose revocation was answered."""

    @initialize(kill=st.booleans())
    def start(self, kill: bool) -> None:
        """Not from nothing: most of what can happen needs clients with slots."""
        self.world = self.new_world(kill=kill)
        for uid in (1000, 1000, 1001):
            process = self.world.start_process(uid)
            self.step(lambda process=process: process.post("attach", enclave=ENCLAVE, slots=1))

    def may_stay(self, _held: Held) -> bool:
        """Whether a key that a revocation was to take away may be there still though that ended well."""
        return False

    def new_world(self, *, kill: bool) -> World:
        return World(SLOTS, kill=kill)

    # -- picking ------------------------------------------------------------------------

    @property
    def there(self) -> World:
        assert self.world is not None
        return self.world

    def clients(self) -> list[ModelledProcess]:
        if self.world is None:
            return []
        return [p for p in self.world.living() if p is not self.world.administrator]

    def connected(self) -> list[ModelledProcess]:
        return [process for process in self.clients() if process.connected]

    def holders(self) -> list[ModelledProcess]:
        return [process for process in self.clients() if not process.dead and process.held]

    def calls(self, *, running: bool) -> list[ModelledSlot]:
        """Slots with a call of a process that runs, on a CPU or not."""
        if self.world is None:
            return []
        return [
            slot
            for slot in self.world.enclave.slots.values()
            if slot.inside is not None and not slot.inside.dead and (slot.runner is not None) == running
        ]

    @staticmethod
    def pick(data: st.DataObject, choices: Sequence[T]) -> T | None:
        """One of `choices`; None when there is none, and the rule does nothing then.

        A precondition instead would have hypothesis draw rules in vain, and give up whole runs.
        """
        return data.draw(st.sampled_from(choices)) if choices else None

    def settle(self) -> None:
        """Let every process read what came for it."""
        for process in self.there.living():
            if process.sock is not None:
                for reply in process.hear():
                    self.answered(process, reply)

    def answered(self, process: ModelledProcess, reply: Reply) -> None:
        if reply.error is not None:
            assert reply.error["code"] != "internal-error", reply
        if reply.ok is None:
            return
        if reply.op in ("attach", "slots.acquire"):
            grant = reply.ok["grant"] if reply.op == "attach" else reply.args["grant"]
            process.grants.add(grant)
            for slot in reply.ok["slots"]:
                self.handed_out(process, Held(grant, slot["slot"], slot["generation"], slot["key"]))
        elif reply.op == "revoke":
            self.closed_keys |= self.there.revoking.pop(reply.args["tag"])

    def handed_out(self, process: ModelledProcess, held: Held) -> None:
        """Invariant 1, at the moment that counts."""
        slot = self.there.enclave.slots[held.index]
        for other in self.there.living():
            if other is not process and not other.dead:
                assert held.index not in other.held, (
                    f"slot {held.index} went to {process.number} while {other.number} may still use it"
                )
        assert slot.inside is None, f"slot {held.index} was handed out with a call inside"
        assert not slot.dirty, f"slot {held.index} was handed out unscrubbed"
        assert held.index not in process.held, f"slot {held.index} was handed out twice"
        process.held[held.index] = held
        process.keys.append(held)

    def step(self, *actions: Any) -> None:
        for action in actions:
            self.there.step(action)
        self.settle()

    def knows_what_it_has(self) -> bool:
        """Whether a client can say that all slots of a grant are clean: it asks for no more meanwhile."""
        return True

    # -- events: connections ---------------------------------------------------------------

    @rule(uid=st.sampled_from([1000, 1000, 1001]))
    def a_process_connects(self, uid: int) -> None:
        if len(self.clients()) >= PROCESSES:
            return
        self.there.start_process(uid)
        self.settle()

    @rule(data=st.data(), count=st.integers(0, 3), wait=st.sampled_from([0.0, 3.0, None]))
    def attach(self, data: st.DataObject, count: int, wait: float | None) -> None:
        process = self.pick(data, self.connected())
        if process is None:
            return
        waiting = {} if wait is None else {"wait": wait}
        self.step(lambda: process.post("attach", enclave=ENCLAVE, slots=count, **waiting))

    @rule(data=st.data(), count=st.integers(1, 2), wait=st.sampled_from([0.0, 3.0]))
    def acquire(self, data: st.DataObject, count: int, wait: float) -> None:
        process = self.pick(data, [p for p in self.connected() if p.grants])
        if process is None:
            return
        grant = data.draw(st.sampled_from(sorted(process.grants)))
        self.step(lambda: process.post("slots.acquire", grant=grant, count=count, wait=wait))

    @rule(data=st.data())
    def give_back_clean(self, data: st.DataObject) -> None:
        process = self.pick(data, [p for p in self.connected() if p.unused()])
        if process is None:
            return
        held = process.held.pop(data.draw(st.sampled_from(sorted(process.unused()))))
        self.step(lambda: process.post("slots.release", grant=held.grant, slots=[held.index], clean=True))

    @rule(data=st.data())
    def give_back_without_word(self, data: st.DataObject) -> None:
        """Its TCS stays mapped and may be in use."""
        process = self.pick(data, [p for p in self.connected() if p.held])
        if process is None:
            return
        held = process.held[data.draw(st.sampled_from(sorted(process.held)))]
        self.step(lambda: process.post("slots.release", grant=held.grant, slots=[held.index]))

    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        """With word that all is clean when it is."""
        process = self.pick(data, [p for p in self.connected() if p.grants])
        if process is None:
            return
        grant = data.draw(st.sampled_from(sorted(process.grants)))
        mine = [index for index, held in process.held.items() if held.grant == grant]
        clean = self.knows_what_it_has() and not any(process.uses(index) for index in mine)
        if clean:
            for index in mine:
                del process.held[index]
        process.grants.discard(grant)
        self.step(lambda: process.post("detach", grant=grant, clean=clean))

    @rule(data=st.data(), again=st.booleans())
    def close_the_connection_and_live_on(self, data: st.DataObject, again: bool) -> None:
        process = self.pick(data, self.connected())
        if process is None:
            return
        process.grants.clear()
        process.waiting.clear()
        process.revocations.clear()
        self.step(process.disconnect)
        if again:
            self.there.reconnect(process)
            self.settle()

    # -- events: inside ----------------------------------------------------------------------

    @rule(data=st.data())
    def enter(self, data: st.DataObject) -> None:
        process = self.pick(data, self.holders())
        if process is None:
            return
        held = process.held[data.draw(st.sampled_from(sorted(process.held)))]
        self.there.enclave.slots[held.index].enter(process, held.key)

    @rule(data=st.data(), how=st.sampled_from(["leave", "leave", "park", "interrupt"]))
    def stop_running(self, data: st.DataObject, how: str) -> None:
        slot = self.pick(data, self.calls(running=True))
        if slot is None:
            return
        if how == "leave":
            slot.leave()
        elif how == "park":
            slot.park()
        elif slot.cssa + 1 < NSSA:
            slot.interrupt()

    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """ERESUME, or the way back from an OCALL."""
        slot = self.pick(data, self.calls(running=False))
        if slot is None:
            return
        assert slot.inside is not None
        if slot.cssa:
            slot.resume(slot.inside)
        elif slot.state is SlotWord.PARKED:
            key = next(held.key for held in reversed(slot.inside.keys) if held.index == slot.index)
            slot.unpark(slot.inside, key)

    # -- events: death -------------------------------------------------------------------------

    @rule(data=st.data(), order=st.sampled_from(["at once", "connection first", "pidfd alone"]))
    def kill(self, data: st.DataObject, order: str) -> None:
        """SIGKILL; a child of fork() may keep the connection open beyond the end."""
        process = self.pick(data, self.clients())
        if process is None:
            return
        if order == "connection first" and not process.dead:
            self.step(process.die)
            return
        sock = process.sock if order == "pidfd alone" else None
        if sock is not None:
            process.sock = None
        self.step(process.end)
        if sock is not None:
            self.step(sock.close)  # in a step: else the broker hears of it while the invariants are looked at

    # -- events: the administrator --------------------------------------------------------------

    @rule(data=st.data(), grace=st.sampled_from([0.0, 1.0, None]))
    def revoke(self, data: st.DataObject, grace: float | None) -> None:
        process = self.pick(data, [p for p in self.connected() if p.grants])
        if process is None:
            return
        grant = data.draw(st.sampled_from(sorted(process.grants)))
        self.ask_to_revoke({grant}, grace, grant=grant)

    @rule(grace=st.sampled_from([0.0, 1.0]))
    def revoke_all_of_the_enclave(self, grace: float) -> None:
        grants = set(self.there.broker_enclave.grants)
        self.ask_to_revoke(grants, grace, enclave=ENCLAVE)

    def ask_to_revoke(self, grants: set[int], grace: float | None, **target: object) -> None:
        tag = len(self.there.records)
        while tag in self.there.revoking:
            tag += 1
        self.there.revoking[tag] = {
            held for p in self.there.living() for held in p.keys if held.grant in grants
        }
        more = {} if grace is None else {"grace": grace}
        self.step(lambda: self.there.administrator.post("revoke", tag=tag, **target, **more))

    @rule(data=st.data())
    def acknowledge_a_revocation(self, data: st.DataObject) -> None:
        """As the library does: close what can be closed, say whether all of it was."""
        process = self.pick(data, [p for p in self.connected() if p.revocations])
        if process is None:
            return
        event = process.revocations.pop(0)
        slots = [index for index in event["slots"] if index in process.held]
        clean = not any(process.uses(index) for index in slots)
        if clean:
            for index in slots:
                del process.held[index]
        if slots:
            self.step(lambda: process.post("slots.release", grant=event["grant"], slots=slots, clean=clean))

    # -- events: the warden and time --------------------------------------------------------------

    @rule(count=st.sampled_from([1, 2, 3, 6, 12]))
    def the_next_requests_to_the_warden_fail(self, count: int) -> None:
        warden = self.there.warden
        warden.failures = count
        # Mostly none: then the key is there still.
        warden.steps_done = max(0, warden.statistics().requests % 9 - 4)

    @rule(seconds=st.sampled_from([0.5, 5.0]))
    def the_warden_hangs(self, seconds: float) -> None:
        self.there.warden.hang = seconds

    @rule(seconds=st.sampled_from([0.5, 2.0, 8.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.there.pass_time(seconds)
        self.settle()

    # -- what always holds ---------------------------------------------------------------------

    @invariant()
    def one_holder_per_slot(self) -> None:
        if self.world is None:
            return
        for slot in self.world.enclave.slots.values():
            openers = {
                process.number
                for process in self.world.living()
                if not process.dead
                for held in process.keys
                if held.index == slot.index and slot.opens(held.key)
            }
            assert len(openers) <= 1, f"slot {slot.index} opens to processes {sorted(openers)}"
        holders: Counter[int] = Counter()
        table = self.world.broker_enclave.slots.slots
        for grant in self.world.service.grants.values():
            for index in grant.charges:
                holders[index] += 1
                assert table[index].state in (SlotState.ASSIGNED, SlotState.WITHHELD), (
                    f"grant {grant.number} is charged for slot {index}, which is {table[index].state.value}"
                )
                assert table[index].grant == grant.number
        assert all(count == 1 for count in holders.values()), f"held twice: {holders}"

    @invariant()
    def who_holds_a_slot_can_enter_it(self) -> None:
        if self.world is None or self.world.warden.gone:
            return
        for process in self.connected():
            for held in process.held.values():
                grant = self.world.service.grants.get(held.grant)
                state = self.world.broker_enclave.slots.slots[held.index].state
                if grant is None or grant.revoked or state is not SlotState.ASSIGNED:
                    continue
                slot = self.world.enclave.slots[held.index]
                assert slot.opens(held.key), f"process {process.number} is locked out of slot {held.index}"

    @invariant()
    def a_revoked_key_never_opens(self) -> None:
        if self.world is None:
            return
        for held in self.closed_keys:
            if self.may_stay(held):
                continue
            slot = self.world.enclave.slots[held.index]
            assert not slot.opens(held.key), f"a revoked key opens slot {held.index}"

    @invariant()
    def quarantine_has_a_reason(self) -> None:
        if self.world is None:
            return
        for slot in self.world.broker_enclave.slots.slots.values():
            if slot.state is SlotState.QUARANTINED:
                assert slot.reason, f"slot {slot.index} is quarantined without a reason"

    @invariant()
    def charges_balance(self) -> None:
        if self.world is None:
            return
        service = self.world.service
        used: Counter[Resource] = Counter()
        for account in service.ledger._accounts.values():
            used.update(account.used)
        assert used[Resource.GRANTS] == len(service.grants)
        connected = [client for client in service.clients.values() if client.connection is not None]
        assert used[Resource.CONNECTIONS] == len(connected)
        assert charged_slots(service) == owned_slots(service), "a charge is nobody's"

    @invariant()
    def the_broker_meets_no_bug_of_its_own(self) -> None:
        if self.world is not None:
            assert not self.world.errors(), self.world.errors()

    # -- the end ------------------------------------------------------------------------------

    def teardown(self) -> None:
        if self.world is None:
            return
        try:
            self.everybody_leaves()
            self.check_the_end()
        finally:
            self.world.close()

    def everybody_leaves(self) -> None:
        world = self.there
        world.warden.failures = 0
        for process in list(world.living()):
            world.step(process.end)
        world.pass_time(40.0)

    def check_the_end(self) -> None:
        self.the_broker_meets_no_bug_of_its_own()
        self.check_the_slots()
        service, enclave = self.there.service, self.there.broker_enclave
        assert not service.grants
        assert not service.clients
        assert not enclave.grants
        assert not enclave.clients_by_uid
        assert not service.reclaimer.waiters
        for account in service.ledger._accounts.values():
            assert not any(account.used.values()), f"uid {account.uid} is still charged: {account.used}"

    def check_the_slots(self) -> None:
        world, enclave = self.there, self.there.broker_enclave
        known = {(held.index, held.key) for process in world.processes.values() for held in process.keys}
        for index, slot in enclave.slots.slots.items():
            inside = world.enclave.slots[index]
            if slot.state is SlotState.QUARANTINED:
                assert slot.reason, f"slot {index} ended quarantined without a reason"
                allowed = index in world.warden.troubled or slot.reason.startswith("revoked")
                assert allowed, f"slot {index} is in quarantine for nothing: {slot.reason}"
                continue
            free = slot.state in (SlotState.FREE, SlotState.AHEAD)
            assert free, f"slot {index} ended {slot.state.value}: it is lost"
            assert (inside.state, inside.cssa, inside.runner) == (SlotWord.ARMED, 0, None)
            assert not inside.dirty
            assert inside.key == enclave.slot_keys[index].key
            assert (index, inside.key) not in known, f"slot {index} ended free with a key that somebody had"
