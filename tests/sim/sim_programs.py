"""Run the C programs of tests/sim/c."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


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
