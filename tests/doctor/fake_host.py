"""Hosts that are wrong in one way: a tree of files, and a machine that answers as told."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from teemate.doctor import Host
from teemate.doctor._host import BrokerAnswer, Choice, DeviceTrial, ProbeResult, Unit

INTEL = "GenuineIntel"
AMD = "AuthenticAMD"
MIB = 1 << 20


def words(text: str) -> tuple[int, int, int]:
    """The three registers that spell `text`."""
    return struct.unpack("<3I", text.encode().ljust(12, b"\0")[:12])


def cpuid_table(
    *,
    vendor: str = INTEL,
    hypervisor: str | None = None,
    sgx: bool = True,
    sgx1: bool = True,
    sgx2: bool = True,
    flc: bool = True,
    epc: Sequence[tuple[int, int]] = ((0x1_0000_0000, 64 * MIB),),
) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    """CPUID of such a processor (SDM volume 3D, "Enumeration of SGX")."""
    first, second, third = words(vendor)
    table = {
        (0, 0): (0x16, first, third, second),
        (1, 0): (0, 0, 1 << 27 | (1 << 31 if hypervisor else 0), 0),
        (7, 0): (0, sgx << 2, flc << 30, 0),
        (0x12, 0): (sgx1 | sgx2 << 1, 1, 0, 0x241F),
    }
    for number, (base, size) in enumerate(epc):
        table[0x12, 2 + number] = (
            base & 0xFFFFF000 | 1,
            base >> 32,
            size & 0xFFFFF000 | 1,
            size >> 32,
        )
    if hypervisor:
        table[0x40000000, 0] = (0x40000001, *words(hypervisor))
    return table


@dataclass(kw_only=True)
class FakeMachine:
    """Answers as told; the default is a machine on which all is well."""

    table: dict[tuple[int, int], tuple[int, int, int, int]] = field(default_factory=cpuid_table)
    xsave: int = 7
    vdso: bool = True
    choices: dict[str, Choice] = field(
        default_factory=lambda: (
            {name: Choice(backend=name) for name in ("sgx", "sim")} | {"auto": Choice(backend="sgx")}
        )
    )
    device: DeviceTrial = field(default_factory=DeviceTrial)
    provision: int = 0
    uid: int = 0
    gids: tuple[int, ...] = (0,)
    trials: dict[str, ProbeResult] = field(
        default_factory=lambda: {name: ProbeResult(works=True, text="in 1 ms") for name in ("sgx", "sim")}
    )
    broker: BrokerAnswer = field(default_factory=lambda: BrokerAnswer(errno=errno.ECONNREFUSED))
    systemd_unit: Unit | None = None
    asked: list[str] = field(default_factory=list)
    probed: list[str] = field(default_factory=list)

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int] | None:
        return self.table.get((leaf, subleaf))

    def xcr0(self) -> int:
        return self.xsave

    def vdso_enters(self) -> bool:
        return self.vdso

    def choose(self, wanted: str) -> Choice:
        return self.choices[wanted]

    def try_device(self, path: Path) -> DeviceTrial:
        self.asked.append(str(path))
        return self.device

    def try_open(self, path: Path) -> int:
        self.asked.append(str(path))
        return self.provision

    def identity(self) -> tuple[int, tuple[int, ...]]:
        return self.uid, self.gids

    def probe(self, backends: Sequence[str]) -> dict[str, ProbeResult]:
        self.probed.extend(backends)
        return {name: self.trials[name] for name in backends}

    def ask_broker(self, path: str) -> BrokerAnswer:
        self.asked.append(path)
        return self.broker

    def unit(self, name: str) -> Unit | None:
        return self.systemd_unit


class FakeHost:
    """A tree under a folder: all is well until a test changes something."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.machine = FakeMachine()
        self.environment: dict[str, str] = {}
        self.write("/proc/sys/kernel/osrelease", "6.1.0-56-amd64\n")
        self.write("/boot/config-6.1.0-56-amd64", "CONFIG_X86_SGX=y\n")
        self.write("/proc/cmdline", "root=/dev/sda1 quiet\n")
        self.write("/proc/cpuinfo", "model name\t: Xeon\nflags\t\t: fpu sgx sgx_lc\n")
        self.write("/proc/misc", "126 sgx_provision\n125 sgx_enclave\n 58 rfkill\n")
        self.write(
            "/proc/self/mountinfo", "1 0 0:1 / / rw - ext4 x rw\n2 1 0:5 / /dev rw,nosuid - devtmpfs d rw\n"
        )
        self.write("/proc/self/maps", "7f0000000000-7f0000001000 r-xp 00000000 08:01 1 /usr/lib/libc.so.6\n")
        self.write(
            "/proc/self/limits", "Max address space         unlimited            unlimited            bytes\n"
        )
        self.write("/proc/self/status", "Name:\tx\nSeccomp:\t0\n")
        self.write("/proc/self/cgroup", "0::/user.slice\n")
        self.write("/proc/self/personality", "00000000\n")
        self.auxv({26: 2, 33: 0x7FFF0000})
        self.write("/proc/sys/vm/overcommit_memory", "0\n")
        self.write("/proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 4000000 kB\n")
        self.write("/sys/devices/system/node/node0/x86/sgx_total_bytes", f"{64 * MIB}\n")
        self.write("/etc/group", "root:x:0:\nsgx:x:106:\nusers:x:100:\n")
        self.log("6,1,0,-;Linux version 6.1\n", "6,700,1200000,-;sgx: EPC section 0x100000000-0x103ffffff\n")
        self.write("/dev/sgx_enclave", "").chmod(0o660)
        self.write("/dev/sgx_provision", "").chmod(0o660)

    def write(self, name: str, text: str | bytes) -> Path:
        """Make a file, and the folders above it."""
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def remove(self, *names: str) -> None:
        """Take files away."""
        for name in names:
            (self.root / name.lstrip("/")).unlink()

    def auxv(self, entries: dict[int, int]) -> None:
        """Give this process that auxiliary vector."""
        pairs = [*entries.items(), (0, 0)]
        self.write("/proc/self/auxv", b"".join(struct.pack("<QQ", *pair) for pair in pairs))

    def log(self, *records: str) -> None:
        """Let the kernel have said so."""
        self.write("/dev/kmsg", "".join(records))

    def without_driver(self) -> None:
        """The driver is off: nothing is registered, no nodes are there."""
        self.write("/proc/misc", " 58 rfkill\n")
        self.remove("/dev/sgx_enclave", "/dev/sgx_provision")

    def without_sgx(self, **processor: object) -> None:
        """A processor that shows no SGX."""
        self.machine.table = cpuid_table(sgx=False, sgx1=False, sgx2=False, flc=False, epc=(), **processor)  # type: ignore[arg-type]
        self.write("/proc/cpuinfo", "model name\t: Xeon\nflags\t\t: fpu\n")
        (self.root / "sys/devices/system/node/node0/x86/sgx_total_bytes").unlink()
        self.without_driver()

    @property
    def host(self) -> Host:
        """As the checks take it."""
        return Host(self.machine, self.root, self.environment)
