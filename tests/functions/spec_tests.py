#!/usr/bin/env python3
"""WebAssembly's core specification tests, in the functions enclave and by the way that every function goes.

    tests/functions/spec_tests.py [--json] [--false] [FILE.wast ...]

Every module of the tests is deployed, and what a script does to it is invoked: tests/functions/spec/ makes
both, and says there what cannot be said to an enclave with functions.  The tests come from crates.io, pinned
by hash; they are version 2 of the specification without SIMD, which the engine has not, and the proposals
extended-const and tail-call, which it has.

With --false every expectation is another: then all that has one has to fail, or the tests prove nothing.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from backends import BACKEND
from function_enclaves import engine_module, functions_image

import teemate
from teemate.functions import (
    FunctionFailed,
    FunctionLimit,
    FunctionLimits,
    Functions,
    FunctionTrapped,
    ModuleInvalid,
)

TOO_LARGE = "begins with more memory than a function may have"
CRATE = Path(__file__).parent / "spec"
# Valid, and not to be run alone.
NO_COMMAND = ("it exports no function _start", "its export _start is", "it imports ")
# What the tests call by another name than the engine.
WORDS = {
    "undefined element": ("undefined element", "out of bounds table access"),
    "uninitialized element": ("uninitialized element", "indirect call to null"),
    "indirect call type mismatch": ("indirect call signature mismatch", "indirect call type mismatch"),
}


class ScriptsMissingError(Exception):
    """The tests' modules cannot be made here; says why."""


@dataclass
class Counts:
    """Of one file: assertions, and a module's being valid and instantiated as one each."""

    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    unfalsifiable: int = 0
    """Of these: that an instance is there, or that something without results comes back."""


def scripts(files: Sequence[str] = (), *, false: bool = False) -> Iterator[dict[str, Any]]:
    """What tests/functions/spec/ says, which cargo compiles when it has not yet."""
    engine = engine_module()
    try:
        cargo, _ = engine._cargo()
    except engine.EngineMissingError as missing:
        raise ScriptsMissingError(str(missing)) from missing
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teemate" / "spec-scripts"
    options = ["--quiet", "--locked", "--manifest-path", str(CRATE / "Cargo.toml"), "--target-dir", str(base)]
    built = subprocess.run([cargo, "build", *options], capture_output=True, text=True, check=False)
    if built.returncode:
        raise ScriptsMissingError(f"cargo could not build {CRATE}: {built.stderr.strip()[-400:]}")
    command = [str(base / "debug" / "spec-scripts"), *(["--false"] if false else []), *files]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise ScriptsMissingError(f"{command[0]} ended with {process.returncode}")


