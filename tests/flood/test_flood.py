"""The flood tool, for a second per attack: what it must show whatever the machine's speed is."""

from __future__ import annotations

import flood
import pytest

MEMORY = 32 << 20


@pytest.mark.parametrize("attack", ["requests", "deafness", "lingering"])
def test_a_flood_costs_the_victim_no_attach_and_the_broker_no_memory(attack: str) -> None:
    (figures,) = flood.run([attack], seconds=1.0, attackers=2)
    assert figures.victim_failures == 0
    assert figures.attaches > 0
    assert figures.rss_growth < MEMORY
    assert figures.descriptors_left <= 4


def test_attackers_are_told_which_limit_they_met() -> None:
    (figures,) = flood.run(["deafness"], seconds=1.0, attackers=1)
    assert set(figures.refusals) & {"[limits] grants", "[limits] descriptors_sent"}
