"""Making enclaves and changing their pages through Linux's driver, in machines of several kinds."""

from __future__ import annotations

import sys
from pathlib import Path

import elves
import machine
import pytest
from elves import kept_builds
from machine import Machine

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "conformance"))

from conformance_runner import build_runner  # noqa: E402
from sgxs_writer import PAGE, REG, R, Stream, W, X, eadd, sign  # noqa: E402

DRIVER = "tests/machine/guest/test_driver_building.py"


def run_tests(*arguments: str, epc: str, builds: Path) -> str:
    done = machine.run(
        ["python", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments],
        machine=Machine(epc=epc),
        directory=machine.PROJECT,
        env={"TEEMATE_TEST_BACKEND": "sgx", "TEEMATE_TEST_BUILDS": str(builds)},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a signing key lies: the emulated processor would take a minute for one."""
    folder = kept_builds()
    if folder is None:
        folder = tmp_path / "builds"
        monkeypatch.setenv("TEEMATE_TEST_BUILDS", str(folder))
    elves.signing_key()
    return folder


def test_enclaves_are_made_and_refused_as_on_the_sim(builds: Path) -> None:
    formats = ("tests/formats/test_creating.py", "tests/formats/test_image_errors.py")
    run_tests(*formats, DRIVER, epc="64M", builds=builds)


def test_a_full_epc_is_told_as_such(builds: Path) -> None:
    said = run_tests(DRIVER, "-k", "full", epc="2M", builds=builds)
    assert "1 passed" in said


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a program that makes an enclave and changes its pages (sgx2_calls.c)."""
    folder = tmp_path_factory.mktemp("sgx2")
    build_runner(folder, programs=[str(HERE / "sgx2_calls.c")])
    image = Stream(size=1 << 20).page(0, REG | R | X, b"code")
    image.records += [eadd(page * PAGE, REG | R | W) for page in range(1, 101)]
    (folder / "image.sgxs").write_bytes(image.to_bytes())
    (folder / "image.sig").write_bytes(sign(image.mrenclave()))
    return folder


def sgx2_calls(folder: Path, how: str, **options: object) -> list[str]:
    done = machine.run(
        ["./runner", how, "image"],
        directory=folder,
        machine=Machine(**options),  # type: ignore[arg-type]
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (("sgx2=off",), ["restrict: ENODEV 0", "modify: ENODEV 0", "remove: ENODEV 0"]),
        ((), ["restrict: 0 2", "modify: 0 2", "remove: EPERM 0"]),
    ],
    ids=["SGX1", "SGX2"],
)
def test_a_processor_without_sgx2_has_none_of_its_calls(
    pages: Path, processor: tuple[str, ...], expected: list[str]
) -> None:
    """Pages that nobody has accepted cannot be removed, where there is SGX2."""
    assert sgx2_calls(pages, "once", processor=processor) == expected


def test_two_who_change_pages_of_one_enclave_both_succeed(pages: Path) -> None:
    """The driver takes one ioctl at a time and refuses the other with EBUSY."""
    assert sgx2_calls(pages, "together", cpus=2) == ["200 calls, 0 failures, 10000 pages"]
