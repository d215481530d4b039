"""A client that works while its broker is killed again and again; prints what it did as JSON.

``restart_client.py SOCKET SEED keep|anew``: it holds one grant all the time and asks for more slots of it, or
attaches anew in each round.  What it counts inside is compared with the counter.  SIGTERM stops it.
"""

from __future__ import annotations

import json
import random
import signal
import struct
import sys
import threading
import time
import traceback
from typing import Any

import teemate

ONE = struct.pack("<Q", 1)


class Work:
    """What one process does, and what became of it."""

    def __init__(self, broker: teemate.Broker, seed: int) -> None:
        self.broker = broker
        self.random = random.Random(seed)
        self.rounds = 0
        self.increments = 0
        self.attach_ms: list[float] = []
        self.interrupted_ms: list[float] = []
        """Of attaches in which the broker was away."""
        self.failures: list[str] = []
        self.lock = threading.Lock()

    def count(self, enclave: teemate.Enclave) -> None:
        """Call in some slots, several times."""
        with enclave.slot() as slot:
            for _ in range(self.random.randrange(1, 5)):
                slot.call("count", ONE)
                with self.lock:
                    self.increments += 1

    def attach(self) -> teemate.GrantedEnclave:
        """Attach, and measure how long that takes to the first reply from inside."""
        before = self.broker._connection.resumes
        start = time.monotonic()
        enclave = self.broker.attach("faults", slots=self.random.randrange(1, 3), wait=60)
        with enclave.slot() as slot:
            slot.call("empty")
        taken = self.attach_ms if self.broker._connection.resumes == before else self.interrupted_ms
        taken.append((time.monotonic() - start) * 1000)
        return enclave

    def once(self, enclave: teemate.GrantedEnclave) -> None:
        """Get slots, use them from two threads, give them back."""
        enclave.acquire(1, wait=60)
        other = threading.Thread(target=self.count, args=(enclave,))
        other.start()
        self.count(enclave)
        other.join()
        enclave.release(1)


def main() -> None:
    path, seed, keep = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "keep"
    result: dict[str, Any] = {}
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    with teemate.connect(path, client=f"storm {seed}") as broker:
        work = Work(broker, seed)
        kept = work.attach() if keep else None
        print("ready", flush=True)
        while not stopped.is_set():
            try:
                work.rounds += 1
                if kept is not None:
                    work.once(kept)
                elif work.random.random() < 0.1:  # a new connection
                    with teemate.connect(path) as second:
                        second.ping()
                else:
                    with work.attach() as enclave:
                        work.once(enclave)
            except Exception:
                work.failures.append(traceback.format_exc())
                break
        if kept is not None:
            kept.detach()
        result |= {"resumes": broker._connection.resumes, "session": broker._connection._session.number}
    result |= {"rounds": work.rounds, "increments": work.increments, "attach_ms": work.attach_ms}
    result |= {"interrupted_ms": work.interrupted_ms, "failures": work.failures}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
