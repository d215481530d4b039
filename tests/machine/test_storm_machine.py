"""The fault campaign at a reduced size, on Linux's driver."""

from __future__ import annotations

import json

import machine
import pytest
from machine import Machine

from teemate.bench._where import MET

EACH_STATE = 3
SIZE = ("--clients", "3", "--seconds", "600")
KILLS = (
    "--client-kills",
    "12",
    "--each-state",
    str(EACH_STATE),
    "--broker-kills",
    "2",
    "--warden-kills",
    "2",
)


def test_nothing_is_lost_in_a_small_storm_on_the_driver(capsys: pytest.CaptureFixture[str]) -> None:
    storm = ["teemate", "bench", "storm", "--json", "--backend", "sgx", "--seed", "1", *SIZE, *KILLS]
    done = machine.run(storm, machine=Machine(epc="512M", memory="4G", cpus=2), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    with capsys.disabled():
        print("\nin the machine:", json.dumps(told))
    assert (told["broker_kills"], told["warden_kills"]) == (2, 2)
    assert told["client_kills"] == sum(told["kills_by_state"].values()) >= 12
    for state in MET["sgx"]:
        assert told["kills_by_state"][state] >= EACH_STATE, state
    assert told["slots_repaired"] >= 2 * EACH_STATE
    assert told["counter"] == told["counter_expected"]
    for nothing in ("slots_lost", "wrong_values", "failed_calls", "repeated_calls", "lost_grants"):
        assert told[nothing] == 0
