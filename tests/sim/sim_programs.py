"""Build and run the C programs of tests/sim/c."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIB = ROOT / "native" / "lib"
PROGRAMS = Path(__file__).parent / "c"
#: What meson gives the sources that run while FS is the enclave's.
INSIDE = {"sim_aex.c", "signals.c", "sim_xsave.c"}
INSIDE_FLAGS = ["-fno-stack-protector", "-fno-sanitize=all"]
HARNESS = ["harness.c", "enclave.S"]


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """Compiles the library once and links the test programs with it."""

    compiler: str
    directory: Path

    def run(self, arguments: Iterable[str | Path]) -> None:
        subprocess.run([self.compiler, *map(str, arguments)], check=True)

    @property
    def flags(self) -> list[str]:
        includes = [f"-I{ROOT / 'native' / 'include'}", f"-I{PROGRAMS}"]
        return ["-std=gnu17", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", *includes]

    def compile(self, source: Path) -> Path:
        output = self.directory / f"{source.stem}.o"
        extra = INSIDE_FLAGS if source.name in INSIDE else []
        self.run([*self.flags, "-fvisibility=hidden", *extra, "-c", source, "-o", output])
        return output

    def library(self) -> Path:
        """libteemate.a, from native/lib as it is."""
        sources = [*LIB.glob("*.c"), *LIB.glob("*.S")]
        with ThreadPoolExecutor(max_workers=2) as pool:
            objects = list(pool.map(self.compile, sorted(sources)))
        output = self.directory / "libteemate.a"
        subprocess.run(["ar", "rcs", output, *objects], check=True)
        return output

    def link(self, name: str, sources: Iterable[str], *flags: str) -> Path:
        output = self.directory / name
        files = [PROGRAMS / source for source in sources]
        archive = self.directory / "libteemate.a"
        self.run([*self.flags, *flags, *files, archive, "-o", output, "-lpthread", "-ldl"])
        return output


def run_program(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run with a bound on its time; returncode and output are the caller's to judge."""
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
