"""Entering and leaving on Linux's driver: the programs of tests/sim/c, run unchanged in the machine."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import machine
import pytest
from machine import Machine

SIM = Path(__file__).parents[1] / "sim"
sys.path.insert(0, str(SIM))
import layout  # noqa: E402
from sim_programs import HARNESS, PROGRAMS, Toolchain  # noqa: E402

# Of what only the sim has; each says its reason when it is run.
SKIPPED = {
    "a_busy_tcs_refuses_the_next",
    "a_call_that_cannot_be_resumed_by_itself_is_paused_and_not_lost",
    "a_check_puts_us_before_a_new_handler",
    "a_crowd_of_handlers_that_we_cannot_remember_is_an_error",
    "a_handler_installed_later_is_named_and_put_behind_us",
    "a_pause_comes_no_earlier_than_asked_for",
    "an_entry_whose_frame_is_no_memory_faults_at_eenter",
    "an_interrupt_from_another_thread_pauses_the_call",
    "the_dead_leave_a_busy_tcs_that_can_be_buried",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Status and last line of each program, from one boot."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "the tests need a C compiler"
    tools = Toolchain(compiler=compiler, directory=tmp_path_factory.mktemp("entering"))
    tools.library()
    sources = sorted(path.name for path in PROGRAMS.glob("*_tests.c"))
    program = tools.link("sim-tests", ["main.c", *sources, *HARNESS])
    sigstruct = tools.directory / "sigstruct"
    sigstruct.write_bytes(layout.sigstruct())
    script = (
        'for name in $("$0" --list); do '
        'timeout 60 "$0" "$name" >/tmp/out 2>&1; echo "$? $name $(tail -n 1 /tmp/out)"; done'
    )
    done = machine.run(
        ["sh", "-c", script, program],
        machine=Machine(cpus=2),
        timeout=600,
        env={"TEEMATE_TEST_BACKEND": "sgx", "TEEMATE_TEST_SIGSTRUCT": str(sigstruct)},
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(\d+) (\w+) ?(.*)$", done.stdout, re.M)
    return {name: (int(status), line) for status, name, line in lines}


def test_every_program_ends_well_in_the_machine(results: dict[str, tuple[int, str]]) -> None:
    assert len(results) > 55
    assert {name: result for name, result in results.items() if result[0] != 0} == {}


def test_only_what_is_about_the_sim_is_skipped_there(results: dict[str, tuple[int, str]]) -> None:
    assert {name for name, (_, line) in results.items() if line.startswith("skipped: about")} == SKIPPED
