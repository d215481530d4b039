"""Every example over HTTP while workers are killed: each request is answered once, and nothing stays behind.

    .venv/bin/python tests/functions/gateway_kills.py --requests 2000 --kills 40 --json

So many requests for each example, from several clients at once, in random order.  A result has to be
the right one; an honest error is 503 or 504, or a connection that is closed without a whole answer, since
whoever had accepted it died.  In the end all slots are free, and the heap is what it was.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import json
import operator
import random
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import references
from example_programs import NAMES
from processes import wait_until
from running_broker import RunningBroker
from running_functions import assemblyscript_module, free_slots, module, run_functions
from running_gateway import CUT, Killer, run_gateway

import teemate
from teemate.functions import Functions, FunctionUsage

WORKERS, SLOTS = 2, 2
CLIENTS = 4
HONEST = (503, 504)


@dataclass(frozen=True)
class Case:
    """A request, and the answer that is right."""

    function: str
    args: Sequence[str]
    payload: bytes
    expected: bytes

    @property
    def path(self) -> str:
        query = "&".join(f"arg={arg}" for arg in self.args)
        return f"/fn/{self.function}" + (f"?{query}" if query else "")


@dataclass
class Campaign:
    """What came of it."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    """For each function, how its requests ended: a status, or ``closed``."""
    wrong: int = 0
    kills: int = 0
    seconds: float = 0.0
    slots_kept: int = 0
    blocks_kept: int = 0
    heap_kept: int = 0
    """Bytes."""
    invoked: dict[str, int] = field(default_factory=dict)
    """By the enclave's count."""

    def sent(self) -> int:
        return sum(count for of in self.outcomes.values() for count in of.values())


def payloads(name: str, chance: random.Random) -> list[tuple[list[str], bytes, Callable[[bytes], bool]]]:
    """Arguments, payloads, and whether a result is right, by what the references say."""
    texts = [b"%d " % number * chance.randrange(1, 3000) for number in range(6)]
    if name == "sha256":
        return [
            ([], text, lambda out, text=text: out.decode() == hashlib.sha256(text).hexdigest() + "\n")
            for text in texts
        ]
    if name == "gzip":
        return [([], text, lambda out, text=text: gzip.decompress(out) == text) for text in texts]
    if name == "json":
        return [
            ([], text, lambda out, text=text: out.rstrip(b"\n") == references.canonical(text))
            for text in references.json_texts(17, 6)
        ]
    if name == "matmul":
        found = []
        for m, k, n in ((1, 1, 1), (2, 3, 4), (12, 9, 10)):
            left = [float(chance.randrange(9)) for _ in range(m * k)]
            right = [float(chance.randrange(9)) for _ in range(k * n)]
            right_one = struct.pack(f"<{m * n}d", *references.product(m, k, n, left, right))
            payload = references.matrix_payload(m, k, n, left, right)
            found.append(([], payload, functools.partial(operator.eq, right_one)))
        return found
    if name == "thumbnail":
        return [
            (
                ["16"],
                references.qoi_write(picture, chance),
                lambda out, picture=picture: references.qoi_read(out) == references.shrink(picture, 16),
            )
            for picture in references.pictures(12)
        ]
    assert name == "words", f"there is no reference for {name} here"
    return [([], b"one two two three three three ", lambda out: b"3" in out)]


def prepare(functions: Functions, folder: Path, *, assemblyscript: bool) -> list[Case]:
    """Deploy the examples, and return requests whose results are right by the references."""
    chance = random.Random(41)
    cases = []
    for name in (*NAMES, *(["words"] if assemblyscript else [])):
        code = assemblyscript_module(name, folder) if name == "words" else module(name, folder)
        functions.deploy(name, code, replace=True)
        for args, payload, is_right in payloads(name, chance):
            expected = functions.invoke(name, payload, args=args)
            assert is_right(expected), (name, args, payload[:100], expected[:100])
            cases.append(Case(name, args, payload, expected))
    return cases


