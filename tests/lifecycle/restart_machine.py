"""The model of crowded_machine.py with a broker that is killed at any point, and started again.

What holds then, besides all that held before:

7. **A resumed grant has one owner**: a grant is its first process's for ever.  A client is known again by the
   token that it shows, in the process that got it, and by no other; the token before is good until the
   broker has answered a request after the resumption, and never again.
8. **Nothing is lost**: who comes back within the grace has every grant that it was told of and has not given
   up, and what it had asked is answered, once.
9. **Who does not come back** within the grace is treated as revoked: no key of it opens anything.
"""

from __future__ import annotations

from typing import Any, cast

from crowded_machine import Crowd
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from lifecycle_machine import PROCESSES, SLOTS
from modelled_process import Held, ModelledProcess, Reply
from modelled_restart import GRACE, MortalWorld, ResumingProcess
from modelled_world import ENCLAVE, World

__all__ = ["Arrivals", "Restarts"]

POINTS = 40
"""So many things can be seen of a broker in a turn, about."""
TROUBLE = 15.0
"""Seconds that revoking may take with a warden that hangs."""


class Restarts(Crowd):
    """The broker's deaths, and clients that come back in time, or too late, or as somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.expired: set[int] = set()
        """Processes whose grace was over before they came back."""
        self.owners: dict[int, tuple[int, int]] = {}
        """Whose each grant was at first: pid and start time."""

    def new_world(self, *, kill: bool) -> World:
        return MortalWorld(SLOTS, kill=kill)

    @property
    def mortal(self) -> MortalWorld:
        return cast("MortalWorld", self.there)

    def away(self) -> list[ResumingProcess]:
        """Those whose connection ended with a broker."""
        return [
            process
            for process in cast("list[ResumingProcess]", self.clients())
            if not process.dead and process.sock is None and process.shown is not None
        ]

    # -- events: the broker ------------------------------------------------------------------

    @rule(data=st.data(), points=st.integers(0, POINTS), everybody=st.booleans())
    def the_broker_dies_in_the_middle(self, data: st.DataObject, points: int, everybody: bool) -> None:
        """Of several requests, at a point where something of them can be seen, or when they are done."""
        self.mortal.step(lambda: self.mortal.die_after(points))
        self.many_at_once(data, 0, 3)
        self.the_broker_dies(everybody)

    @rule(everybody=st.booleans())
    def the_broker_dies(self, everybody: bool) -> None:
        """The administrator always comes back at once."""
        if self.world is None:
            return
        self.mortal.restart()
        self.settle()
        self.comes_back(self.there.administrator)
        if everybody:
            for process in self.away():
                self.comes_back(process)

    @rule(data=st.data())
    def one_comes_back(self, data: st.DataObject) -> None:
        process = self.pick(data, self.away())
        if process is not None:
            self.comes_back(process)

    def comes_back(self, process: ModelledProcess) -> None:
        self.there.reconnect(process)
        self.settle()
        self.mortal.step(cast("ResumingProcess", process).ask_again)
        self.settle()

    @staticmethod
    def told(process: ModelledProcess) -> set[int]:
        """The grants that it was told of and has not asked to end."""
        ends = {reply.args["grant"] for reply in process.waiting.values() if reply.op == "detach"}
        return process.grants - ends

    @rule(data=st.data(), points=st.integers(0, 6))
    def the_broker_dies_while_it_greets(self, data: st.DataObject, points: int) -> None:
        """The token that it gave may have been read, or not, or not even been written down."""
        process = self.pick(data, self.away())
        if process is None:
            return
        self.mortal.step(lambda: self.mortal.die_after(points))
        self.comes_back(process)
        self.the_broker_dies(False)

    @rule()
    def the_grace_is_over(self) -> None:
        self.time_passes(GRACE + TROUBLE)

    # -- events: tokens ------------------------------------------------------------------------

    @rule(data=st.data())
    def another_process_shows_the_token(self, data: st.DataObject) -> None:
        victim = self.pick(data, self.away())
        thieves = [process for process in self.clients() if process is not victim and process.sock is None]
        thief = self.pick(data, [process for process in thieves if not process.dead])
        if victim is None or thief is None:
            return
        assert victim.shown is not None
        assert not self.mortal.resumes(thief, victim.shown), "a token was good in another process"

    @rule(data=st.data())
    def it_shows_a_token_that_another_has_taken_the_place_of(self, data: st.DataObject) -> None:
        clients = cast("list[ResumingProcess]", self.clients())
        process = self.pick(data, [process for process in clients if process.stale and not process.dead])
        if process is None:
            return
        if process.sock is not None:
            self.the_broker_dies(False)
        token = data.draw(st.sampled_from(process.stale[-2:]))
        assert not self.mortal.resumes(process, token), "a token was good twice"

    def may_stay(self, held: Held) -> bool:
        """The next broker knows no more whose slot in quarantine was; it tries until its wardens give up."""
        return self.mortal.lives > 1 and held.index in self.mortal.warden.troubled

    # -- events that mean something else here -----------------------------------------------------

    def step(self, *actions: Any) -> None:
        super().step(*actions)
        self.note_who_is_late()

    def note_who_is_late(self) -> None:
        mortal = self.mortal
        if mortal.clock.current_time() - mortal.died_at >= GRACE:
            self.expired |= {process.number for process in self.away()}

    @rule(seconds=st.sampled_from([0.5, 2.0, 8.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        super().time_passes(seconds)
        self.note_who_is_late()

    @rule(data=st.data(), again=st.booleans())
    def close_the_connection_and_live_on(self, data: st.DataObject, again: bool) -> None:
        """It says no more who it was."""
        process = cast("ResumingProcess | None", self.pick(data, self.connected()))
        if process is None:
            return
        for asked in (process.grants, process.waiting, process.revocations):
            asked.clear()
        process.forget()
        self.step(process.disconnect)
        if again and self.at_once is None:
            self.comes_back(process)

    def answered(self, process: ModelledProcess, reply: Reply) -> None:
        super().answered(process, reply)
        told = self.told(process)
        if reply.op != "hello" or reply.ok is None or reply.args["resume"] is None:
            return
        if "resumed" not in reply.ok:
            assert not told or process.number in self.expired, "a client was forgotten"
            process.grants.clear()
        elif ENCLAVE in self.there.service.enclaves:
            lost = told - set(reply.ok["resumed"])
            assert not lost, f"grants {lost} of process {process.number} were lost"

    # -- what always holds ---------------------------------------------------------------------

    @invariant()
    def a_grant_is_its_first_owners_for_ever(self) -> None:
        if self.world is None:
            return
        service = self.there.service
        for grant in service.grants.values():
            client = grant.client
            owner = client.identity.pid, client.identity.uid
            assert self.owners.setdefault(grant.number, owner) == owner, f"grant {grant.number} has moved"
            if client.connection is not None:
                process = self.there.process_at(client.connection._sock)
                assert self.there.pid(process) == client.identity.pid, (
                    f"grant {grant.number} of {client.identity.pid} was resumed by process {process.number}"
                )

    @invariant()
    def who_did_not_come_back_is_revoked(self) -> None:
        if self.world is None:
            return
        mortal = self.mortal
        if mortal.clock.current_time() - mortal.died_at < GRACE + TROUBLE:
            return
        assert not mortal.service.resumption.statistics().suspended
        for process in self.away():
            for held in process.keys:
                slot = self.there.enclave.slots[held.index]
                assert held.index in mortal.warden.troubled or not slot.opens(held.key), (
                    f"process {process.number} did not come back, and can enter slot {held.index}"
                )


class Arrivals(Restarts):
    """And those who connect at that moment."""

    @rule(points=st.integers(0, 8), everybody=st.booleans())
    def the_broker_dies_while_somebody_comes(self, points: int, everybody: bool) -> None:
        """Who may be greeted and given a grant before the broker knows of a client."""
        if len(self.clients()) >= PROCESSES:
            return
        process = self.there.new_process(1000)
        self.mortal.step(lambda: self.mortal.die_after(points))
        self.mortal.step(lambda: self.there.come(process))
        self.settle()
        self.the_broker_dies(everybody)
