"""Every example over HTTP while workers are killed: each request is answered once, and nothing stays behind.

    .venv/bin/python tests/functions/gateway_kills.py --requests 2000 --kills 40 --json

So many requests for each example, from several clients at once, in random order.  A result has to be
the right one; an honest error is 503 or 504, as problem details, or a connection that is closed without a
whole answer while a worker was killed, since whoever had accepted it died.  What comes behind an answer, work
that was done for nobody, and a closed connection when nobody died are found (--fault has a proxy do each).
In the end all slots are free, and the heap is what it was.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import references
from example_programs import NAMES
from faulty_proxy import FAULTS, faulty
from processes import wait_until
from running_broker import RunningBroker
from running_functions import assemblyscript_module, free_slots, module, run_functions
from running_gateway import Killer, RunningGateway, exchange, run_gateway

import teemate
from teemate.functions import Functions, FunctionUsage

WORKERS, SLOTS = 2, 2
CLIENTS = 4
HONEST = ("503", "504")


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
    wrong: Counter[str] = field(default_factory=Counter)
    """What may not be, and how often it was."""
    kills: int = 0
    seconds: float = 0.0
    slots_kept: int = 0
    blocks_kept: int = 0
    heap_kept: int = 0
    """Bytes."""
    invoked: dict[str, int] = field(default_factory=dict)
    """By the enclave's count."""
    unclaimed: dict[str, int] = field(default_factory=dict)
    """What the gateway has answered to nobody who got it."""
    errors: dict[str, int] = field(default_factory=dict)
    """What the gateway's log says of honest errors."""

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


def compiled(folder: Path, *, assemblyscript: bool = False) -> dict[str, bytes]:
    """Return the examples; before anybody connects, since a compiler takes longer than a broker waits."""
    modules = {name: module(name, folder) for name in NAMES}
    return modules | ({"words": assemblyscript_module("words", folder)} if assemblyscript else {})


def prepare(functions: Functions, modules: Mapping[str, bytes]) -> list[Case]:
    """Deploy the examples, and return requests whose results are right by the references."""
    chance = random.Random(41)
    cases = []
    for name, code in modules.items():
        functions.deploy(name, code, replace=True)
        for args, payload, is_right in payloads(name, chance):
            expected = functions.invoke(name, payload, args=args)
            assert is_right(expected), (name, args, payload[:100], expected[:100])
            cases.append(Case(name, args, payload, expected))
    return cases


