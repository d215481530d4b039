"""The measurement of hostile functions, for half a second each: what it shows however fast the machine is."""

from __future__ import annotations

import os

import neighbours
import pytest
from function_enclaves import functions_image

ENDS = {
    "loop": {"function-limit"},
    "growth": {"function-limit"},
    "bounds": {"function-trapped"},
    "invalid": {"module-invalid", "deployed"},
}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run attackers as other users")
def test_hostile_functions_end_as_they_should_and_cost_no_neighbour_an_answer() -> None:
    functions_image()
    for figures in neighbours.run(list(ENDS), seconds=0.5, attackers=1):
        assert figures.failures == 0
        assert figures.invocations > 0
        assert figures.control_invocations > 0
        assert figures.ends
        assert set(figures.ends) <= ENDS[figures.attack]
