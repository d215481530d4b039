"""Build runner.c with the library's sources, and run cases with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from conformance_table import HERE, LIB, Row

#: Which backend the table is run on: sim; sgx where the driver is, or sgx-machine in the emulator.
BACKEND = os.environ.get("TEEMATE_CONFORMANCE_BACKEND", "sim")
#: A mutant may hang: then its cases end in the runner's alarm, one after the other.
PATIENCE = 300.0


def library_sources() -> list[Path]:
    """What native/lib/meson.build makes libteemate of: its static libraries."""
    text = (LIB / "meson.build").read_text()
    listed = "".join(re.findall(r"static_library\((.*?)\n\)", text, re.DOTALL))
    return [LIB / name for name in re.findall(r"'([\w.]+\.[cS])'", listed)]


@cache
def mentions(source: Path, word: str) -> bool:
    """Whether the source has the word, or a header that it includes."""
    text = source.read_text()
    folders = (source.parent, LIB, LIB.parent / "include")
    headers = [
        header
        for name in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE)
        for header in [folder / name for folder in folders if (folder / name).exists()][:1]
    ]
    return word in text or any(mentions(header, word) for header in headers)


_compiled: dict[tuple[Path, tuple[str, ...]], Path] = {}
"""Objects of this run, by source and by the flags that make a difference to it."""


def build_runner(folder: Path, flags: Iterable[str] = (), programs: Iterable[str] = ("runner.c",)) -> Path:
    """Compile a program and the library, from the same sources as the package; two files at a time.

    What was compiled before is taken again: only few sources know of a `-D`.
    """
    flags = tuple(flags)
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "the tests need a C compiler"
    include = LIB.parent / "include"
    # The signal handlers need -fno-stack-protector (see meson.build); it does not hurt the others.
    common = [
        compiler,
        "-std=gnu17",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-fno-stack-protector",
        "-D_GNU_SOURCE",
    ]
    common += [f"-I{include}", f"-I{LIB}"]

    def compile_one(source: Path) -> str:
        own = tuple(
            flag
            for flag in flags
            if not flag.startswith("-D") or mentions(source, flag[2:].partition("=")[0])
        )
        output = _compiled.get((source, own))
        if output is None or not output.exists():
            output = folder / f"{source.name}.o"
            subprocess.run([*common, *own, "-c", str(source), "-o", str(output)], check=True)
            _compiled[source, own] = output
        return str(output)

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_one, [*library_sources(), *(HERE / name for name in programs)]))
    program = folder / "runner"
    subprocess.run([*common, *objects, "-o", str(program), "-lpthread"], check=True)
    return program


def parse_seen(output: str) -> dict[str, str]:
    """What each case saw, by its name."""
    lines = (line.partition("|") for line in output.splitlines())
    return {name: text for name, _, text in lines}


@dataclass(frozen=True, kw_only=True)
class Runner:
    program: Path
    images: Path
    backend: str

    def run(self, rows: Iterable[Row], *, mutant: str | None = None) -> dict[str, str]:
        """Run the rows' cases, each in a process of its own; what each saw, by id."""
        rows = list(rows)
        seen: dict[str, str] = {}
        for needs in sorted({row.needs or "" for row in rows}):
            cases = {row.id: row.case or "" for row in rows if (row.needs or "") == needs}
            environment = {"TEEMATE_SIM_CPU": needs}
            if mutant is not None:
                environment["TEEMATE_SIM_MUTANT"] = mutant
            seen |= self.run_cases(cases, environment)
        return seen

    def run_cases(
        self, cases: Mapping[str, str], environment: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Run cases by name."""
        result = subprocess.run(
            [str(self.program), self.backend, str(self.images)],
            input="".join(f"{name}|{case}\n" for name, case in cases.items()),
            env=dict(os.environ) | dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return parse_seen(result.stdout)