def campaign(
    running: RunningBroker,
    folder: Path,
    *,
    requests: int,
    kills: int,
    assemblyscript: bool = False,
    seed: int = 31,
    say: Callable[[str], None] = lambda _: None,
) -> Campaign:
    """Send `requests` for each function, and more until all `kills` have been done."""
    free, before = free_slots(running)[0], _usage(running, free=None)
    with teemate.connect(running.socket) as broker:
        functions = broker.functions
        cases = prepare(functions, folder, assemblyscript=assemblyscript)
        counted = {info.name: info.invocations for info in functions.list()}
        result = _send(running, cases, requests, kills, seed, say)
        for info in functions.list():
            result.invoked[info.name] = info.invocations - counted[info.name]
            functions.remove(info.name)
    after = _usage(running, free=free)
    result.blocks_kept = after.blocks_owned - before.blocks_owned
    result.heap_kept = after.heap_used - before.heap_used
    result.slots_kept = free - free_slots(running)[0]
    return result


def _usage(running: RunningBroker, *, free: int | None) -> FunctionUsage:
    """Look when as many slots are `free` (as are now), and wait until they are again."""
    free = free_slots(running)[0] if free is None else free
    wait_until(lambda: free_slots(running)[0] >= free, "all slots are free again")
    with teemate.connect(running.socket) as broker:
        usage = broker.functions.usage()
    wait_until(lambda: free_slots(running)[0] >= free, "all slots are free again")
    return usage


def _send(
    running: RunningBroker,
    cases: Sequence[Case],
    requests: int,
    kills: int,
    seed: int,
    say: Callable[[str], None],
) -> Campaign:
    names = sorted({case.function for case in cases})
    by_name = {name: [case for case in cases if case.function == name] for name in names}
    order = [name for name in names for _ in range(requests)]
    random.Random(seed).shuffle(order)
    result = Campaign({name: Counter() for name in names})
    began = time.monotonic()
    options = ("--workers", str(WORKERS), "--slots", str(SLOTS), "--max-body", "8M")
    with run_gateway(*options, broker=running.socket) as gateway:
        killer = Killer(gateway, workers=WORKERS, kills=kills)
        lock, failures = threading.Lock(), list[BaseException]()

        def next_name(chance: random.Random) -> str | None:
            with lock:
                if len(order) % 1000 == 500:
                    say(f"{len(order)} requests left")
                if order:
                    return order.pop()
            return chance.choice(names) if killer.is_alive() and not failures else None

        def ask(number: int) -> None:
            chance = random.Random(seed * 1000 + number)
            try:
                while (name := next_name(chance)) is not None:
                    case = chance.choice(by_name[name])
                    try:
                        reply = gateway.request("POST", case.path, case.payload)
                    except CUT:
                        outcome, wrong = "closed", False
                    else:
                        outcome = str(reply.status)
                        right = reply.body == case.expected
                        wrong = not right if reply.status == 200 else reply.status not in HONEST
                    with lock:
                        result.outcomes[name][outcome] += 1
                        result.wrong += wrong
            except BaseException as failure:
                failures.append(failure)

        clients = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        killer.finish()
        if failures:
            raise failures[0]
        result.kills = len(gateway.log("worker ended"))
        # Nothing is asked again behind its sender's back.
        assert len(gateway.log("request")) <= result.sent()
    result.seconds = round(time.monotonic() - began, 1)
    return result


def check(result: Campaign) -> None:
    """See that it is what it has to be."""
    assert not result.wrong, result
    assert (result.slots_kept, result.blocks_kept, result.heap_kept) == (0, 0, 0), result
    for name, outcomes in result.outcomes.items():
        assert outcomes["200"] > outcomes.total() / 2, result
        # What was answered was done, and nothing was done twice.
        assert outcomes["200"] <= result.invoked[name] <= outcomes.total(), result


def main() -> None:
    """Run it, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="of each function")
    parser.add_argument("--kills", type=int, default=40, help="of workers")
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--assemblyscript", action="store_true", help="the example in it too: needs npm")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, run_functions() as running:
        result = campaign(
            running,
            Path(folder),
            requests=given.requests,
            kills=given.kills,
            assemblyscript=given.assemblyscript,
            seed=given.seed,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    if given.json:
        print(json.dumps(vars(result), indent=2))
    else:
        for name, outcomes in result.outcomes.items():
            print(f"{name:10} {dict(outcomes)}, the enclave counts {result.invoked[name]}")
        print(
            f"{result.sent()} requests, {result.kills} workers killed, {result.seconds:g} s; "
            f"wrong: {result.wrong}"
        )
        print(f"left: {result.slots_kept} slots, {result.blocks_kept} blocks, {result.heap_kept} bytes")
    check(result)


if __name__ == "__main__":
    main()