def campaign(
    running: RunningBroker,
    modules: Mapping[str, bytes],
    *,
    requests: int,
    kills: int,
    seed: int = 31,
    fault: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Campaign:
    """Send `requests` for each function, and more until all `kills` have been done."""
    free, before = free_slots(running)[0], _usage(running, free=None)
    with teemate.connect(running.socket) as broker:
        functions = broker.functions
        cases = prepare(functions, modules)
        counted = {info.name: info.invocations for info in functions.list()}
        result = _send(running, cases, requests, kills, seed, fault, say)
        for info in functions.list():
            result.invoked[info.name] = info.invocations - counted[info.name]
            functions.remove(info.name)

    def nothing_is_kept() -> bool:
        """What is just being made ready in a free slot is counted as such when it is done."""
        after = _usage(running, free=free)
        result.blocks_kept = after.blocks_owned - before.blocks_owned
        result.heap_kept = (after.heap_used - after.heap_ready) - (before.heap_used - before.heap_ready)
        result.slots_kept = free - free_slots(running)[0]
        return (result.slots_kept, result.blocks_kept, result.heap_kept) == (0, 0, 0)

    with contextlib.suppress(AssertionError):
        wait_until(nothing_is_kept, "nothing is kept")
    return result


def _usage(running: RunningBroker, *, free: int | None) -> FunctionUsage:
    """Look when as many slots are `free` (as are now), and wait until they are again."""
    free = free_slots(running)[0] if free is None else free
    _settled(running, free)
    with teemate.connect(running.socket) as broker:
        usage = broker.functions.usage()
    _settled(running, free)
    return usage


def _settled(running: RunningBroker, free: int) -> None:
    """Wait until so many slots are free, or as long as that may take: what is kept is counted then."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: free_slots(running)[0] >= free, "all slots are free again")


def judge(case: Case, raw: bytes) -> tuple[str, str, str]:
    """Return status or ``closed``, which answer of the gateway's it is, and what is wrong with it."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status, _, fields = head.decode("latin-1").partition("\r\n")
    lines = (line.partition(":") for line in fields.split("\r\n"))
    headers = {name.lower(): value.strip() for name, _, value in lines}
    length = int(headers.get("content-length", "-1"))
    if not 0 <= length <= len(body):
        return "closed", "", ""
    code, answer = status.split(" ")[1], headers.get("teemate-request", "")
    if len(body) > length:
        return code, answer, "something behind the answer"
    if code == "200":
        return code, answer, "" if body == case.expected else "another result"
    honest = code in HONEST and headers["content-type"] == "application/problem+json"
    if not honest or json.loads(body)["status"] != int(code):
        return code, answer, f"an answer {code} that is no honest error"
    return code, answer, ""


def _send(
    running: RunningBroker,
    cases: Sequence[Case],
    requests: int,
    kills: int,
    seed: int,
    fault: str | None,
    say: Callable[[str], None],
) -> Campaign:
    options = ("--workers", str(WORKERS), "--slots", str(SLOTS), "--max-body", "8M")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(run_gateway(*options, broker=running.socket))
        where = gateway.socket
        if fault is not None:
            where = stack.enter_context(faulty(where, Path(where).parent, fault))
        killer = Killer(gateway, workers=WORKERS, kills=kills)
        clients = _Clients(where, cases, requests, seed, killer, say)
        clients.run()
        killer.finish()
        result = clients.result
        result.kills = len(gateway.log("worker ended"))
        _claim(result, gateway, clients.answers)
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _claim(result: Campaign, gateway: RunningGateway, answers: Counter[str]) -> None:
    """Compare what the gateway says that it answered with what came."""
    if twice := sum(count - 1 for count in answers.values()):
        result.wrong["one answer for several requests"] += twice
    result.errors = dict(Counter(record["reason"] for record in gateway.log("invocation failed")))
    for record in gateway.log("request"):
        if not answers[record["request"]]:
            name = record["path"].rpartition("/")[2]
            result.unclaimed[name] = result.unclaimed.get(name, 0) + 1


class _Clients:
    """Several clients, each of which sends one request after the other."""

    def __init__(
        self,
        where: str,
        cases: Sequence[Case],
        requests: int,
        seed: int,
        killer: Killer,
        say: Callable[[str], None],
    ) -> None:
        self._where = where
        self._names = sorted({case.function for case in cases})
        self._cases = {name: [case for case in cases if case.function == name] for name in self._names}
        self._order = [name for name in self._names for _ in range(requests)]
        random.Random(seed).shuffle(self._order)
        self._seed = seed
        self._killer = killer
        self._say = say
        self._lock = threading.Lock()
        self._failures: list[BaseException] = []
        self.result = Campaign({name: Counter() for name in self._names})
        self.answers: Counter[str] = Counter()
        """By the number that the gateway gives each request."""

    def run(self) -> None:
        """Send all; raises what went wrong in a client."""
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _next(self, chance: random.Random) -> str | None:
        with self._lock:
            if len(self._order) % 1000 == 500:
                self._say(f"{len(self._order)} requests left")
            if self._order:
                return self._order.pop()
        return chance.choice(self._names) if self._killer.is_alive() and not self._failures else None

    def _ask(self, number: int) -> None:
        chance = random.Random(self._seed * 1000 + number)
        try:
            while (name := self._next(chance)) is not None:
                case = chance.choice(self._cases[name])
                sent = time.monotonic()
                raw = exchange(self._where, case.path, case.payload)
                ended = time.monotonic()
                status, answer, wrong = judge(case, raw)
                if status == "closed" and not self._killer.explains(sent, ended):
                    wrong = "closed, and nobody had died"
                with self._lock:
                    self.result.outcomes[name][status] += 1
                    if wrong:
                        self.result.wrong[wrong] += 1
                    if answer:
                        self.answers[answer] += 1
        except BaseException as failure:
            self._failures.append(failure)


def check(result: Campaign) -> None:
    """See that it is what it has to be."""
    assert not result.wrong, result
    assert (result.slots_kept, result.blocks_kept, result.heap_kept) == (0, 0, 0), result
    for name, outcomes in result.outcomes.items():
        assert outcomes["200"] > outcomes.total() / 2, result
        # What was answered was done, and nothing was done twice, nor answered to nobody.
        assert outcomes["200"] <= result.invoked[name] <= outcomes.total(), result
        assert result.unclaimed.get(name, 0) <= outcomes["closed"], result


def main() -> None:
    """Run it, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="of each function")
    parser.add_argument("--kills", type=int, default=40, help="of workers")
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--assemblyscript", action="store_true", help="the example in it too: needs npm")
    parser.add_argument("--fault", choices=FAULTS, help="of a proxy before the gateway: has to be found")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, run_functions() as running:
        result = campaign(
            running,
            compiled(Path(folder), assemblyscript=given.assemblyscript),
            requests=given.requests,
            kills=given.kills,
            seed=given.seed,
            fault=given.fault,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    if given.json:
        print(json.dumps(vars(result), indent=2))
    else:
        for name, outcomes in result.outcomes.items():
            print(f"{name:10} {dict(outcomes)}, the enclave counts {result.invoked[name]}")
        print(
            f"{result.sent()} requests, {result.kills} workers killed, {result.seconds:g} s; "
            f"wrong: {dict(result.wrong)}"
        )
        for reason, count in result.errors.items():
            print(f"{count} times: {reason}")
        print(f"left: {result.slots_kept} slots, {result.blocks_kept} blocks, {result.heap_kept} bytes")
    check(result)


if __name__ == "__main__":
    main()
