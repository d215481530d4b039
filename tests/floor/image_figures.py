"""What measuring and building cost, against openssl and the C floor: ratios of one run.

Usage: python tests/floor/image_figures.py [--json] [--rounds N]

Ends with status 1 when a bound of the project is not met:
  measuring 64 MiB of measured pages      at most 1.5 x `openssl dgst -sha256` on the same file
  building an enclave with 64 MiB of heap at most 1.3 x the floor (native/bench/create.c)
The best of all rounds counts: what disturbs a round only makes it slower.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from sgxs_writer import PAGE, REG, R, Stream, W, X, eadd, sign

from teemate._native import ffi, lib
from teemate.bench._measured import Measured
from teemate.bench._setting import FLOOR

HEAP_PAGES = (64 << 20) // PAGE
#: What the vault has: code, thread data, stacks.
CODE_PAGES = 64


def best(rounds: int, action: Callable[[], object]) -> float:
    """Return the milliseconds of the fastest round."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        action()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return min(times)


def measured_image() -> Stream:
    image = Stream(size=128 << 20)
    page = os.urandom(PAGE)
    for number in range(HEAP_PAGES):
        image.page(number * PAGE, REG | R, page)
    return image


def sdk_like_image() -> Stream:
    image = Stream(size=128 << 20)
    page = os.urandom(PAGE)
    for number in range(CODE_PAGES):
        image.page(number * PAGE, REG | R | X, page)
    image.records += [eadd((CODE_PAGES + number) * PAGE, REG | R | W) for number in range(HEAP_PAGES)]
    return image


def measuring(folder: Path, rounds: int) -> dict[str, float]:
    path = folder / "measured.sgxs"
    path.write_bytes(measured_image().to_bytes())
    info = ffi.new("struct teemate_image_info *")
    with path.open("rb") as file:
        ours = best(rounds, lambda: lib.teemate_image_measure(file.fileno(), info, ffi.NULL))
    command = ["openssl", "dgst", "-sha256", str(path)]
    theirs = best(rounds, lambda: subprocess.run(command, check=True, capture_output=True))
    path.unlink()
    return {"measure_ms": ours, "openssl_ms": theirs, "measure_ratio": ours / theirs}


def building(folder: Path, rounds: int) -> dict[str, float]:
    image = sdk_like_image()
    sigstruct = sign(image.mrenclave())
    path = folder / "heap.sgxs"
    path.write_bytes(image.to_bytes())
    enclave, diag = ffi.new("struct teemate_enclave **"), ffi.new("struct teemate_diag *")

    def build() -> float:
        start = time.perf_counter_ns()
        with path.open("rb") as file:
            result = lib.teemate_create(lib.TEEMATE_SIM, 0, 0, file.fileno(), sigstruct, enclave, diag)
        taken = (time.perf_counter_ns() - start) / 1e6
        assert result == 0, ffi.string(diag.text)
        lib.teemate_close(enclave[0])
        return taken

    command = [str(FLOOR), "create", str(CODE_PAGES + HEAP_PAGES), str(CODE_PAGES * PAGE)]
    ours, floor = [], []
    with Measured("floor", command) as least:
        for _ in range(rounds):  # by turns, so that both see the same machine
            ours.append(build())
            floor += [ns / 1e6 for ns in least.ask("create")]
    return {"build_ms": min(ours), "floor_ms": min(floor), "build_ratio": min(ours) / min(floor)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {
            **measuring(folder, options.rounds),
            **building(folder, options.rounds),
        }
    bounds = {
        "measure_ratio": figures["measure_ratio"] <= 1.5,
        "build_ratio": figures["build_ratio"] <= 1.3,
    }
    if options.json:
        print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
    else:
        for name, value in figures.items():
            note = "" if name not in bounds else "  ok" if bounds[name] else "  NOT MET"
            print(f"{name:15} {value:10.2f}{note}")
    return 0 if all(bounds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
