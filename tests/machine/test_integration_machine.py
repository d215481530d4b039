"""The tests of the whole path, unchanged, on Linux's driver; and the demonstration on both backends.

Brokers, wardens, clients and enclaves run in the machine; nothing in these tests knows of it but
TEEMATE_TEST_BACKEND (tests/backends.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine
import pytest
from elves import compile_elf, kept_builds
from images import Images
from machine import Machine

ALL = os.environ.get("TEEMATE_MACHINE_ALL") == "1"
QUICK = ("tests/integration/test_lost.py",)
WHOLE_PATH = (
    *(("tests/integration",) if ALL else QUICK),
    "tests/broker/test_gate_and_death.py",
    "tests/client/test_signals.py",
)
"""What goes all the way through broker, warden and client.  Python is some twenty times slower in there:
all of tests/integration takes a quarter of an hour, for those who set TEEMATE_MACHINE_ALL=1.  The
demonstration, the storm, the service and the containers attach there as well."""

REPAIR = (
    "tests/warden/test_warden_repair.py",
    "tests/warden/test_slot_repair.py",
    "tests/sdk/test_unwind.py",
    "tests/machine/guest/test_lost_inside.py",
    "tests/broker/test_intruders.py::test_who_spins_on_the_wardens_tcss_is_named_and_the_warden_gets_through[0]",
    *(("tests/broker/test_planted_secrets.py",) if ALL else ()),
)
"""Wardens that are killed inside, slots in every state, an EPC that goes, who stands in the warden's way; for
all also what is left in slots, which takes two minutes more."""

CLIENTS = 8 if ALL else 4
HEAP = "4M"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The enclaves of the tests, compiled here: the emulated processor would take minutes for each."""
    folder = kept_builds()
    if folder is None:
        folder = tmp_path / "builds"
        monkeypatch.setenv("TEEMATE_TEST_BUILDS", str(folder))
    images = Images(tmp_path)
    for name in ("vault", "faults", "bare", "raw"):
        images.build(name)
    for defines in ((), ("HANG_AT_START",)):
        source = machine.PROJECT / "tests" / "warden" / "enclave.c"
        compile_elf([source], tmp_path / "warden.elf", defines=defines, test_build="")
    return folder


def pytest_in_the_machine(
    *arguments: str, builds: Path, capsys: pytest.CaptureFixture[str], cpus: int
) -> None:
    """Run tests there with the sgx backend; they must pass, and their closing line is shown."""
    done = machine.run(
        ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        machine=Machine(cpus=cpus, epc="256M", memory="3G"),
        directory=machine.PROJECT,
        env={"TEEMATE_TEST_BACKEND": "sgx", "TEEMATE_TEST_BUILDS": str(builds)},
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with capsys.disabled():
        print("\nin the machine:", done.stdout.splitlines()[-1])
    assert " passed" in done.stdout.splitlines()[-1]


def test_the_whole_path_works_on_the_driver_as_on_the_sim(
    builds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # One processor does with two thirds of the work that two need for the same.
    pytest_in_the_machine(*WHOLE_PATH, builds=builds, capsys=capsys, cpus=1)


def test_what_stands_inside_is_repaired_or_told_to_be_lost(
    builds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest_in_the_machine(*REPAIR, builds=builds, capsys=capsys, cpus=2)


def demo(*options: str) -> list[str]:
    return ["teemate", "demo", "--clients", str(CLIENTS), "--calls", "50", "--heap", HEAP, "--json", *options]


def test_the_demonstration_passes_on_the_driver_with_the_measurement_of_the_sim(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = machine.run(demo("--backend", "sgx"), machine=Machine(epc="128M", memory="3G"), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    on_sgx: dict[str, Any] = json.loads(done.stdout)
    here = [sys.executable, "-c", "from teemate.cli.main import main; main()"]
    command = [*here, *demo("--backend", "sim")[1:]]
    on_sim: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    with capsys.disabled():
        shown = {key: on_sgx[key] for key in ("mrenclave", "calls_total", "failures", "seconds")}
        print("\nin the machine:", json.dumps(shown))
    assert (on_sgx["backend"], on_sim["backend"]) == ("sgx", "sim")
    assert on_sgx["mrenclave"] == on_sim["mrenclave"]
    for figures in (on_sgx, on_sim):
        assert figures["failures"] == 0
        assert figures["counter"] == figures["counter_expected"]
        assert figures["private_counters_match"]
        assert figures["epc_pages_conventional"] == CLIENTS * figures["epc_pages_shared"]
