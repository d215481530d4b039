"""The kernel's SGX selftests pass in the machine: the driver and they are foreign, the processor is ours."""

from __future__ import annotations

import re
from pathlib import Path

import machine
import pytest
import selftests

TESTS = {
    "unclobbered_vdso",
    "unclobbered_vdso_oversubscribed",
    "unclobbered_vdso_oversubscribed_remove",
    "clobbered_vdso",
    "clobbered_vdso_and_user_function",
    "tcs_entry",
    "pte_permissions",
    "tcs_permissions",
    "epcm_permissions",
    "augment",
    "augment_via_eaccept",
    "tcs_create",
    "remove_added_page_no_eaccept",
    "remove_added_page_invalid_access",
    "remove_added_page_invalid_access_after_eaccept",
    "remove_untouched_page",
}

# Changes the type of more pages than the EPC holds with one ioctl, and takes for a failure that the ioctl
# returns EAGAIN or EBUSY when the reclaimer just has one of them.  The kernel's developers corrected the
# test for the first of them later.
IMPATIENT = "unclobbered_vdso_oversubscribed_remove"


def passed(output: str) -> set[str]:
    """The names of the tests that the selftests' harness (TAP) says to be ok, without those that skipped."""
    lines = re.findall(r"^ok \d+ enclave\.(\w+)(.*)$", output, re.M)
    return {name for name, rest in lines if "SKIP" not in rest}


def run(folder: Path, **properties: object) -> str:
    done = machine.run(
        ["sh", "-c", "./test_sgx; dmesg | grep -E 'WARNING|BUG:|Oops' && echo KERNEL IN TROUBLE"],
        directory=folder,
        machine=machine.Machine(**properties),  # type: ignore[arg-type]
    )
    assert "KERNEL IN TROUBLE" not in done.stdout, done.stdout
    return done.stdout + done.stderr  # where something fails is told there


def test_the_selftests_of_the_kernel_pass_as_they_are(tmp_path: Path) -> None:
    selftests.build(tmp_path, retry=False)
    output = run(tmp_path)
    assert passed(output) | {IMPATIENT} == TESTS, output


@pytest.mark.parametrize(("cpus", "epc"), [(1, "64M"), (2, "24M")])
def test_all_of_them_pass_when_their_ioctl_is_patient_with_the_reclaimer(
    tmp_path: Path, cpus: int, epc: str
) -> None:
    selftests.build(tmp_path, retry=True)
    output = run(tmp_path, cpus=cpus, epc=epc)
    assert passed(output) == TESTS, output


def test_the_selftests_do_not_pass_on_a_processor_without_sgx(tmp_path: Path) -> None:
    selftests.build(tmp_path, retry=True)
    assert passed(run(tmp_path, processor=("sgx=off",))) == set()