class Harness:
    """Deploys and invokes what the scripts say, and counts what came of it."""

    def __init__(self, functions: Functions, *, false: bool) -> None:
        self.functions = functions
        self.false = false
        heap = functions.usage().heap
        self.limits = FunctionLimits(memory=heap // 4, fuel=20_000_000_000, time=60.0)
        self.files: defaultdict[str, Counts] = defaultdict(Counts)

    def run(self, test: dict[str, Any]) -> None:
        counts = self.files[test["file"]]
        if test["kind"] == "skip":
            counts.skipped[test["reason"]] += 1
            return
        module = base64.b64decode(test["wasm"])
        kind = test["kind"]
        if kind in ("module", "refused"):
            self._validity(test, module, counts, valid=(kind == "module") != self.false)
        elif kind == "returns":
            self._returns(test, module, counts)
        else:
            self._trap(test, module, counts)

    def _fail(self, counts: Counts, test: dict[str, Any], why: str, count: int = 1) -> None:
        counts.failed += count
        counts.failures.append(f"{test['file']}:{test['line']} ({test['kind']}): {why}")

    def _refusal(self, module: bytes) -> str | None:
        try:
            self.functions.deploy("spec", module, limits=self.limits, replace=True)
        except ModuleInvalid as error:
            return str(error)
        return None

    def _is_too_large(self, test: dict[str, Any], error: FunctionLimit) -> bool:
        return error.limit == "memory" and test["pages"] << 16 > (self.limits.memory or 0)

    def _validity(self, test: dict[str, Any], module: bytes, counts: Counts, *, valid: bool) -> None:
        why = self._refusal(module)
        is_valid = why is None or any(words in why for words in NO_COMMAND)
        if is_valid == valid:
            counts.passed += 1
        else:
            self._fail(counts, test, f"refused: {why}" if valid else "not refused as a module")

    def _returns(self, test: dict[str, Any], module: bytes, counts: Counts) -> None:
        asserted = test["asserted"]
        counts.unfalsifiable += 1 + asserted - test["checked"]
        why = self._refusal(module)
        if why is not None:
            self._fail(counts, test, f"its command is refused: {why}", 1 + asserted)
            return
        try:
            self.functions.invoke("spec")
        except FunctionFailed as error:
            self._wrong(test, counts, error.exit_code)
        except FunctionLimit as error:
            code = self.functions.logs("spec")[-1].exit_code
            if self._is_too_large(test, error):
                counts.skipped[TOO_LARGE] += 1 + asserted
            elif error.limit == "memory" and code and not self.false:
                # It was refused memory, as every engine may, and what should have been there was not.
                counts.skipped["grows to more memory than a function may have"] += code >> 16
                counts.passed += 1 + asserted - (code >> 16)
            elif error.limit == "memory" and code:
                self._wrong(test, counts, code)
            else:
                self._fail(counts, test, str(error), 1 + asserted)
        except FunctionTrapped as error:
            self._fail(counts, test, str(error), 1 + asserted)
        else:
            counts.passed += 1 + asserted

    def _wrong(self, test: dict[str, Any], counts: Counts, code: int) -> None:
        """What the driver has told: how many were, and the first."""
        wrong, first = code >> 16, code & 0xFFFF
        counts.passed += 1 + test["asserted"] - wrong
        self._fail(counts, test, f"{wrong} wrong, first at line {test['lines'][first - 1]}", wrong)

    def _trap(self, test: dict[str, Any], module: bytes, counts: Counts) -> None:
        why = self._refusal(module)
        if why is not None:
            self._fail(counts, test, f"its command is refused: {why}")
            return
        wanted = WORDS.get(test["message"], (test["message"],))
        try:
            self.functions.invoke("spec")
        except FunctionTrapped as error:
            if any(word in str(error) for word in wanted):
                counts.passed += 1
            else:
                self._fail(counts, test, f"{error} for {test['message']!r}")
        except FunctionLimit as error:
            if error.limit == "stack" and test["message"] == "call stack exhausted":
                counts.passed += 1
            elif self._is_too_large(test, error):
                counts.skipped[TOO_LARGE] += 1
            else:
                self._fail(counts, test, str(error))
        except FunctionFailed as error:
            self._fail(counts, test, str(error))
        else:
            self._fail(counts, test, f"no trap: {test['message']}")


def run(files: Sequence[str] = (), *, false: bool = False) -> dict[str, Counts]:
    """All of it in one private enclave."""
    image = functions_image()
    with teemate.create_enclave(image, image.with_suffix(".sig"), backend=BACKEND) as enclave:
        harness = Harness(Functions.of(enclave), false=false)
        for test in scripts(files, false=false):
            harness.run(test)
        return dict(harness.files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--false", action="store_true")
    options = parser.parse_args()
    counted = run(options.files, false=options.false)
    if options.json:
        # asdict() would count the pairs of a Counter.
        print(
            json.dumps(
                {name: vars(counts) | {"skipped": dict(counts.skipped)} for name, counts in counted.items()}
            )
        )
        return
    for name, counts in sorted(counted.items()):
        print(f"{name:32} {counts.passed:6} {counts.failed:5} {counts.skipped.total():5}")
        for failure in counts.failures[:20]:
            print("   ", failure)
    skipped: Counter[str] = sum((counts.skipped for counts in counted.values()), Counter())
    passed, failed = (sum(getattr(c, kind) for c in counted.values()) for kind in ("passed", "failed"))
    print(f"{len(counted)} files: {passed} passed, {failed} failed, {skipped.total()} skipped:")
    for reason, count in skipped.most_common():
        print(f"  {count:5} {reason}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
