"""``teemate-broker --keeper``: keeps the broker's descriptors and starts it again when it dies.

What systemd does for a service with a file descriptor store, for hosts without systemd.  The broker
itself runs as a child, the *worker*, and speaks to the keeper as it would to systemd
(descriptor_store.py); only messages that the worker itself sent are heeded.  What has to outlive
everything does little: this process takes descriptors in, starts a worker, and waits.

- A worker that ends is started again with everything it had stored.  First the processes that it
  left (wardens, which end with it by themselves) are killed: two wardens never work on one enclave.
- A worker that dies again and again before it is ready is not started for ever, and one that refuses
  the state that it finds (exit status 78) is not started again at all: the keeper then *holds*.  It
  keeps everything, says what to do, and waits for a signal.
- SIGHUP: start the worker anew, from the code that is installed now (upgrade; or to try again).
  SIGUSR1, while holding: start it and throw away what was kept.  SIGTERM, SIGINT: end everything.
- Beside a worker that is ready waits its successor, with everything loaded (a second or so of
  computing): when the worker dies it gets the descriptors, and goes on within milliseconds.
- When the keeper dies, the worker hears of it through a pipe and ends.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import datetime
import fcntl
import itertools
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import NamedTuple

from teemate.broker.restart.kept import CAPACITY, FIRST_FD, MAX_FDS, Kept, Stored, inherited
from teemate.broker.telemetry.log_file import LogFile

__all__ = ["KEEPER_FD_NAME", "REFUSED", "Keeper", "main"]

REFUSED = 78
"""Exit status of a worker that does not understand what was kept (EX_CONFIG of sysexits.h)."""
KEEPER_FD_NAME = "keeper"
"""Name of the pipe that a worker gets; its other end closes with the keeper."""
_FAILURES = 6
"""Workers in a row that died before they were ready; then the keeper holds."""
_SHORT = 1.0
"""A worker that fails so many seconds after it got ready will soon do so again."""
_FIRST_PAUSE = 0.1
_LAST_PAUSE = 5.0
"""Seconds before the start after a failure: doubled for each further one, up to the last."""
_PATIENCE = 30.0
"""Seconds that a worker may take to end, and processes that it left."""
_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)


class _Successor(NamedTuple):
    pid: int
    sock: socket.socket


class Keeper:
    """One worker after the other; `command` starts one."""

    def __init__(self, command: list[str], *, json_log: bool = False) -> None:
        self._command = command
        self._json = json_log
        self._log_file = LogFile(2, lambda count: self._log("warning", "log records lost", count=count))
        self._kept = Kept(inherited(), self._log)
        self._worker: int | None = None
        self._successor: _Successor | None = None
        self._ready = False
        self._was_ready = False
        self._failures = 0
        self._short_lives = 0
        self._ready_at = 0.0
        self._start_at: float | None = time.monotonic()
        self._kill_at: float | None = None
        self._ending = False
        self._upgrading = False
        self._discard = False
        self._exit_status = 0
        self._alive, self._alive_here = os.pipe2(os.O_CLOEXEC)
        self._upstream = os.environ.pop("NOTIFY_SOCKET", "")
        self._signals, self._signals_in = socket.socketpair()

    # -- the loop ----------------------------------------------------------------

    def run(self) -> int:
        """Keep workers running until told to end; returns the exit status."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for end in (self._signals, self._signals_in):
            end.setblocking(False)
        signal.set_wakeup_fd(self._signals_in.fileno())
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        poll = select.poll()
        poll.register(self._kept.socket, select.POLLIN)
        poll.register(self._signals, select.POLLIN)
        try:
            while not self._ending or self._worker is not None:
                for fd, _ in poll.poll(self._patience()):
                    if fd == self._kept.socket.fileno():
                        self._read_messages()
                    else:
                        self._read_signals()
                self._act_on_time()
        finally:
            self._kept.close()
        return self._exit_status

    def _patience(self) -> float | None:
        """Milliseconds until something is to be done."""
        times = [moment for moment in (self._start_at, self._kill_at) if moment is not None]
        return max(0.0, min(times) - time.monotonic()) * 1000 + 1 if times else None

    def _act_on_time(self) -> None:
        now = time.monotonic()
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            if self._worker is not None:
                self._log("warning", "worker killed", pid=self._worker, reason="it did not end when told to")
                os.kill(self._worker, signal.SIGKILL)
        if self._start_at is not None and now >= self._start_at and self._worker is None:
            self._start_at = None
            if not self._hand_over():
                self._start()

    def _read_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._signals.recv(256):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._log("info", "stopping", signal=signal.Signals(number).name)
                    self._ending, self._start_at = True, None
                    self._drop_successor()
                    self._tell_worker(signal.SIGINT)  # for good: what was kept is of no use any more
                elif number == signal.SIGHUP:
                    self._start_anew()
                elif number == signal.SIGUSR1:
                    if self._worker is None and not self._ending:
                        self._discard = True
                        self._start_anew()
                    else:
                        self._log(
                            "warning", "nothing discarded", reason="the worker does not refuse its state"
                        )
        self._reap()

    def _start_anew(self) -> None:
        if self._ending:
            return
        self._failures = 0
        self._drop_successor()  # it has the old code
        if self._worker is None:
            self._start_at = time.monotonic()
        else:
            self._log("info", "worker is replaced", pid=self._worker)
            self._upgrading = True
            self._tell_worker(signal.SIGTERM)

    def _tell_worker(self, number: int) -> None:
        if self._worker is not None:
            os.kill(self._worker, number)  # our child and not waited for: its number is no other's
            self._kill_at = time.monotonic() + _PATIENCE

    # -- the worker ----------------------------------------------------------------

    def _start(self) -> None:
        """Start a worker with everything that is kept."""
        kept = self._everything()
        command = self._command + (["--discard-state"] if self._discard else [])
        listen = {"LISTEN_FDS": str(len(kept)), "LISTEN_FDNAMES": ":".join(stored.name for stored in kept)}
        self._begin(self._fork(command, listen, [stored.fd for stored in kept]))

    def _begin(self, pid: int) -> None:
        self._discard = self._ready = self._upgrading = False
        self._worker = pid
        self._log("info", "worker started", pid=pid, kept=len(self._kept.stored))

    def _everything(self) -> list[Stored]:
        return [Stored(KEEPER_FD_NAME, self._alive), *self._kept.stored]

    def _fork(self, command: list[str], listen: dict[str, str], fds: list[int]) -> int:
        environment = {
            **os.environ, **listen, "NOTIFY_SOCKET": self._kept.address, "FDSTORE": str(CAPACITY)
        }  # fmt: skip
        # A signal for the worker must not meet our handlers in the moment before its exec.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            try:
                _become(command, environment, fds)
            finally:
                os._exit(127)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return pid

    # -- its successor ---------------------------------------------------------------

    def _start_successor(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            pid = self._fork([*self._command, "--successor"], {}, [theirs.fileno()])
        self._successor = _Successor(pid, ours)

    def _hand_over(self) -> bool:
        """Give everything to the successor; False when there is none."""
        if self._successor is None or self._discard:
            self._drop_successor()
            return False
        kept, (pid, sock) = self._everything(), self._successor
        self._successor = None
        with sock:
            try:
                for start in range(0, len(kept), MAX_FDS):
                    part = kept[start : start + MAX_FDS]
                    message = {"names": [name for name, _ in part], "more": start + MAX_FDS < len(kept)}
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd for _, fd in part]))
                    sock.sendmsg([json.dumps(message).encode()], [rights], socket.MSG_NOSIGNAL)
            except OSError:  # it has ended: we hear of that
                os.kill(pid, signal.SIGKILL)
                return False
        self._begin(pid)
        return True

    def _drop_successor(self) -> None:
        if self._successor is not None:
            self._successor.sock.close()  # it ends then
            os.kill(self._successor.pid, signal.SIGKILL)
            self._successor = None

    # -- ends ------------------------------------------------------------------------

    def _reap(self) -> None:
        """Collect what has ended: the worker, and what earlier ones left to us."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            if pid == self._worker:
                self._read_messages()  # what it still stored counts
                self._worker, self._kill_at = None, None
                self._kill_leftovers(pid)  # collects it too: until then its number is no other group's
                self._worker_ended(pid, code)
                continue
            os.waitpid(pid, 0)
            if self._successor is not None and pid == self._successor.pid:
                self._log("warning", "successor ended", pid=pid, status=code)
                self._successor.sock.close()
                self._successor = None

    def _worker_ended(self, pid: int, code: int) -> None:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        now = time.monotonic()
        if self._ending:
            self._exit_status = 0 if code == 0 else 1
        elif self._upgrading:
            self._start_at = now
        elif self._ready:
            self._log("warning", "worker ended", pid=pid, how=how, kept=len(self._kept.stored))
            # SIGKILL comes from outside, and says nothing of the next worker.
            short = code != -signal.SIGKILL and now - self._ready_at < _SHORT
            self._short_lives = self._short_lives + 1 if short else 0
            self._start_at = now + _pause(self._short_lives - 1)
        elif code == REFUSED:
            self._hold("the broker does not understand what was kept, as its last message says")
        elif not self._was_ready and code > 0:  # it has said why
            self._log("error", "worker did not start", pid=pid, how=how)
            self._ending, self._exit_status = True, code
        elif code == -signal.SIGKILL:
            self._log("warning", "worker did not get ready", pid=pid, how=how)
            self._start_at = now + _FIRST_PAUSE
        else:
            self._failures += 1
            self._log("warning", "worker did not get ready", pid=pid, how=how, failures=self._failures)
            if self._failures < _FAILURES:
                self._start_at = now + _pause(self._failures)
            else:
                self._hold(f"{self._failures} workers in a row ended before they were ready")

    def _hold(self, why: str) -> None:
        """Start nothing any more, but keep everything: the enclaves live as long as their descriptors."""
        self._log(
            "error", "no worker runs",
            reason=why, kept=len(self._kept.stored),
            advice=f"enclaves are kept: mend the cause and `kill -HUP {os.getpid()}`, or throw them away"
            f" and begin anew with `kill -USR1 {os.getpid()}`",
        )  # fmt: skip
        self._notify_upstream(f"STATUS=no worker runs: {why}")

    def _kill_leftovers(self, group: int) -> None:
        """Kill and collect what the worker left in its process group, before there is another worker.

        Orphans of it come to us (a subreaper).  Nothing in /proc is looked through: reading about a
        process can block for as long as that one is stuck.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-group, 0)

    # -- messages of the worker --------------------------------------------------------

    def _read_messages(self) -> None:
        for message in self._kept.read(self._worker):
            if message.get("READY") == "1":
                self._ready = self._was_ready = True
                self._ready_at = time.monotonic()
                self._failures = 0
                self._notify_upstream("READY=1")
                if self._successor is None and not self._ending and not self._upgrading:
                    self._start_successor()
            if "STATUS" in message:
                self._notify_upstream(f"STATUS={message['STATUS']}")

    def _notify_upstream(self, state: str) -> None:
        """Pass it on to whoever started us and wants to know; one who does not listen must not hold us up."""
        if not self._upstream:
            return
        address = "\0" + self._upstream[1:] if self._upstream.startswith("@") else self._upstream
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            sock.send(state.encode(), socket.MSG_DONTWAIT)

    def _log(self, level: str, event: str, **about: object) -> None:
        """One line, as the worker's log has them; no library for what has to be up always."""
        moment = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        if self._json:
            record = {**about, "event": f"keeper: {event}", "level": level, "timestamp": moment}
            line = json.dumps(record)
        else:
            details = " ".join(f"{key}={value}" for key, value in about.items())
            line = f"{moment} [{level:<8}] keeper: {event:<25} {details}".rstrip()
        self._log_file.try_again()
        self._log_file.write(line + "\n")


def _pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(_LAST_PAUSE, _FIRST_PAUSE * 2.0 ** (failures - 1)) if failures > 0 else 0.0


def _become(command: list[str], environment: dict[str, str], fds: list[int]) -> None:
    """Turn this child into a worker with `fds` from number 3 on."""
    free = FIRST_FD + len(fds)
    aside = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, free) for fd in fds]
    for number, fd in enumerate(aside, FIRST_FD):
        os.dup2(fd, number, inheritable=True)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    os.setpgid(0, 0)  # with what it starts, so that the keeper can end that
    if "LISTEN_FDS" in environment:
        environment["LISTEN_PID"] = str(os.getpid())
    os.execvpe(command[0], command, environment)  # noqa: S606 - our own interpreter


def main(arguments: list[str]) -> int:
    """Keep brokers that are started with `arguments`."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    json_log = "--log-format=json" in arguments or ("--log-format", "json") in itertools.pairwise(arguments)
    return Keeper([sys.executable, "-m", "teemate.broker.main", *arguments], json_log=json_log).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
