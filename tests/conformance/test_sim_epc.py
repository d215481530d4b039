"""The sim's EPC below teemate.h: foreign files, scribbled tables, other processes (epc_tests.c)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conformance_runner import build_runner


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_runner(tmp_path_factory.mktemp("epc"), programs=["epc_tests.c"])


def check(program: Path, material: Path, name: str) -> None:
    command = [str(program), str(material), name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (0, "")


def test_only_a_sim_enclave_passes_for_one(program: Path, material: Path) -> None:
    check(program, material, "foreign_files")


def test_a_copy_that_could_shrink_is_refused(program: Path, material: Path) -> None:
    check(program, material, "copies_without_seals")


def test_a_finished_enclave_keeps_its_size_for_ever(program: Path, material: Path) -> None:
    check(program, material, "finished_is_sealed")


def test_an_enclave_is_opened_at_its_own_place_only(program: Path, material: Path) -> None:
    check(program, material, "other_geometry")


def test_an_unfinished_enclave_is_refused(program: Path, material: Path) -> None:
    check(program, material, "unfinished")


def test_ecreate_checks_the_secs(program: Path, material: Path) -> None:
    check(program, material, "secs_checks")


def test_eadd_checks_pages_and_tcss(program: Path, material: Path) -> None:
    check(program, material, "eadd_checks")


def test_einit_checks_what_no_loader_gets_wrong(program: Path, material: Path) -> None:
    check(program, material, "einit_below_the_loader")


def test_blocks_of_the_file_are_the_pages_that_were_added(program: Path, material: Path) -> None:
    check(program, material, "pages_are_counted")


def test_a_scribbled_header_is_an_error_and_no_crash(program: Path, material: Path) -> None:
    check(program, material, "scribble_header")


def test_scribbled_tables_are_errors_and_faults_and_no_crash(program: Path, material: Path) -> None:
    check(program, material, "scribble_tables")


def test_a_restriction_reaches_other_processes_at_their_next_entry(program: Path, material: Path) -> None:
    check(program, material, "restriction_crosses_processes")


def test_privileged_keys_depend_on_what_the_sdm_says(program: Path, material: Path) -> None:
    check(program, material, "privileged_keys")


def test_page_permissions_come_with_faults(program: Path, material: Path) -> None:
    check(program, material, "windows_of_pages")


def test_what_was_mapped_before_is_looked_at_again_when_anything_differs(
    program: Path, material: Path
) -> None:
    check(program, material, "mapped_again")
