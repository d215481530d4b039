"""Brokers whose enclave has files."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from images import BuiltImage
from policies import enclave_policy
from processes import wait_until
from running_broker import RunningBroker

import teemate

CLIENT = Path(__file__).with_name("files_client.py")


@dataclass
class Disk:
    """A broker, the folder of its enclave's files, and clients of it."""

    broker: RunningBroker
    folder: Path

    def warden(self) -> int:
        """The pid of the enclave's present warden."""
        while True:
            with teemate.connect(self.broker.socket) as connection:
                (enclave,) = connection.stats()["enclaves"]
            pid = enclave["warden"]["pid"]
            with contextlib.suppress(FileNotFoundError):
                if pid is not None and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
                    return int(pid)

    def kill_warden(self) -> None:
        """Kill it, wherever it is."""
        os.kill(self.warden(), signal.SIGKILL)


@pytest.fixture
def disk_policy(files_image: BuiltImage, tmp_path: Path) -> Callable[..., str]:
    """A policy with one enclave, `files`, that has files below tmp_path/state."""

    def make(settings: str = "", *, storage: str = "storage = true", broker: str = "") -> str:
        return "\n".join(
            [
                f'[broker]\nstate_directory = "{tmp_path / "state"}"\nwarden_deadline = 30.0\n{broker}',
                f"[administrators]\nuids = [{os.geteuid()}]",
                enclave_policy("files", files_image, f"slots_per_client = 8\n{storage}\n{settings}"),
            ]
        )

    return make


@pytest.fixture
def disk(
    broker: Callable[..., RunningBroker], disk_policy: Callable[..., str], tmp_path: Path
) -> Callable[..., Disk]:
    """Start a broker with it."""

    def start(settings: str = "", **options: object) -> Disk:
        return Disk(broker(disk_policy(settings), **options), tmp_path / "state" / "enclaves" / "files")

    return start


class Client:
    """A process of files_client.py; what it says goes to a file, so it is never held up."""

    def __init__(self, disk: Disk, work: str, name: str, output: Path) -> None:
        self._output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(CLIENT), disk.broker.socket, work, name],
                stdin=subprocess.PIPE,
                stdout=file,
            )
        wait_until(lambda: self._lines() or self.process.poll() is not None, f"{name} does not get in")
        first = self._lines()[0].split()
        self.arena = int(first[1]) + int(first[2]) + 4096

    def _lines(self) -> list[str]:
        return [line for line in self._output.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def said(self) -> list[int]:
        """The numbers that it has told so far."""
        return [int(line) for line in self._lines()[1:]]

    def stop(self) -> list[int]:
        """Let it end; returns what it told."""
        self.process.communicate(b"stop\n", timeout=60)
        assert self.process.returncode == 0
        return self.said()

    def kill(self) -> list[int]:
        """Kill it; returns what it had told."""
        self.process.kill()
        self.process.communicate(timeout=60)
        return self.said()

    def waits(self) -> bool:
        """Whether a thread of it stands in futex(2) at a word of the arena."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            call = (task / "syscall").read_text().split()
            if call[0] == "202" and self.arena <= int(call[1], 16) < self.arena + 4096:
                return True
        return False


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Callable[[Disk, str, str], Client]]:
    """Start clients that end with the test."""
    clients: list[Client] = []

    def start(disk: Disk, work: str, name: str) -> Client:
        clients.append(Client(disk, work, name, tmp_path / f"{name}.said"))
        return clients[-1]

    yield start
    for started in clients:
        if started.process.poll() is None:
            started.process.kill()
        started.process.communicate()
