"""A service manager with a file descriptor store, played by the test: it decides when it does what."""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from backends import BACKEND
from running_broker import DEADLINE

__all__ = ["HeldBarriers", "Message", "PlayedManager", "played_manager"]

Message = dict[str, str]
_BECOME = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",") if fd]
aside = [os.dup2(fd, 900 + number, True) for number, fd in enumerate(fds)]
for number, fd in enumerate(aside, 3):
    os.dup2(fd, number, True)
os.closerange(3 + len(aside), 2048)
os.environ.update(LISTEN_FDS=str(len(fds)), LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "teemate.broker.main", *sys.argv[2:]])
"""


class PlayedManager:
    """Keeps what brokers store, and starts them with it, as systemd does (sd_notify(3)).

    A message is heeded after `heed` was asked, which may wait, kill the broker, or say False: then it
    is as if the broker had died before it sent the message.
    """

    def __init__(self, folder: Path, policy: str) -> None:
        self.socket = str(folder / "broker.sock")
        self.stored: dict[str, int] = {}
        self.heed: Callable[[Message], bool] = lambda _message: True
        self.broker: subprocess.Popen[bytes] | None = None
        self.log_file = folder / "broker.log"
        self._policy = folder / "broker.toml"
        self._policy.write_text(policy)
        self._ready = threading.Event()
        self._dead: set[int] = set()
        """What they said and is read later counts no more, as with systemd."""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock.bind(str(folder / "notify"))
        self._address = str(folder / "notify")
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Start a broker with everything that is stored, and return when it is ready."""
        self._ready.clear()
        names = list(self.stored)
        fds = [self.stored[name] for name in names]
        command = [sys.executable, "-c", _BECOME, ",".join(map(str, fds)), "--config", str(self._policy)]
        command += ["--socket", self.socket, "--log-format", "json", "--backend", BACKEND]
        environment = {
            **os.environ, "NOTIFY_SOCKET": self._address, "FDSTORE": "64", "LISTEN_FDNAMES": ":".join(names)
        }  # fmt: skip
        with self.log_file.open("ab") as log:
            self.broker = subprocess.Popen(command, stdout=log, stderr=log, env=environment, pass_fds=fds)
        assert self._ready.wait(DEADLINE), self.log_file.read_text()

    def kill(self) -> None:
        """End the broker as a crash does."""
        assert self.broker is not None
        self._dead.add(self.broker.pid)
        self.broker.kill()
        self.broker.wait()

    def stop(self) -> None:
        """End the broker as an operator does; it must have met no bug."""
        assert self.broker is not None
        self.broker.send_signal(signal.SIGTERM)
        self.broker.wait(DEADLINE)
        for line in self.log_file.read_text().splitlines():
            assert json.loads(line)["level"] not in ("error", "critical"), line

    def close(self) -> None:
        """Close what is kept."""
        if self.broker is not None and self.broker.poll() is None:
            self.kill()
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self._address)
        self._thread.join()
        self._sock.close()
        for fd in self.stored.values():
            os.close(fd)

    def _listen(self) -> None:
        while True:
            data, ancillary, _, _ = self._sock.recvmsg(4096, socket.CMSG_SPACE(64), socket.MSG_CMSG_CLOEXEC)
            fds = array.array("i")
            sender = 0
            for _, kind, payload in ancillary:
                if kind == socket.SCM_RIGHTS:
                    fds.frombytes(payload)
                elif kind == socket.SCM_CREDENTIALS:
                    sender = struct.unpack_from("i", payload)[0]
            if not data:
                return
            message = dict(line.split("=", 1) for line in data.decode().splitlines())
            if sender not in self._dead and self.heed(message):
                self._do(message, fds)
            for fd in fds:  # that of BARRIER=1: closing it is the answer
                os.close(fd)

    def _do(self, message: Message, fds: array.array[int]) -> None:
        if message.get("READY") == "1":
            self._ready.set()
        elif message.get("FDSTOREREMOVE") == "1":
            os.close(self.stored.pop(message["FDNAME"]))
        elif message.get("FDSTORE") == "1":
            assert message["FDNAME"] not in self.stored
            self.stored[message["FDNAME"]] = fds.pop()


class HeldBarriers:
    """For `heed`: what the broker waits for is not confirmed before :meth:`release`."""

    def __init__(self) -> None:
        self._released = threading.Event()

    def __call__(self, message: Message) -> bool:
        if message.get("BARRIER") == "1":
            self._released.wait()
        return True

    def release(self) -> None:
        self._released.set()


@contextlib.contextmanager
def played_manager(folder: Path, policy: str) -> Iterator[PlayedManager]:
    """A manager that has started a broker with `policy`."""
    manager = PlayedManager(folder, policy)
    try:
        manager.start()
        yield manager
        manager.stop()
    finally:
        manager.close()
