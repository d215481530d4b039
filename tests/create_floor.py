"""The C floor of building an enclave (tests/floor/create_floor.c), for tests and figures."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def build_floor(folder: Path, name: str = "create_floor") -> Path:
    """Compile tests/floor/NAME.c into `folder` as the library is compiled; returns the program."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "the tests need a C compiler"
    lib = ROOT / "native" / "lib"
    sources = [ROOT / "tests" / "floor" / f"{name}.c", lib / "sha256.c", lib / "hmac.c"]
    command = [compiler, "-std=gnu17", "-O3", "-Wall", "-Wextra", "-Werror", f"-I{lib}"]
    program = folder / name
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    return program


def floor_ms(program: Path, *, pages: int, measured: int, repeat: int = 1) -> list[float]:
    """Return the milliseconds of `repeat` rounds, each with fresh memory."""
    command = [str(program), str(pages), str(measured), str(repeat)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(line) for line in done.stdout.split()]
