"""Modules that were changed at random are refused, or run within their limits: nothing worse comes of them.

A thousand in a plain run.  ``--full`` tries a hundred thousand; the campaign, which CI has a minute of, is
``python tests/functions/test_mutated_modules.py --modules 1000000 --seed SEED``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import modules as wasm
import pytest
from backends import BACKEND
from function_enclaves import functions_image

import teemate
from teemate.errors import NotFound
from teemate.functions import (
    FunctionFailed,
    FunctionLimit,
    FunctionLimits,
    Functions,
    FunctionTrapped,
    ModuleInvalid,
)

LIMITS = FunctionLimits(memory=1 << 20, fuel=200_000, output=4096)
WORKS = wasm.printing(b"works")
INTERESTING = bytes.fromhex("00010203040b405f606f707c7d7e7f80fcfdfeff")


def corpus() -> list[bytes]:
    """Modules that have something of everything, so that a change is seldom in nothing."""
    loop = (
        wasm.LOOP + b"\x20\x00" + wasm.i64(1) + b"\x7c\x22\x00" + wasm.i64(100) + b"\x54\x0d\x00" + wasm.END
    )
    table = wasm.i32(0) + b"\x25\x00\xd1" + wasm.DROP + wasm.i32(1) + b"\x11" + wasm.leb(12) + b"\x00"
    bulk = (
        wasm.i32(0) + wasm.i32(100) + wasm.i32(10) + b"\xfc\x0a\x00\x00" + wasm.i32(5) * 3 + b"\xfc\x0b\x00"
    )
    floats = wasm.i32(0) + wasm.f64(1.5) + wasm.f64(2.5) + b"\xa3\x9f\x9c" + wasm.F64_STORE
    branches = b"\x02\x40\x02\x40" + wasm.i32(1) + b"\x0e\x02\x00\x01\x00\x0b\x0b"
    branches += wasm.i32(1) + b"\x04\x7f" + wasm.i32(2) + b"\x05" + wasm.i32(3) + b"\x0b" + wasm.DROP
    return [
        WORKS,
        wasm.echo(),
        wasm.command(loop + floats, locals_=1),
        wasm.command(table, table=4),
        wasm.command(bulk + branches, data=b"data" * 8),
        wasm.command(wasm.call(wasm.START + 1), functions=[wasm.call(wasm.START + 2), wasm.write(1, 0, 4)]),
        wasm.command(wasm.i32(1) + wasm.GROW + wasm.DROP, pages=2, start=True),
        wasm.printing(b"out", errors=b"err", code=7),
    ]


def mutated(random: random.Random, modules: list[bytes]) -> bytes:
    """One to four changes: bytes, bits, pieces cut out, doubled, or of another module."""
    data = bytearray(random.choice(modules))
    # Mostly in code and data, and there mostly without a change of lengths: else few would be valid.
    behind = data.rfind(b"_start")
    for _ in range(random.choice((1, 1, 1, 2, 2, 4))):
        inside = random.random() < 0.8
        at = random.randrange(max(0, min(behind, len(data) - 1)) if inside else 0, len(data))
        kind = random.choice((0, 0, 1)) if inside else random.randrange(6)
        if kind == 0:
            data[at] = random.choice(INTERESTING)
        elif kind == 1:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 2:
            del data[at : at + random.choice((1, 2, 8))]
        elif kind == 3:
            piece = data[at : at + random.choice((1, 4, 20))]
            data[at:at] = piece
        elif kind == 4:
            other = random.choice(modules)
            start = random.randrange(len(other))
            piece = bytearray(other[start : start + random.choice((2, 8, 40))])
            data[at : at + len(piece)] = piece
        else:
            data[at:at] = wasm.leb(random.choice((0, 1, 127, 128, 65_536, 0xFFFF_FFFF)))
        if not data:
            data = bytearray(b"\0")
    return bytes(data)


def attempt(functions: Functions, module: bytes) -> str:
    """Deploy and invoke; how it ended, when that is one of the ways in which it may."""
    try:
        functions.deploy("mutated", module, limits=LIMITS, replace=True)
    except ModuleInvalid:
        return "refused"
    try:
        functions.invoke("mutated", b"payload")
    except (FunctionTrapped, FunctionLimit, FunctionFailed) as error:
        return error.code
    return "ran"


def campaign(count: int, seed: int, seconds: float = float("inf"), *, report: bool = False) -> Counter[str]:
    """Try `count` modules, or for so long; each thousand an unchanged one works, and nothing was left."""
    image = functions_image()
    source = random.Random(seed)
    modules = corpus()
    ends: Counter[str] = Counter()
    begin = time.monotonic()
    with teemate.create_enclave(image, image.with_suffix(".sig"), backend=BACKEND) as enclave:
        functions = Functions.of(enclave)
        heap = 0
        for number in range(count):
            if time.monotonic() - begin > seconds:
                break
            module = mutated(source, modules)
            try:
                ends[attempt(functions, module)] += 1
            except Exception as error:
                error.add_note(f"seed {seed}, module {number}: {module.hex()}")
                raise
            if number % 1000 == 999:
                functions.deploy("works", WORKS, replace=True)
                assert functions.invoke("works") == b"works"
                with pytest.raises(NotFound):
                    functions.describe("other")
                used = functions.usage().heap_used
                assert not heap or used < heap + (16 << 20)
                heap = heap or used
                if report:
                    rate = (number + 1) / (time.monotonic() - begin)
                    print(f"{number + 1} {dict(ends)} {rate:.0f}/s", file=sys.stderr)
    return ends


def test_whatever_is_changed_in_a_module_ends_well(request: pytest.FixtureRequest) -> None:
    count = 100_000 if request.config.getoption("--full") else 1_000
    ends = campaign(count, seed=20261127)
    assert sum(ends.values()) == count
    assert ends["refused"] > count // 2
    assert ends["ran"] > count // 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="tell of every thousand")
    options = parser.parse_args()
    ends = campaign(options.modules, options.seed, options.seconds, report=options.report)
    print(json.dumps({"seed": options.seed, "modules": ends.total(), **ends}))


if __name__ == "__main__":
    main()
