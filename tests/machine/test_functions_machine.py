"""Functions on Linux's driver: what hostile modules, killed clients and owners beside each other come to."""

from __future__ import annotations

import os
from pathlib import Path

import machine
import pytest
from machine import Machine

import teemate

FUNCTIONS = machine.PROJECT / "tests" / "functions"
# What proves most in a minute: each kind of end, what is kept apart, and what a death leaves.
CHOSEN = {
    "test_hostile.py": (
        "test_an_infinite_loop_ends_at_its_limit_of_fuel",
        "test_recursion_without_end_ends_at_the_stack",
        "test_memory_that_grows_meets_its_limit",
        "test_a_memory_grows_in_steps_to_the_largest_limit_there_is[64]",
        "test_output_without_end_meets_its_limit",
        "test_traps_end_the_invocation_alone[load behind the end]",
        "test_traps_end_the_invocation_alone[memory.copy]",
        "test_traps_end_the_invocation_alone[table.get]",
        "test_traps_end_the_invocation_alone[division by zero]",
        "test_wasi_believes_no_address",
        "test_what_is_no_module_is_refused_with_the_reason[cut]",
        "test_what_is_no_module_is_refused_with_the_reason[a type that is wrong]",
        "test_floats_are_computed_as_everywhere_else",
    ),
    "test_scrubbing.py": ("test_nothing_of_an_invocation_is_there_for_the_next",),
    "test_function_keys.py": (
        "test_what_is_put_is_got_listed_and_deleted",
        "test_owners_keys_are_apart",
        "test_nothing_is_there_without_a_grant",
    ),
    "test_sealed.py": ("test_an_offer_is_for_its_slot_and_its_owner",),
    "test_gateway_whole.py": (
        "test_a_sealed_function_with_the_grant_keeps_what_is_posted",
        "test_a_function_answers_while_its_body_comes",
        "test_what_is_too_much_or_takes_too_long_is_refused_and_a_killed_worker_costs_its_own_requests",
    ),
    "test_ready_ahead.py": (
        "test_what_starts_often_is_ready_for_the_next_holder",
        "test_another_owner_gets_a_slot_with_nothing_of_it",
    ),
    "test_owners.py": (
        "test_functions_of_two_owners_know_nothing_of_each_other",
        "test_the_next_holder_of_a_slot_finds_nothing_of_the_last",
        "test_what_a_killed_clients_invocation_had_is_freed_by_the_repair",
    ),
}


def test_hostile_modules_end_in_typed_errors_on_the_driver(capsys: pytest.CaptureFixture[str]) -> None:
    image = Path(teemate.__file__).parent / "images" / "functions.sgxs"
    if not image.exists():
        pytest.skip("the functions enclave was not built: there was no cargo (build log)")
    if os.environ.get("TEEMATE_MACHINE_ALL") == "1":  # minutes
        tests = [str(FUNCTIONS / file) for file in CHOSEN]
    else:
        tests = [f"{FUNCTIONS / file}::{test}" for file, chosen in CHOSEN.items() for test in chosen]
    done = machine.run(
        ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=8", *tests],
        machine=Machine(epc="256M", memory="3G"),
        directory=machine.PROJECT,
        env={"TEEMATE_TEST_BACKEND": "sgx"},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout.splitlines()[-1]
    with capsys.disabled():
        print("\nin the machine:", told)
    assert " passed" in told
    assert "skipped" not in told
