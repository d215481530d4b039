"""The fault campaign at a reduced size, on Linux's driver."""

from __future__ import annotations

import json

import machine
import pytest
from machine import Machine

from teemate.bench._where import MET

EACH_STATE = 5
SIZE = ("--clients", "2", "--seconds", "400")
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
    # A broker that dies right after a repair has not written it into its log.
    assert told["slots_repaired"] >= EACH_STATE - told["broker_kills"]
    assert told["counter"] == told["counter_expected"]
    for nothing in ("slots_lost", "wrong_values", "failed_calls", "repeated_calls", "lost_grants"):
        assert told[nothing] == 0
