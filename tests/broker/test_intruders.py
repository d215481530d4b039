"""Who is in the warden's own TCSs all the time is reported, and takes nothing down."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from processes import DEADLINE
from raw_client import RawClient
from running_broker import RunningBroker

from teemate.broker.slots.intruders import _QUIET as QUIET

Connect = Callable[..., RawClient]

SPINNER = """
import os, sys
from backends import NUMBER
from raw_client import RawClient
from teemate._native import ffi, lib
client = RawClient(sys.argv[1])
slots = [int(number) for number in sys.argv[2].split(",")]
attached = client.ok("attach", enclave="faults", slots=1)
info = attached["enclave"]
segments = ffi.new("struct teemate_segment[]", [tuple(s) for s in attached["segments"]])
handle = ffi.new("struct teemate_enclave **")
assert lib.teemate_open(
    NUMBER, os.dup(client.fds[0]), info["base"], info["size"], segments, len(segments), handle, ffi.NULL) == 0
enclave = handle[0]
assert lib.teemate_map(enclave, ffi.NULL) == 0
(mine,) = attached["slots"]
first = mine["tcs"] - 4096 * mine["slot"]
for slot in slots:
    assert lib.teemate_map_tcs(enclave, first + 4096 * slot, ffi.NULL) == 0
regs, run = ffi.new("struct teemate_regs *"), ffi.new("struct sgx_enclave_run *")
print("spinning", flush=True)
while True:
    for slot in slots:
        regs.rdi = 3
        lib.teemate_enter(enclave, first + 4096 * slot, regs, 2, 0, run)
        run.exception_vector = run.exception_error_code = run.exception_addr = 0
"""


@contextmanager
def spinner(broker: RunningBroker, slots: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", SPINNER, broker.socket, slots],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"spinning\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("slots", ["0", "1", "0,1"])
def test_who_spins_on_the_wardens_tcss_is_named_and_the_warden_gets_through(
    faults_broker: RunningBroker, connect: Connect, slots: str
) -> None:
    admin = connect(faults_broker)
    with spinner(faults_broker, slots) as process:
        begun = time.monotonic()
        for turn in itertools.count():  # each a few control ECALLs: clear, reset, arm
            grant = admin.ok("attach", enclave="faults", slots=2, wait=60)
            admin.ok("detach", grant=grant["grant"], clean=True)
            while admin.fds:  # of the enclave and its arena, again with every attach
                os.close(admin.fds.pop())
            seen = admin.ok("stats")["stats"]["intruders"]["contended"]
            if slots == "1" and turn == 300:
                break
            if seen > (20 if slots == "0,1" else 0):
                break
            assert time.monotonic() < begun + DEADLINE, "the warden never met who is there all the time"
        (enclave,) = admin.ok("enclaves")["enclaves"]
        assert (enclave["state"], enclave["slots"]["quarantined"]) == ("ready", 0)
        if slots == "1":  # which it uses only when the other is busy
            assert not seen
            return
        assert seen
    records = [record for record in faults_broker.log() if record["event"] == "warden's TCS entered"]
    assert records
    assert len(records) <= 2 + (time.monotonic() - begun) / QUIET, "not one for each entry"
    # The administrator's connection held grants of its own at times: one process, or one of two.
    named = {record.get("culprit") for record in records}
    for record in records:
        named.update(record.get("suspects", []))
    assert process.pid in named
    assert not [record for record in faults_broker.log() if record["event"] == "slot quarantined"]
