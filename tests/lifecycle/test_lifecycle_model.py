"""The model check of slots and grants (lifecycle_machine.py), and that it finds what it is there for."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from crowded_machine import Crowd
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test
from lifecycle_machine import Lifecycle

from teemate.broker.enclaves.control import ControlKey, SlotKey, SlotWord
from teemate.broker.policy.limits import Resource
from teemate.broker.slots.grants import Grant
from teemate.broker.slots.reclaim import Reclaimer
from teemate.broker.slots.revocation import Revocation
from teemate.broker.slots.table import SlotState, SlotTable

RUNS = int(os.environ.get("TEEMATE_MODEL_RUNS", "0"))
"""So many random runs, instead of the few that are always the same."""
QUIET = settings(
    stateful_step_count=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)


LONG = pytest.mark.skipif(
    os.environ.get("TEEMATE_TEST_FULL") != "1",
    reason="takes long to find, and test_uncleared.py shows the same: TEEMATE_TEST_FULL=1 runs it",
)

TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(QUIET, max_examples=RUNS or 60, derandomize=not RUNS)
TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(QUIET, max_examples=RUNS or 40, derandomize=not RUNS)


# ---- a broker with one mistake in it is found out ------------------------------------------------


def _withheld_slot_is_taken_back(patch: pytest.MonkeyPatch) -> None:
    """Though the process that held it lives on and may still use it."""

    def withhold(self: Reclaimer, grant: Grant, indices: list[int], reason: str) -> None:
        for index in indices:
            self.take_back(grant, index, dead=False)

    patch.setattr(Reclaimer, "withhold", withhold)


def _keys_are_used_again(patch: pytest.MonkeyPatch) -> None:
    """The next holder gets a new generation with the last one's key."""
    patch.setattr(
        ControlKey, "new_slot_key", lambda _self, generation: SlotKey(generation, b"the same key....")
    )


def _revoking_clears_nothing(patch: pytest.MonkeyPatch) -> None:
    async def clear(*_: object) -> SlotWord:
        return SlotWord.FREE

    async def repair(*_: object) -> list[int]:
        return []

    patch.setattr(Reclaimer, "clear", clear)
    patch.setattr(Revocation, "_repair_left", repair)


def _a_key_that_stays_is_not_told(patch: pytest.MonkeyPatch) -> None:
    """`revoke` ends well though no warden got the key away."""
    revoke_grant = Revocation._revoke_grant

    async def quiet(self: Revocation, *args: Any) -> dict[str, int]:
        return await revoke_grant(self, *args) | {"uncleared": 0}

    patch.setattr(Revocation, "_revoke_grant", quiet)


def _revoking_forgets_what_was_just_given_back(patch: pytest.MonkeyPatch) -> None:
    """The warden is not done with it, and its key opens still."""

    async def wait(_grant: Grant) -> None:
        pass

    patch.setattr(Revocation, "_wait_returned", staticmethod(wait))


def _slot_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What comes back of a dead process never goes to the warden."""
    take_back = Reclaimer.take_back

    def forget(self: Reclaimer, grant: Grant, index: int, *, dead: bool) -> None:
        if not dead:
            take_back(self, grant, index, dead=dead)
            return
        grant.charges.pop(index).release()
        grant.enclave.slots.returned(index)

    patch.setattr(Reclaimer, "take_back", forget)


def _charge_is_kept(patch: pytest.MonkeyPatch) -> None:
    """The user pays on for a slot that was given back."""
    take_back = Reclaimer.take_back

    def keep(self: Reclaimer, grant: Grant, index: int, *, dead: bool) -> None:
        take_back(self, grant, index, dead=dead)
        grant.client.account.used[Resource.SLOTS] += 1

    patch.setattr(Reclaimer, "take_back", keep)


def _quarantine_without_a_reason(patch: pytest.MonkeyPatch) -> None:
    quarantine = SlotTable.quarantine

    def silent(self: SlotTable, index: int, reason: str) -> None:
        quarantine(self, index, "")

    patch.setattr(SlotTable, "quarantine", silent)


def _one_slot_goes_to_two(patch: pytest.MonkeyPatch) -> None:
    """Serving forgets to take the slot out of those that are free."""
    serve = SlotTable._serve

    def serve_twice(self: SlotTable, ticket: Any) -> None:
        serve(self, ticket)
        if ticket.slots and self.statistics().free == 0:
            index = ticket.slots[0]
            self._free.append(index)
            self._move(index, SlotState.FREE, SlotState.ASSIGNED)

    patch.setattr(SlotTable, "_serve", serve_twice)


@pytest.mark.parametrize(
    "mistake",
    [
        _withheld_slot_is_taken_back,
        _keys_are_used_again,
        _revoking_clears_nothing,
        pytest.param(_a_key_that_stays_is_not_told, marks=LONG),
        pytest.param(_revoking_forgets_what_was_just_given_back, marks=LONG),
        _slot_is_forgotten,
        _charge_is_kept,
        _quarantine_without_a_reason,
        _one_slot_goes_to_two,
    ],
)
def test_the_model_check_finds_a_broker_with_a_mistake(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    fast = settings(QUIET, max_examples=400, phases=[Phase.generate], derandomize=True)
    with warnings.catch_warnings():
        # A broker that stops in the middle keeps its charges; so may one that was patched to.
        warnings.simplefilter("ignore", ResourceWarning)
        # A group when the broker trips over it itself; Flaky when it failed, and otherwise the second time.
        with pytest.raises((AssertionError, ExceptionGroup, Flaky)):
            run_state_machine_as_test(Lifecycle, settings=fast)
        gc.collect()
