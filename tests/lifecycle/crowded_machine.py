"""The model of lifecycle_machine.py with several events at once, in every order that tasks can have.

What a step of the model does, the broker finishes before the next: so two things never meet half-way there.
Here clients and administrators ask for several things before the broker has a turn, about grants
that they were not told of too, and then its tasks run in any order; enclaves are drained, taken into use
again, destroyed and lost meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule
from lifecycle_machine import Lifecycle
from modelled_enclave import FIRST_SLOT
from modelled_process import ModelledProcess, Reply
from modelled_world import ENCLAVE

__all__ = ["Crowd"]

SECONDS = st.sampled_from([0.0, 3.0])


class Crowd(Lifecycle):
    """More events; what always holds is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once: list[Callable[[], object]] | None = None
        """What is gathered for one turn; None: each event is one."""

    def step(self, *actions: Any) -> None:
        if self.at_once is None:
            super().step(*actions)
        else:
            self.at_once += actions

    def knows_what_it_has(self) -> bool:
        return self.at_once is None

    def answered(self, process: ModelledProcess, reply: Reply) -> None:
        super().answered(process, reply)
        if reply.ok is not None and reply.op == "detach":
            process.grants.discard(reply.args["grant"])

    # -- events: as many as hypothesis likes ---------------------------------------------

    @rule(data=st.data(), seed=st.integers(0, 1 << 16), count=st.integers(2, 6))
    def many_at_once(self, data: st.DataObject, seed: int, count: int) -> None:
        """The ends of connections and processes come last: who has ended asks for nothing."""
        self.there.shuffle(seed)
        self.at_once = []
        for _ in range(count):
            self.any_request(data)
        if data.draw(st.booleans()):
            data.draw(st.sampled_from([self.one_ends, self.one_closes]))(data)
        actions, self.at_once = self.at_once, None
        self.step(lambda: [action() for action in actions])

    def any_request(self, data: st.DataObject) -> None:
        ask = data.draw(
            st.sampled_from(
                [
                    lambda: self.attach(data, data.draw(st.integers(0, 3)), data.draw(SECONDS)),
                    lambda: self.acquire(data, 1, data.draw(SECONDS)),
                    lambda: self.give_back_clean(data),
                    lambda: self.give_back_clean(data),
                    lambda: self.detach(data),
                    lambda: self.revoke(data, data.draw(SECONDS)),
                    lambda: self.revoke_all_of_the_enclave(data.draw(SECONDS)),
                    lambda: self.acknowledge_a_revocation(data),
                    lambda: self.ask_about_a_grant_that_it_was_not_told_of(
                        data, data.draw(st.sampled_from(["slots.acquire", "detach"])), data.draw(SECONDS)
                    ),
                    lambda: self.drain(data.draw(SECONDS), data.draw(st.booleans())),
                    lambda: self.undrain(),
                    lambda: self.undrain(),
                ]
            )
        )
        ask()

    def one_ends(self, data: st.DataObject) -> None:
        self.kill(data, "at once")

    def one_closes(self, data: st.DataObject) -> None:
        self.close_the_connection_and_live_on(data, False)

    # -- events: guessing -----------------------------------------------------------------

    @rule(data=st.data(), op=st.sampled_from(["slots.acquire", "slots.release", "detach"]), wait=SECONDS)
    def ask_about_a_grant_that_it_was_not_told_of(self, data: st.DataObject, op: str, wait: float) -> None:
        """One that waits for its slots still, or that the next attach may get."""
        process = self.pick(data, self.connected())
        if process is None:
            return
        service = self.there.service
        untold = [
            grant.number
            for grant in service.grants.values()
            if grant.client.identity.pid == self.there.pid(process) and not grant.handed_out
        ]
        guess = data.draw(st.sampled_from([*untold, service.state._numbers["grant"] + 1]))
        more: dict[str, object] = {"clean": False}
        if op == "slots.acquire":
            more = {"count": 1, "wait": wait}
        elif op == "slots.release":
            more["slots"] = [FIRST_SLOT]
        self.step(lambda: process.post(op, grant=guess, **more))

    # -- events: the administrator ----------------------------------------------------------

    @rule(deadline=SECONDS, force=st.booleans())
    def drain(self, deadline: float, force: bool) -> None:
        administrator = self.there.administrator
        self.step(lambda: administrator.post("drain", enclave=ENCLAVE, deadline=deadline, force=force))

    @rule()
    def undrain(self) -> None:
        self.step(lambda: self.there.administrator.post("undrain", enclave=ENCLAVE))

    @rule(how=st.sampled_from([*["not yet"] * 18, "lost", "destroyed"]))
    def the_enclave_ends(self, how: str) -> None:
        """Rarely: there is no other."""
        if how == "lost":
            self.there.warden.lose()
        elif how == "destroyed":
            self.step(lambda: self.there.administrator.post("destroy", enclave=ENCLAVE, force=True))

    # -- the end ------------------------------------------------------------------------------

    def check_the_slots(self) -> None:
        world = self.there
        if not world.warden.gone and world.service.enclaves.get(ENCLAVE) is world.broker_enclave:
            super().check_the_slots()
