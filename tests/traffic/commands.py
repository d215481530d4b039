"""The commands that look at traffic, as programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backends import PATIENCE

TEEMATE = (sys.executable, "-c", "from teemate.cli.main import main; main()")
TIMEOUT = 120.0 * PATIENCE


def teemate(*arguments: str, status: int = 0, environment: dict[str, str] | None = None) -> str:
    """Run a command to its end; returns what it printed, on both streams."""
    done = subprocess.run(
        [*TEEMATE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT,
        env={**os.environ, **(environment or {})},
    )
    said = done.stdout.decode()
    assert done.returncode == status, said
    assert "Traceback" not in said
    return said


@dataclass
class RunningCommand:
    """A command that runs until it is interrupted; afterwards `printed` and `said` are all that it wrote."""

    process: subprocess.Popen[str]
    output: Path
    begin: str = ""
    printed: str = ""
    said: str = ""

    def so_far(self) -> str:
        """What it has printed by now."""
        return self.output.read_text()


@contextmanager
def running(
    *arguments: str, until: str, environment: dict[str, str] | None = None, status: int = 130
) -> Iterator[RunningCommand]:
    """Run a command from its line that begins with `until` until the block ends, then interrupt it."""
    with (
        # Nobody reads a pipe meanwhile, and a proxy waits for whoever reads what it prints.
        tempfile.NamedTemporaryFile() as output,
        subprocess.Popen(
            [*TEEMATE, *arguments],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        ) as process,
    ):
        assert process.stderr is not None
        command = RunningCommand(process, Path(output.name))
        try:
            for line in process.stderr:
                command.begin += line
                if line.startswith(until):
                    break
            else:
                raise AssertionError(f"it ended at once: {command.begin}")
            yield command
            process.send_signal(signal.SIGINT)
            command.said = process.communicate(timeout=TIMEOUT)[1]
            command.printed = command.so_far()
        finally:
            process.kill()
    assert process.returncode == status, command.said
    assert "Traceback" not in command.said


@contextmanager
def proxy(
    to: str, folder: Path, *options: str, environment: dict[str, str] | None = None, status: int = 130
) -> Iterator[tuple[str, RunningCommand]]:
    """Run `teemate proxy` in front of a broker; yields where it listens."""
    path = str(folder / "proxy.sock")
    arguments = ("proxy", "--listen", path, "--to", to, *options)
    with running(*arguments, until="Listening", environment=environment, status=status) as command:
        yield path, command
