"""What an empty ECALL costs above the bare transition into an enclave: ratios of one run.

Usage: python tests/floor/call_figures.py [--json] [--rounds N] [--backend sim|sgx]

Ends with status 1 when a bound of the project is not met:
  an empty call of the vault   at most 1.5 x the same entry into an enclave that only leaves
  the difference of the two    at most 5 getppid() system calls
Best of all rounds, taken by turns in one process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from images import Images

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "native"


def build_call_floor(folder: Path) -> Path:
    """Compile the measuring program with the whole library in it."""
    program = folder / "call_floor"
    library = sorted(path for path in (NATIVE / "lib").iterdir() if path.suffix in (".c", ".S"))
    subprocess.run(
        [
            *("cc", "-std=gnu17", "-O2", "-D_GNU_SOURCE", "-fno-stack-protector", "-pthread"),
            *(f"-I{NATIVE}/include", f"-I{NATIVE}/lib", str(HERE / "call_floor.c"), *map(str, library)),
            *("-o", str(program)),
        ],
        check=True,
    )
    return program


def call_figures(program: Path, images: Images, rounds: int, backend: str = "sim") -> dict[str, float]:
    """Return nanoseconds of getppid(), the bare transition and an empty call, and their ratios."""
    bare, vault = images.bare, images.vault
    files = (bare.sgxs, bare.sigstruct, vault.sgxs, vault.sigstruct)
    command = [str(program), *map(str, files), "empty", str(rounds), backend]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures: dict[str, float] = json.loads(printed)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--backend", choices=["sim", "sgx"], default="sim")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = call_figures(build_call_floor(folder), Images(folder), options.rounds, options.backend)
    bounds = {"ratio": figures["ratio"] <= 1.5, "getppids_more": figures["getppids_more"] <= 5}
    if options.json:
        print(json.dumps(figures))
    else:
        for key, value in figures.items():
            note = "" if key not in bounds else "  ok" if bounds[key] else "  NOT MET"
            print(f"{key:15} {value:10.2f}{note}")
    return 0 if all(bounds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
