"""With a protection switched off, the tests that guard it fail: they are able to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from altered_library import ROOT, Library

GUARDS = {
    "signature": [
        "tests/formats/test_creating.py::test_a_sigstruct_with_a_wrong_signature_is_refused",
        "tests/formats/test_sigstruct.py::test_the_signature_of_another_key_is_refused",
    ],
    "gate": [
        "tests/sdk/test_gate.py::test_a_forged_key_is_refused_at_the_landing_page",
        "tests/sdk/test_gate.py::test_another_slots_key_does_not_open_this_one",
        "tests/sdk/test_gate.py::test_a_replayed_key_of_an_earlier_generation_is_refused",
        "tests/broker/test_old_keys.py::"
        "test_the_next_holder_of_a_slot_is_not_hurt_by_old_keys_and_gets_right_answers_when_interrupted",
    ],
    "scrub": [
        "tests/sdk/test_control.py::test_the_next_holder_finds_nothing_of_the_one_before",
        "tests/sdk/test_control.py::test_an_interrupts_saved_registers_are_scrubbed_too",
        "tests/sdk/test_heap.py::test_a_block_is_zeroes_whatever_was_there_before",
        "tests/broker/test_planted_secrets.py::"
        "test_nothing_of_a_call_is_left_in_its_slot_for_the_next_holder[die-interrupted]",
    ],
    "unwind": [
        "tests/sdk/test_unwind.py::test_an_interrupted_call_that_was_undone_lands_and_its_slot_is_free",
        "tests/warden/test_slot_repair.py::test_a_thread_that_dies_while_it_runs_inside_leaves_a_slot_that_comes_back",
    ],
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("library"))


def outcomes(guards: list[str], module: Path, folder: Path) -> tuple[dict[str, set[str]], str]:
    """Run the guards against `module`; returns how the cases of each ended, and what pytest wrote."""
    environment = dict(os.environ, TEEMATE_ALTERED=str(module), PYTHONPATH=str(Path(__file__).parent))
    command = [sys.executable, "-m", "pytest", "-p", "altered_library", "-q", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", "-rA", "--basetemp", str(folder / "inner"), *guards]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    lines = [line.split(" ") for line in done.stdout.splitlines()]
    seen = {
        guard: {
            line[0]
            for line in lines
            if len(line) > 1 and (line[1] == guard or line[1].startswith(guard + "["))
        }
        for guard in guards
    }
    return seen, done.stdout + done.stderr


@pytest.mark.parametrize("protection", GUARDS)
def test_the_guards_of_a_protection_fail_without_it(
    protection: str, library: Library, tmp_path: Path
) -> None:
    seen, output = outcomes(GUARDS[protection], library.without(protection), tmp_path)
    for guard, results in seen.items():
        assert "FAILED" in results, f"{guard} did not fail without {protection}:\n{output}"
        assert "ERROR" not in results, output


def test_the_guards_pass_when_nothing_is_switched_off(library: Library, tmp_path: Path) -> None:
    """What fails above fails for want of the protection, not of the way it is run."""
    guards = [guard for guards in GUARDS.values() for guard in guards]
    seen, output = outcomes(guards, library.without(None), tmp_path)
    assert all(results == {"PASSED"} for results in seen.values()), output
