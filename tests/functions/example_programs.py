"""The example functions, as programs of this host with sanitizers."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

EXAMPLES = Path(__file__).resolve().parents[2] / "native" / "examples" / "functions"
NAMES = ("gzip", "json", "matmul", "sha256", "thumbnail")


class Failed(Exception):  # noqa: N818
    """An example ended with a status other than 0, having logged why."""

    def __init__(self, status: int, log: str) -> None:
        super().__init__(f"status {status}: {log}")
        self.status = status
        self.log = log


class Run(Protocol):
    """Run the example `name` and return its result, or raise :class:`Failed`."""

    def __call__(self, name: str, payload: bytes = b"", args: Sequence[str] = ()) -> bytes: ...


@dataclass(frozen=True)
class Programs:
    """The examples compiled by the host's compiler; what a sanitizer finds is an AssertionError."""

    folder: Path

    def __call__(self, name: str, payload: bytes = b"", args: Sequence[str] = ()) -> bytes:
        program = self.folder / name
        if not program.exists():
            compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
            flags = ["-std=gnu17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
            flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
            source = EXAMPLES / f"{name}.c"
            subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
        done = subprocess.run(
            [program, *args],
            input=payload,
            capture_output=True,
            check=False,
            timeout=120,
            env={"ASAN_OPTIONS": "detect_leaks=0:exitcode=99", "UBSAN_OPTIONS": "exitcode=99"},
        )
        log = done.stderr.decode(errors="replace")
        assert done.returncode >= 0, f"{name} died of signal {-done.returncode}: {log}"
        assert done.returncode != 99, f"{name} on {payload[:200]!r}: {log}"
        if done.returncode:
            raise Failed(done.returncode, log)
        return done.stdout
