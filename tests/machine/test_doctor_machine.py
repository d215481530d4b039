"""``teemate doctor``, and what else speaks of the host, on processors and kernels that lack something.

What root can change in a running machine is in guest/test_doctor_guest.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import machine
import pytest
from machine import Machine

_SCRIPT = """
teemate doctor --json; echo "status $?"
python -m teemate.broker.main --config /dev/null --backend sgx --socket /run/s 2>&1; echo "status $?"
"""


@dataclass(frozen=True)
class Told:
    """What the doctor and a broker that is to take sgx said, with their exit statuses."""

    doctor: dict[str, Any]
    doctor_status: int
    broker: str
    broker_status: int

    def check(self, identifier: str) -> dict[str, str]:
        found: dict[str, str] = next(c for c in self.doctor["checks"] if c["id"] == identifier)
        return found


def boot(**options: Any) -> Told:
    done = machine.run(["sh", "-c", _SCRIPT], machine=Machine(memory="1G", **options), timeout=240)
    assert done.returncode == 0, done.stderr
    doctor, middle, rest = done.stdout.partition("\nstatus ")
    first, _, broker = rest.partition("\n")
    broker, _, second = broker.rpartition("status ")
    assert middle, done.stdout + done.stderr
    return Told(json.loads(doctor), int(first), broker, int(second))


@pytest.mark.parametrize(
    ("options", "identifier", "says"),
    [
        ({"processor": ("sgxlc=off",)}, "launch-control", "no flexible launch control"),
        ({"processor": ("sgx=off",)}, "processor", "the hypervisor does not pass SGX on"),
        ({"kernel_arguments": "nofsgsbase"}, "fsgsbase", "off: backend sgx cannot enter without it"),
        ({"kernel_arguments": "clearcpuid=290"}, "firmware", "switches SGX off: clearcpuid=290"),
    ],
)
def test_what_is_missing_is_the_reason_that_doctor_and_broker_give_and_the_sim_still_works(
    options: dict[str, Any], identifier: str, says: str
) -> None:
    told = boot(**options)
    assert told.doctor["backends"] == {"sgx": False, "sim": True}
    assert (told.doctor["auto"], told.doctor_status) == ("sim", 0)
    check = told.check(identifier)
    assert check["status"] == "problem"
    assert says in check["found"]
    assert told.doctor["auto_reason"].startswith(f"{check['title']}: {check['found']}")
    assert told.broker_status == 1
    assert told.doctor["auto_reason"] in told.broker
    assert "Traceback" not in told.broker
    if identifier == "launch-control":  # the kernel's own word is quoted
        assert "SGX launch control CPU feature is not available" in told.check("kernel-driver")["found"]


def test_a_processor_with_sgx1_alone_works_and_gets_a_warning() -> None:
    done = machine.run(
        ["teemate", "doctor", "--json"], machine=Machine(memory="1G", processor=("sgx2=off",)), timeout=240
    )
    told = json.loads(done.stdout)
    assert (done.returncode, told["backends"]["sgx"], told["auto"]) == (0, True, "sgx")
    (check,) = [check for check in told["checks"] if check["id"] == "sgx2"]
    assert check["status"] == "warning"
    assert "SGX1 only" in check["found"]
