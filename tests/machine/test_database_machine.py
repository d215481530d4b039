"""The confidential database on Linux's driver: work, kills and tampering, at a reduced size."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import machine
import pytest
from elves import signing_key
from images import layout_options
from machine import Machine

import teemate
from teemate.image import SigParams, layout_image, sign_with_key

DATABASE = machine.PROJECT / "tests" / "db"
TRANSACTIONS, KILLS = 80, 4
WORK = (
    "python", str(DATABASE / "bank.py"), "--transactions", str(TRANSACTIONS), "--kills", str(KILLS),
    "--broker-kills", "1", "--warden-kills", "1", "--tellers", "3", "--no-containers", "--no-look", "--json",
)  # fmt: skip
# A byte of each kind in files of this life and of the last, and each kind of older state.
TAMPERING = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(DATABASE / "test_tampering.py"))


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """The image that is installed, with a heap that is built in a second there."""
    elf = Path(teemate.__file__).parent / "images" / "db.elf"
    if not elf.exists():
        pytest.skip("the database enclave was not built: SQLite's source was not to be had (build log)")
    image = tmp_path / "db.sgxs"
    built = layout_image(elf, image, layout_options("db", heap="24M", slots=8))
    signature = sign_with_key(SigParams().unsigned(built.mrenclave), signing_key())
    image.with_suffix(".sig").write_bytes(signature.to_bytes())
    image.with_suffix(".elf").symlink_to(elf)
    return image


def test_nothing_is_lost_and_nothing_false_is_believed_on_the_driver(
    database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = f"{shlex.join(WORK)} && {shlex.join(TAMPERING)}"
    done = machine.run(
        ["sh", "-c", both],
        machine=Machine(epc="256M", memory="3G"),
        directory=machine.PROJECT,
        env={"TEEMATE_TEST_BACKEND": "sgx", "TEEMATE_TEST_DATABASE": str(database)},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told, *tested = done.stdout.splitlines()
    with capsys.disabled():
        print("\nin the machine:", told, tested[-1])
    figures = json.loads(told)
    assert figures["backend"] == "sgx"
    assert figures["good"]
    assert figures["transactions"] >= TRANSACTIONS
    assert figures["kills"] == {"teller": KILLS, "container": 0, "broker": 1, "warden": 1}
    assert " passed" in tested[-1]
    assert "skipped" not in tested[-1]
