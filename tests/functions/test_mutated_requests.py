"""Whatever the host asks of the functions enclave is refused or done, and any answer is read or refused.

Requests for sealed uploads, offers and keys are changed at random, and so are replies.  Some thousands in a
plain run, in process; the campaign is ``python tests/functions/test_mutated_requests.py --requests 1000000``.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import key_modules
import modules as wasm
import pytest
from function_enclaves import Gate, Holder, functions_of, installed, owner, weakened
from gate import ARGUMENT, EEXIT, EXIT_DONE, EXIT_OCALL, LEFT, OCALL_RETURN, OK, SPACE, Call
from images import BuiltImage, Images

import teemate
from teemate.functions import Functions, FunctionUsage, Offer, Sealing, seal
from teemate.functions import _wire as wire

ALICE, BOB = 1001, 1002
NONCE, TARGET = 32, 512
NOMEM = -6
STATUSES = {*range(11), ARGUMENT, SPACE, NOMEM}
"""What an ECALL may answer: done, enum fn_status, TM_E_*."""
INTERESTING = bytes.fromhex("0001027f80ff")
NUMBERS = (0, 1, 255, 256, 257, 0x7FFF, 0xFFFF, 0x10000, 0x10001, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
SECRET = b"bob's"
HELLO = wasm.printing(b"hello")


def mutated(chance: random.Random, data: bytes) -> bytes:
    """One to three changes: bytes, bits, numbers, what is cut off, put in, or added."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        # Heads are where the lengths are.
        at = (
            chance.randrange(min(len(out), 160) or 1)
            if chance.random() < 0.7
            else chance.randrange(len(out) or 1)
        )
        kind = chance.randrange(6)
        if kind == 0:
            out[at : at + 1] = chance.choice((INTERESTING[:1], INTERESTING[-1:], chance.randbytes(1)))
        elif kind == 1 and out:
            out[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            out[at : at + 4] = struct.pack("<I", chance.choice(NUMBERS))
        elif kind == 3:
            del out[at : at + chance.choice((1, 4, 40, len(out)))]
        elif kind == 4:
            out[at:at] = chance.randbytes(chance.choice((1, 4, 100)))
        else:
            out += chance.randbytes(chance.choice((1, 16)))
    return bytes(out)


class Host:
    """Alice's slot in the hands of who changes what she asks for; Bob's beside it, who must not notice."""

    def __init__(self, gate: Gate, seed: int) -> None:
        self.chance = random.Random(seed)
        self.ends: Counter[str] = Counter()
        self._alice = gate.assign(2, uid=ALICE)
        self._bob = owner(gate, 3, BOB)
        self._bob.deploy("his", HELLO, grants=["keys"])
        for name in ("put", "get", "delete", "list"):
            self._bob.deploy(name, key_modules.module(name), grants=["keys"])
            functions_of(self._alice).deploy(name, key_modules.module(name), grants=["keys"])
        self._bob.invoke("put", _pair(b"key", SECRET))
        self._bobs = _digests(self._bob)
        self._before: FunctionUsage | None = None

    def once(self) -> None:
        """One request that was changed, or one of another kind."""
        kind = self.chance.choice(
            (self._offer, self._sealed, self._sealed, self._sealed, self._keys, self._other)
        )
        status = kind()
        assert status in STATUSES, (kind.__name__, status)
        self.ends[f"{kind.__name__[1:]} {'done' if status == OK else 'refused'}"] += 1

    def _call(self, ecall: bytes, request: bytes, room: int = 4096) -> tuple[int, bytes]:
        """Call; what an invocation with streams asks for gets answers that may be anything."""
        call, holder = Call(ecall, request, room), self._alice
        left, answers = holder.start(call), 0
        while left.function == EEXIT and left.rdi == EXIT_OCALL:
            answers += 1
            status = -1 if answers > 20 else self.chance.choice((0, 0, 0, -1, 7, 1 << 40))
            length = self.chance.choice((0, 1, 8192, 8193, 1 << 40))
            left = holder.gate.enter(
                holder.slot, holder.key, OCALL_RETURN, left.nonce, status & ((1 << 64) - 1), length
            )
        assert (left.outcome, left.function, left.rdi) == (LEFT, EEXIT, EXIT_DONE), left
        return left.status, call.output(min(left.length, room))

    def _offer(self) -> int:
        valid = self.chance.randbytes(NONCE) + self.chance.choice((b"", bytes(TARGET)))
        room = self.chance.choice((0, 1, 495, 496, 4096))
        return self._call(b"offer", mutated(self.chance, valid), room)[0]

    def _sealed(self) -> int:
        """An upload for an offer that was just made: changed in any way, it is not deployed."""
        nonce = self.chance.randbytes(NONCE)
        status, reply = self._call(b"offer", nonce)
        assert status == OK
        module = self.chance.choice((HELLO, key_modules.module("put")))
        grants = ["keys"] if module is not HELLO else []
        right = seal(Offer.parse(reply, nonce), "sealed", module, replace=True, env={"A": "b"}, grants=grants)
        sent = mutated(self.chance, right)
        status, _ = self._call(b"deploy_sealed", sent)
        assert (status == OK) == (sent == right), (status, sent)
        return status

    def _keys(self) -> int:
        """A key and a value of whatever length, in a payload of whatever length."""
        name = self.chance.choice(("put", "get", "delete", "list"))
        payload = mutated(self.chance, _pair(self.chance.randbytes(self.chance.randrange(40)), b"value"))
        status, reply = self._call(
            b"invoke", wire.invoke(name, payload, (), None, None), wire.room_for(1 << 20)
        )
        assert SECRET not in reply
        return status

    def _other(self) -> int:
        """Any other request, changed, or for an ECALL that it is not for."""
        requests = {
            b"invoke": wire.invoke("get", b"", ["a"], {"B": "c"}, 1.0, stream=self.chance.random() < 0.5),
            b"deploy": wire.deploy("plain", HELLO, None, {"D": "e"}, replace=True),
            b"describe": wire.named("get"),
            b"limits": wire.limits("get", teemate.functions.FunctionLimits(memory=8 << 20)),
            b"logs": wire.logs("get", 0),
            b"list": b"",
            b"usage": b"",
            b"clear_keys": b"",
        }
        ecall = self.chance.choice([*requests])
        request = requests[ecall if self.chance.random() < 0.8 else self.chance.choice([*requests])]
        return self._call(ecall, mutated(self.chance, request), self.chance.choice((0, 64, 1 << 21)))[0]

    def look(self) -> None:
        """See that all is as it was: Bob's functions, his keys, and the heap; and that Alice's slot works."""
        assert _digests(self._bob) == self._bobs
        assert self._bob.invoke("get", _pair(b"key", b""))[8:] == SECRET
        alice = functions_of(self._alice)
        alice.clear_keys()
        for info in alice.list():
            if info.name not in ("put", "get", "delete", "list"):
                alice.remove(info.name)
        alice.deploy("sealed", HELLO, sealed=True)
        assert alice.invoke("sealed") == b"hello"
        alice.remove("sealed")
        now = alice.usage()
        if self._before is not None:
            used = now.heap_used - self._before.heap_used
            assert used <= 8 << 20, used  # what is ready, and logs
        self._before = self._before or now


def _digests(functions: Functions) -> dict[str, str]:
    return {info.name: info.digest for info in functions.list()}


def _pair(key: bytes, value: bytes) -> bytes:
    return struct.pack("<II", len(key), len(value)) + key.ljust(512, b"\0") + value


def campaign(
    count: int,
    seed: int,
    seconds: float = float("inf"),
    *,
    image: BuiltImage | None = None,
    report: bool = False,
) -> Counter[str]:
    """Send `count` requests, or for so long."""
    begin = time.monotonic()
    with Gate(image or installed()) as gate:
        host = Host(gate, seed)
        for number in range(count):
            if time.monotonic() - begin > seconds:
                break
            try:
                host.once()
                if number % 1000 == 999:
                    host.look()
            except BaseException as error:
                error.add_note(f"seed {seed}, request {number}")
                raise
            if report and number % 10_000 == 9_999:
                rate = (number + 1) / (time.monotonic() - begin)
                print(f"{number + 1} {dict(host.ends)} {rate:.0f}/s", file=sys.stderr, flush=True)
        host.look()
        return host.ends


# ---- replies --------------------------------------------------------------------------------------


def replies(gate: Gate) -> list[tuple[bytes, Callable[[bytes], object]]]:
    """Replies of the enclave, and who reads each."""
    alice: Holder = gate.assign(4, uid=ALICE)
    functions = functions_of(alice)
    functions.deploy("fails", wasm.printing(b"", errors=b"why", code=3), env={"A": "b"})
    functions.deploy("prints", wasm.printing(b"a word", errors=b"and a log"))
    nonce = bytes(NONCE)

    def offered(reply: bytes) -> None:
        Sealing(debug=True).check(Offer.parse(reply, nonce))

    def refused(status: int) -> Callable[[bytes], object]:
        return lambda reply: wire.refused("f", status, reply, 1.0)

    run = wire.invoke("prints", b"", (), None, None)
    failed = wire.invoke("fails", b"", (), None, None)
    ended = alice.call(b"invoke", failed, wire.room_for(1 << 20))[1]
    return [
        (alice.call(b"invoke", run, wire.room_for(1 << 20))[1], wire.stdout),
        (alice.call(b"list", b"", wire.LIST_MAX)[1], lambda reply: [*wire.infos(reply)]),
        (alice.call(b"describe", wire.named("fails"))[1], wire.info),
        (
            alice.call(b"logs", wire.logs("fails", 0), wire.LOGS_MAX)[1],
            lambda reply: [*wire.log_entries(reply)],
        ),
        (alice.call(b"usage")[1], wire.usage),
        (alice.call(b"offer", nonce)[1], offered),
        *((ended, refused(status)) for status in range(1, 12)),
    ]


def read_replies(count: int, seed: int) -> Counter[str]:
    """Read `count` replies that were changed: all are told of, or refused by an error of ours."""
    chance = random.Random(seed)
    ends: Counter[str] = Counter()
    with Gate(installed()) as gate:
        all_ = replies(gate)
    for reply, read in all_[:6]:
        read(reply)  # unchanged it is right
    for number in range(count):
        reply, read = chance.choice(all_)
        changed = mutated(chance, reply)
        try:
            read(changed)
            ends["read"] += 1
        except teemate.Error as error:
            ends[error.code] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}, reply {number}: {changed.hex()}")
            raise
    return ends


