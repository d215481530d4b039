"""One verifier, two backends: each accepts the reports of its own and rejects those of the other.

The sim's are made and verified here, the driver's in the machine; what goes between them is 432 bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine
import pytest
from images import BuiltImage, Images

PARTY = machine.HERE / "guest" / "report_party.py"
CPUSVN = slice(0, 32)
"""In hex digits."""


@pytest.fixture(scope="module")
def image(images: Images) -> BuiltImage:
    return images.build("vault", slots=1, heap="1M")


def ask(backend: str, image: BuiltImage, reports: list[str], folder: Path) -> dict[str, Any]:
    """Let a party on this backend make its own report, and verify some."""
    orders = folder / "orders.json"
    orders.write_text(json.dumps({"verify": reports}))
    shell = 'exec "$0" "$@" <"$ORDERS"'
    line = ["sh", "-c", shell, sys.executable, str(PARTY), backend, str(image.sgxs), str(image.sigstruct)]
    if backend == "sim":
        done = subprocess.run(line, env={"ORDERS": str(orders)}, capture_output=True, text=True, timeout=60)
    else:
        done = machine.run(line, env={"ORDERS": str(orders)}, directory=machine.PROJECT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_each_backend_accepts_its_own_reports_and_rejects_the_others(
    image: BuiltImage, tmp_path: Path
) -> None:
    sim = ask("sim", image, [], tmp_path)
    # What the sim made is taken there; its keys are public, so an attacker could as well claim SGX's CPUSVN.
    first = ask("sgx", image, [sim["own"]], tmp_path)
    disguised = first["own"][CPUSVN] + sim["own"][CPUSVN.stop :]
    changed = first["own"][:-1] + ("0" if first["own"][-1] != "0" else "1")
    # Another boot of the machine, so another enclave: the same computer, the same image.
    sgx = ask("sgx", image, [first["own"], sim["own"], disguised, changed], tmp_path)
    assert first["verdicts"] == ["foreign"]
    assert sgx["verdicts"] == ["genuine", "foreign", "forged", "forged"]
    back = sim["own"][CPUSVN] + first["own"][CPUSVN.stop :]
    assert ask("sim", image, [sim["own"], first["own"], back], tmp_path)["verdicts"] == [
        "genuine",
        "foreign",
        "forged",
    ]
    assert (sim["simulated"], sgx["simulated"]) == (True, False)


def test_an_image_has_the_same_mrenclave_and_mrsigner_on_both(image: BuiltImage, tmp_path: Path) -> None:
    sim, sgx = (ask(backend, image, [], tmp_path) for backend in ("sim", "sgx"))
    assert sim["mrenclave"] == sgx["mrenclave"] == image.mrenclave.hex()
    assert sim["mrsigner"] == sgx["mrsigner"]
    assert sim["cpusvn"] != sgx["cpusvn"]
