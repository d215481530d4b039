"""The machine that this process runs on."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teemate import wire
from teemate._native import ffi, lib
from teemate.doctor._host import BrokerAnswer, Choice, DeviceTrial, ProbeResult, Unit
from teemate.doctor._probe import Probe
from teemate.errors import ProtocolError

__all__ = ["ThisMachine"]

SOCKET_TIMEOUT = 1.0
"""Seconds that a broker has for both answers."""
PROBE_TIMEOUT = 20.0
"""Seconds for an enclave of a few pages, on a machine that is busy or emulated."""
SYSTEMCTL_TIMEOUT = 1.0
_NUMBERS = {"auto": lib.TEEMATE_AUTO, "sim": lib.TEEMATE_SIM, "sgx": lib.TEEMATE_SGX}
_NAMES = {lib.TEEMATE_SIM: "sim", lib.TEEMATE_SGX: "sgx"}


class ThisMachine:
    """Asks the processor, the kernel and the programs of this host."""

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int] | None:
        registers = ffi.new("uint32_t[4]")
        if lib.teemate_cpuid(leaf, subleaf, registers) < 0:
            return None
        return registers[0], registers[1], registers[2], registers[3]

    def xcr0(self) -> int:
        return int(lib.teemate_xcr0())

    def vdso_enters(self) -> bool:
        return bool(lib.teemate_vdso_enters())

    def choose(self, wanted: str) -> Choice:
        diag = ffi.new("struct teemate_diag *")
        backend = lib.teemate_backend_choose(_NUMBERS[wanted], diag)
        reason = ffi.string(diag.text).decode(errors="replace")
        if backend < 0:
            return Choice(backend=None, reason=reason or os.strerror(-backend))
        return Choice(backend=_NAMES[backend], reason=reason)

    def try_device(self, path: Path) -> DeviceTrial:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            return DeviceTrial(open_errno=error.errno or errno.EIO)
        try:
            # Before ECREATE any place will do (sgx_encl_may_map of the driver).
            mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_EXEC).close()
        except OSError as error:
            return DeviceTrial(map_errno=error.errno or errno.EIO)
        finally:
            os.close(fd)
        return DeviceTrial()

    def try_open(self, path: Path) -> int:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def identity(self) -> tuple[int, tuple[int, ...]]:
        return os.geteuid(), (os.getegid(), *os.getgroups())

    def probe(self, backends: Sequence[str]) -> dict[str, ProbeResult]:
        started = {name: Probe(name) for name in backends}
        deadline = time.monotonic() + PROBE_TIMEOUT
        return {name: probe.result(deadline, PROBE_TIMEOUT) for name, probe in started.items()}

    def ask_broker(self, path: str) -> BrokerAnswer:
        deadline = time.monotonic() + SOCKET_TIMEOUT
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(SOCKET_TIMEOUT)
            try:
                sock.connect(path)
            except OSError as error:
                return BrokerAnswer(errno=error.errno or errno.ETIMEDOUT)
            try:
                hello = {"version": 1, "client": "teemate doctor"}
                wire.send(sock, wire.encode({"id": 0, "op": "hello", "args": hello}))
                wire.send(sock, wire.encode({"id": 1, "op": "enclaves"}))
                greeting = _answer(sock, 0, deadline)
                listed = _answer(sock, 1, deadline)
            except TimeoutError:
                return BrokerAnswer(
                    complaint=f"somebody listens there, and says nothing within {SOCKET_TIMEOUT:g} s"
                )
            except OSError as error:
                return BrokerAnswer(complaint=f"the connection broke: {error.strerror}")
            except ProtocolError as error:
                return BrokerAnswer(complaint=f"not a broker's answer: {error}")
        try:
            return BrokerAnswer(
                name=str(greeting["broker"]),
                version=int(greeting["version"]),
                backend=str(listed.get("backend", "")),
                wanted=str(listed.get("wanted", "")),
                enclaves=tuple(
                    (str(e["name"]), str(e["backend"]), int(e["base"]), int(e["size"]), int(e["pages"]))
                    for e in listed["enclaves"]
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            return BrokerAnswer(complaint=f"its answer has no usable {error}")

    def unit(self, name: str) -> Unit | None:
        keys = ("LoadState", "ActiveState", "SubState", "Result", "UnitFileState")
        try:
            done = subprocess.run(  # noqa: S603
                ["systemctl", "show", name, *(f"--property={key}" for key in keys)],  # noqa: S607
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SYSTEMCTL_TIMEOUT,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        values = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        return Unit(
            load=values.get("LoadState", ""),
            active=values.get("ActiveState", ""),
            sub=values.get("SubState", ""),
            result=values.get("Result", ""),
            file_state=values.get("UnitFileState", ""),
        )


def _answer(sock: socket.socket, number: int, deadline: float) -> dict[str, Any]:
    """Return the `ok` of request `number`; events and other answers are passed over."""
    while True:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        packet = wire.receive(sock)
        wire.close_all(packet.fds)
        if not packet.data:
            raise ProtocolError("it closed the connection")
        message = wire.decode(packet.data)
        failure = message.get("error")
        if isinstance(failure, dict) and message.get("id") in (number, None):
            raise ProtocolError(f"{failure.get('code')}: {failure.get('message')}")
        ok = message.get("ok")
        if message.get("id") == number and isinstance(ok, dict):
            return ok
