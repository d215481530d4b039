"""The fault campaign at a reduced size, on Linux's driver."""

from __future__ import annotations

import json

import machine
import pytest
from machine import Machine

SIZE = ("--clients", "2", "--seconds", "400")
KILLS = ("--client-kills", "12", "--broker-kills", "2", "--warden-kills", "2")


def test_nothing_is_lost_in_a_small_storm_on_the_driver(capsys: pytest.CaptureFixture[str]) -> None:
    storm = ["teemate", "bench", "storm", "--json", "--backend", "sgx", "--seed", "1", *SIZE, *KILLS]
    done = machine.run(storm, machine=Machine(epc="512M", memory="4G", cpus=2), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    with capsys.disabled():
        print("\nin the machine:", json.dumps(told))
    assert (told["client_kills"], told["broker_kills"], told["warden_kills"]) == (12, 2, 2)
    assert told["counter"] == told["counter_expected"]
    for nothing in ("slots_lost", "wrong_values", "failed_calls", "repeated_calls", "lost_grants"):
        assert told[nothing] == 0
