"""Brokers for tests that begin as forks of a process that has everything imported.

Importing the broker takes a third of a second, and some five in the emulated SGX machine: more than most
tests need for all else.  A broker that begins here is an ordinary process, but for how it began: an own
process of this file forks it.  Brokers with an environment or a launcher of their own are executed
(running_broker.py), and so is every keeper's worker.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType

# A request: JSON, with the descriptors of the log and of a pipe.  Into the pipe go the broker's pid, and its
# exit status as of subprocess (minus the signal) when it has ended.
_NUMBER = struct.Struct("=i")
_LONGEST = 1 << 17


class Forked:
    """A broker; what of subprocess.Popen tests use."""

    def __init__(self, status: int) -> None:
        self._status = status
        self.pid: int = _NUMBER.unpack(os.read(status, _NUMBER.size))[0]
        self.returncode: int | None = None

    def __enter__(self) -> Forked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._status)

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._status, select.POLLIN)
            if not poll.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("teemate-broker", timeout or 0.0)
            self.returncode = _NUMBER.unpack(os.read(self._status, _NUMBER.size))[0]
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # its status is on the way from who forked it
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def fork_broker(arguments: list[str], log: int, environment: Mapping[str, str]) -> Forked:
    """Start ``teemate-broker`` with `arguments`; its output goes to `log`, which stays the caller's."""
    ours, theirs = os.pipe()
    request = json.dumps({"arguments": arguments, "environment": dict(environment), "folder": os.getcwd()})
    try:
        socket.send_fds(_server(), [request.encode()], [log, theirs])
    finally:
        os.close(theirs)
    return Forked(ours)


@functools.cache
def _server() -> socket.socket:
    """Start the process, once; it ends when our end of the socket is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(requests: socket.socket) -> list[str] | None:
    """Fork for every request; returns the arguments in a child, and None when there will be no more."""
    import gc

    import teemate.broker.main  # noqa: F401 - what this is all about

    gc.freeze()
    children: dict[int, tuple[int, int]] = {}  # by pidfd: pid and pipe
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd != requests.fileno():
                pid, status = children.pop(fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    os.write(status, _NUMBER.pack(code))
                poll.unregister(fd)
                os.close(fd)
                os.close(status)
                continue
            text, fds, _, _ = socket.recv_fds(requests, _LONGEST, 2)
            if not text:
                return None
            request, (log, status) = json.loads(text), fds
            pid = os.fork()
            if pid == 0:
                requests.close()
                for pidfd, (_, pipe) in children.items():
                    os.close(pidfd)
                    os.close(pipe)
                os.close(status)
                _become(log, request)
                return list(request["arguments"])
            os.close(log)
            os.write(status, _NUMBER.pack(pid))
            pidfd = os.pidfd_open(pid)
            children[pidfd] = (pid, status)
            poll.register(pidfd, select.POLLIN)


def _become(log: int, request: dict[str, dict[str, str]]) -> None:
    """Be as if just executed."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(str(request["folder"]))
    os.environ.clear()
    os.environ.update(request["environment"])


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the tests
    arguments = _serve(socket.socket(fileno=int(sys.argv[1])))
    if arguments is not None:
        from teemate.broker.main import main

        sys.argv = ["teemate-broker", *arguments]
        main()


if __name__ == "__main__":
    _main()
