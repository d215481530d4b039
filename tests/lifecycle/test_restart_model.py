"""The model check over the broker's deaths (restart_machine.py), and that it finds what it is there for."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from hashlib import sha256
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test
from restart_machine import Arrivals, Restarts

from teemate.broker.restart.records import greeted_content
from teemate.broker.restart.resumption import Resumption
from teemate.broker.slots.table import SlotTable

RUNS = int(os.environ.get("TEEMATE_MODEL_RUNS", "0"))
"""So many random runs, instead of the few that are always the same."""
QUIET = settings(
    stateful_step_count=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)

LONG = pytest.mark.skipif(
    os.environ.get("TEEMATE_TEST_FULL") != "1", reason="takes long to find: TEEMATE_TEST_FULL=1 runs it"
)

TestRestarts = Arrivals.TestCase
TestRestarts.settings = settings(QUIET, max_examples=RUNS or 20, derandomize=not RUNS)


# ---- a broker with one mistake in it is found out ------------------------------------------------


def _a_token_is_good_in_any_process(patch: pytest.MonkeyPatch) -> None:
    resume = Resumption._resume

    def anybody(self: Resumption, newcomer: Any, token: bytes) -> Any:
        known = self._by_token.get(sha256(token).digest())
        if known is None:
            return None
        newcomer.identity = known.identity
        with mock.patch("teemate.broker.restart.resumption.start_time", return_value=known.started):
            return resume(self, newcomer, token)

    patch.setattr(Resumption, "_resume", anybody)


def _a_token_is_good_for_ever(patch: pytest.MonkeyPatch) -> None:
    """Also when the client has used the one that it got for it."""

    def keep(_self: Resumption, _client: Any) -> None:
        pass

    patch.setattr(Resumption, "first_request", keep)


def _the_token_that_was_shown_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Though the broker may die before the new one is read."""
    greet = Resumption.greet

    def forget(self: Resumption, client: Any, args: Any) -> Any:
        answer = greet(self, client, args)
        for known in self._service.clients.values():
            if len(known.tokens) > 1:
                known.tokens = known.tokens[:1]
                self._service.state.write_client(known)
        return answer

    patch.setattr(Resumption, "greet", forget)


def _the_suspended_are_waited_for_for_ever(patch: pytest.MonkeyPatch) -> None:
    async def run(_self: Resumption) -> None:
        pass

    patch.setattr(Resumption, "run", run)


def _who_was_greeted_is_not_known_by_its_token(patch: pytest.MonkeyPatch) -> None:
    def forget(*args: Any, **named: Any) -> Any:
        return greeted_content(*args, **named) | {"tokens": []}

    patch.setattr("teemate.broker.restart.cells.greeted_content", forget)


def _what_the_suspended_hold_is_free(patch: pytest.MonkeyPatch) -> None:
    def restore(_self: SlotTable, _index: int, _uid: int, _grant: int, _withheld: str) -> None:
        pass

    patch.setattr(SlotTable, "restore", restore)


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(_a_token_is_good_in_any_process, marks=LONG),
        pytest.param(_a_token_is_good_for_ever, marks=LONG),
        pytest.param(_the_token_that_was_shown_is_forgotten, marks=LONG),
        _the_suspended_are_waited_for_for_ever,
        _what_the_suspended_hold_is_free,
        pytest.param(_who_was_greeted_is_not_known_by_its_token, marks=LONG),
    ],
)
def test_the_model_check_finds_a_broker_with_a_mistake(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    machine = Arrivals if mistake is _who_was_greeted_is_not_known_by_its_token else Restarts
    # It ends with the first that is found: mostly within some dozens, the rarest within some hundreds.
    fast = settings(QUIET, max_examples=2000, phases=[Phase.generate], derandomize=True)
    with warnings.catch_warnings():
        # What failed keeps its charges until it is collected.
        warnings.simplefilter("ignore", ResourceWarning)
        # A group when the broker trips over it itself; Flaky when it failed, and otherwise the second time.
        with pytest.raises((AssertionError, ExceptionGroup, Flaky)) as found:
            run_state_machine_as_test(machine, settings=fast)
        del found
        gc.collect()
