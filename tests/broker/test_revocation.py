"""Revoking while the holder gives its slots back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from teemate.broker.enclaves.control import SlotKey, SlotWord
from teemate.broker.slots.revocation import Revocation


def test_leaked_mappings_that_are_over_are_forgotten_also_when_nobody_asks() -> None:
    class Leaked:
        mapped_still = True
        leaked = False

    revocation = Revocation(cast("Any", None))
    grants = [Leaked() for _ in range(100)]
    for grant in grants:
        revocation.note_leaked(cast("Any", grant))
        grant.mapped_still = False
    assert revocation._mapped == {grants[-1]}
    assert revocation.statistics().mapped == 0


async def test_a_slot_that_is_given_back_during_a_revocation_keeps_its_next_holders_key() -> None:
    keys = {index: SlotKey(1, bytes(16)) for index in (2, 3)}
    enclave = SimpleNamespace(slot_keys=keys)
    charges = {2: object(), 3: object()}
    grant: Any = SimpleNamespace(enclave=enclave, slots=[2, 3], charges=charges, uncleared=set())
    cleared: list[tuple[int, int]] = []

    class Reclaimer:
        async def clear(self, _enclave: object, index: int, generation: int) -> SlotWord:
            cleared.append((index, generation))
            if index == 2:  # while the warden is at it, slot 3 comes back and goes to somebody else
                del charges[3]
                keys[3] = SlotKey(2, bytes(16))
            return SlotWord.FREE

    service: Any = SimpleNamespace(reclaimer=Reclaimer())
    await Revocation(service)._clear_keys(grant)
    assert cleared == [(2, 1)]