# ---- the tests --------------------------------------------------------------------------------------


def test_whatever_is_changed_in_a_request_ends_well() -> None:
    ends = campaign(3_000, seed=20261128)
    assert ends.total() == 3_000
    assert ends["sealed refused"] > 500
    assert ends["keys done"] > 100


def test_an_enclave_that_does_not_look_behind_a_request_is_found(
    request: pytest.FixtureRequest, images: Images, tmp_path: Path
) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("compiles another enclave: pytest --full tests/functions")
    image = weakened(images, tmp_path, "TM_TEST_LONGER_IS_FINE")
    with pytest.raises(AssertionError):
        campaign(3_000, seed=20261128, image=image)


def test_whatever_is_changed_in_a_reply_is_read_or_refused() -> None:
    ends = read_replies(20_000, seed=20261128)
    assert ends.total() == 20_000
    assert ends["protocol-error"] > 1_000
    assert ends["read"] > 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--replies", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of requests at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="tell of every ten thousand")
    options = parser.parse_args()
    read = read_replies(options.replies, options.seed)
    print(json.dumps({"seed": options.seed, "replies": read.total(), **read}), flush=True)
    ends = campaign(options.requests, options.seed, options.seconds, report=options.report)
    print(json.dumps({"seed": options.seed, "requests": ends.total(), **ends}))


if __name__ == "__main__":
    main()
