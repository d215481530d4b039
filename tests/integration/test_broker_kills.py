"""Real brokers under a keeper, killed at random moments under load: nothing fails, nothing is done twice.

``TEEMATE_KILLS`` and ``TEEMATE_KILL_CLIENTS`` make the campaign longer, ``TEEMATE_KILL_SEED`` another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_broker import DEADLINE
from images import Images
from policies import enclave_policy
from processes import wait_until
from running_broker import RunningBroker, run_broker

import teemate

KILLS = int(os.environ.get("TEEMATE_KILLS", "5"))
CLIENTS = int(os.environ.get("TEEMATE_KILL_CLIENTS", "6"))
SEED = int(os.environ.get("TEEMATE_KILL_SEED", "1"))
PROGRAM = Path(__file__).with_name("restart_client.py")

StartBroker = Callable[..., RunningBroker]


@pytest.fixture
def kill_policy(images: Images) -> str:
    image = images.build("faults", slots=3 * CLIENTS + 4)
    uid = os.geteuid()
    return (
        f"[administrators]\nuids = [{uid}]\n"
        f"[limits]\nconnections = {4 * CLIENTS}\ngrants = {4 * CLIENTS}\nslots = {8 * CLIENTS}\n"
        + enclave_policy("faults", image, f"slots_per_client = 8\nclients_per_uid = {4 * CLIENTS}")
    )


class Clients:
    """Client processes that work until they are stopped."""

    def __init__(self, path: str, cleanup: contextlib.ExitStack) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        for index in range(CLIENTS):
            arguments = [path, str(1000 * SEED + index), "keep" if index % 2 else "anew"]
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), *arguments], stdout=subprocess.PIPE, text=True
            )
            self.processes.append(cleanup.enter_context(process))
            cleanup.callback(process.kill)
        for process in self.processes:
            assert self.line(process) == "ready\n"

    @staticmethod
    def line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline()

    def stop(self) -> list[dict[str, Any]]:
        """Have every client finish its round; returns what they did."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        return [json.loads(self.line(process)) for process in self.processes]


def resumed(kept: RunningBroker) -> bool:
    """Whether the present worker has every client back."""
    with teemate.connect(kept.socket) as admin:
        return len([client for client in admin.clients() if client.name.startswith("storm")]) == CLIENTS


def settled(admin: teemate.Broker) -> teemate.SlotCounts:
    """The slots of the enclave when no more come back."""
    deadline = time.monotonic() + DEADLINE
    while True:
        (info,) = admin.enclaves()
        if info.slots.free == info.slots.total or time.monotonic() > deadline:
            return info.slots


def workers_ready(kept: RunningBroker) -> int:
    return sum(record["event"] == "ready" for record in kept.log())


def test_kills_of_the_broker_under_load_fail_lose_and_repeat_nothing(kill_policy: str) -> None:
    chance = random.Random(SEED)
    with contextlib.ExitStack() as cleanup:
        kept = cleanup.enter_context(run_broker(kill_policy, keeper=True, expect_errors=True))
        cleanup.callback(lambda: print(kept.log_file.read_text()[-20000:]))  # shown when the test fails
        clients = Clients(kept.socket, cleanup)
        for kill in range(KILLS):
            ready = workers_ready(kept)  # the next one may be ready before we look again
            with contextlib.suppress(ProcessLookupError):
                kept.kill_worker()
            # Most kills meet a broker that serves; every fifth one that is about to start.
            if kill % 5:
                wait_until(lambda ready=ready: workers_ready(kept) > ready, "no worker gets ready")
            time.sleep(chance.uniform(0.0, 1.0))
        wait_until(lambda: resumed(kept), "not every client comes back")
        results = clients.stop()
        failures = [failure for result in results for failure in result["failures"]]
        assert not failures, "\n".join(failures)
        with teemate.connect(kept.socket) as admin:
            (info,) = admin.enclaves()
            with admin.attach("faults") as enclave, enclave.slot() as slot:
                (counter,) = struct.unpack("<Q", slot.call("count", bytes(8)))
            slots = settled(admin)
        attach_ms = sorted(ms for result in results for ms in result["attach_ms"])
        interrupted = [ms for result in results for ms in result["interrupted_ms"]]
        figures = {
            "kills": KILLS, "clients": CLIENTS, "rounds": sum(result["rounds"] for result in results),
            "resumes": sum(result["resumes"] for result in results),
            "counter": counter, "counter_expected": sum(result["increments"] for result in results),
            "attach_ms_p50": round(statistics.median(attach_ms), 1), "attach_ms_max": round(attach_ms[-1], 1),
            "interrupted": len(interrupted),
            "interrupted_ms_p50": round(statistics.median(interrupted), 1) if interrupted else None,
            "slots": slots._asdict(),
        }  # fmt: skip
        print(json.dumps(figures))
        assert figures["counter"] == figures["counter_expected"]
        # Of a client that holds nothing the broker need know nothing.
        assert all(result["session"] == 1 for result in results[1::2])
        assert all(result["resumes"] >= 1 for result in results)
        assert (slots.free, slots.quarantined) == (info.slots.total, 0)
