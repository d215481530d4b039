"""Real OCI containers for tests, by runc; what they have and have not is in teemate.bench._oci."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from teemate.bench._oci import Rights, Root, config, runc_program

__all__ = ["HOST_UID", "SECCOMP", "Container", "Root", "start"]

FIRST_UID = 300000
"""The host's number of a container's root; its other users follow."""
USER = 1000
HOST_UID = FIRST_UID + USER
"""Who a container's program is for the host, and so for the broker."""
SECCOMP = Path(__file__).parents[2] / "systemd" / "seccomp-client.json"
_PATIENCE = 60.0
"""Seconds that a program may take to end when its input has ended."""
_numbers = itertools.count()


@dataclass(frozen=True)
class Container:
    """A running container; `process` is ``runc run``, whose end is that of the container."""

    name: str
    process: subprocess.Popen[str]

    def init(self) -> int:
        """The host's number of its first process."""
        pid: int = json.loads(_runc("state", self.name))["pid"]
        return pid

    @property
    def output(self) -> IO[str]:
        """What it prints, errors too."""
        assert self.process.stdout is not None
        return self.process.stdout

    def kill(self) -> None:
        """End it as `docker kill` does."""
        _runc("kill", self.name, "KILL")


def _command(*words: str) -> list[str]:
    return [runc_program(), "--root", str(Path(tempfile.gettempdir()) / "teemate-test-runc"), *words]


def _runc(*words: str) -> str:
    return subprocess.run(_command(*words), capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def start(
    root: Root,
    arguments: Sequence[str],
    socket: str,
    *,
    group: str = "",
    seccomp: Path | None = None,
) -> Iterator[Container]:
    """Run a container until the block ends; `group` is its control group, below the root of the hierarchy."""
    name = f"teemate-{os.getpid()}-{next(_numbers)}"
    rights = Rights(
        uid=USER,
        first_host_uid=FIRST_UID,
        group=group or f"/teemate-test/{name}",
        seccomp=None if seccomp is None else json.loads(seccomp.read_text()),
    )
    with tempfile.TemporaryDirectory(prefix="teemate-bundle-") as bundle:
        (Path(bundle) / "config.json").write_text(
            json.dumps(config(root, arguments, socket=socket, rights=rights))
        )
        with subprocess.Popen(
            _command("run", "--bundle", bundle, name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield Container(name, process)
            finally:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()  # most programs end with their input
                try:
                    process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    subprocess.run(_command("delete", "--force", name), capture_output=True, check=False)
                    process.kill()
