"""What the processor, the firmware and a hypervisor give.

CPUID leaves: SDM volume 3D, "Enumeration of SGX".  What Linux makes of them:
arch/x86/kernel/cpu/feat_ctl.c and arch/x86/kernel/cpu/sgx/main.c; the lines of the kernel's log that
are looked for come from there.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import final

from teemate.doctor._check import Check, Group, Status
from teemate.doctor._host import Host

__all__ = ["Processor", "check_firmware", "check_launch_control", "check_processor", "check_sgx2"]

_HYPERVISORS = {
    b"KVMKVMKVM": "KVM",
    b"TCGTCGTCGTCG": "QEMU without KVM",
    b"Microsoft Hv": "Hyper-V",
    b"VMwareVMware": "VMware",
    b"XenVMMXenVMM": "Xen",
    b"ACRNACRNACRN": "ACRN",
    b"bhyve bhyve ": "bhyve",
}
_FEATURE_CONTROL = 0x3A  # IA32_FEATURE_CONTROL: bit 0 locked, 17 launch control, 18 SGX
_IN_A_VM = (
    "give the virtual machine SGX: QEMU 6.2 or later with -cpu host,+sgx,+sgxlc and a memory-backend-epc "
    "(libvirt: <memory model='sgx-epc'>), or an instance type of the cloud that has SGX"
)
_NO_SGX = 'take backend "sim" here (it protects nothing), or a host with SGX'


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What CPUID says, and which of it the kernel uses (the flags of /proc/cpuinfo)."""

    vendor: str
    model: str
    hypervisor: str | None
    sgx: bool
    sgx1: bool
    sgx2: bool
    launch_control: bool
    kernel_sgx: bool
    kernel_launch_control: bool
    epc: tuple[tuple[int, int], ...]
    """EPC sections: physical address and size, bytes."""

    @classmethod
    def of(cls, host: Host) -> Processor:
        """Ask the processor."""
        machine = host.machine
        zero = (0, 0, 0, 0)
        highest = machine.cpuid(0) or zero
        leaf1, leaf7 = machine.cpuid(1) or zero, machine.cpuid(7) or zero
        sgx = bool(leaf7[1] & 1 << 2)
        leaf12 = (machine.cpuid(0x12) or zero) if sgx else zero
        info = host.fields("/proc/cpuinfo")
        flags = info.get("flags", "").split()
        hypervisor = None
        if leaf1[2] & 1 << 31:
            found = machine.cpuid(0x40000000) or zero
            signature = struct.pack("<3I", *found[1:4])
            hypervisor = _HYPERVISORS.get(signature.rstrip(b"\0"), "a hypervisor")
        return cls(
            vendor=struct.pack("<3I", highest[1], highest[3], highest[2]).decode("ascii", "replace"),
            model=info.get("model name", ""),
            hypervisor=hypervisor,
            sgx=sgx,
            sgx1=bool(leaf12[0] & 1),
            sgx2=bool(leaf12[0] & 2),
            launch_control=bool(leaf7[2] & 1 << 30),
            kernel_sgx="sgx" in flags,
            kernel_launch_control="sgx_lc" in flags,
            epc=tuple(_sections(host)) if sgx else (),
        )

    @property
    def name(self) -> str:
        """For people."""
        return self.model or self.vendor


def _sections(host: Host) -> list[tuple[int, int]]:
    """CPUID.12H, subleaves from 2 on: one EPC section each, until one that is none."""
    sections = []
    for subleaf in range(2, 66):
        registers = host.machine.cpuid(0x12, subleaf)
        if registers is None or registers[0] & 0xF != 1:
            break
        eax, ebx, ecx, edx = registers
        base = (ebx & 0xFFFFF) << 32 | (eax & 0xFFFFF000)
        size = (edx & 0xFFFFF) << 32 | (ecx & 0xFFFFF000)
        sections.append((base, size))
    return sections


def check_processor(processor: Processor) -> Check:
    """Whether CPUID shows SGX at all."""
    status, advice = Status.OK, ""
    where = f", under {processor.hypervisor}" if processor.hypervisor else ""
    found = f"{processor.name}{where}"
    if processor.sgx:
        found += ": has SGX" + (
            "" if processor.sgx1 else ", but shows no SGX1 (the firmware has not enabled it)"
        )
    elif processor.vendor != "GenuineIntel":
        status, advice = Status.PROBLEM, _NO_SGX
        found += ": SGX is Intel's, this processor has none"
    elif processor.hypervisor:
        status, advice = Status.PROBLEM, _IN_A_VM
        found += ": the hypervisor does not pass SGX on, or its host has none"
    else:
        status = Status.PROBLEM
        found += ": shows no SGX"
        advice = (
            "look whether this model has SGX (ark.intel.com: Xeon Scalable from the third "
            f"generation on); if so, enable it in the firmware's setup; else {_NO_SGX}"
        )
    return Check(
        id="processor", title="processor", group=Group.SGX, status=status, found=found, advice=advice
    )


def _feature_control(host: Host) -> int | None:
    """Return IA32_FEATURE_CONTROL; None unless we are root and the msr module is loaded."""
    try:
        fd = os.open(host.path("/dev/cpu/0/msr"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        raw = os.pread(fd, 8, _FEATURE_CONTROL)
    except OSError:
        return None
    finally:
        os.close(fd)
    return int.from_bytes(raw, "little") if len(raw) == 8 else None


def _kernel_off(host: Host) -> str | None:
    """Return what on the kernel's command line switches SGX off."""
    for word in (host.text("/proc/cmdline") or "").split():
        if word == "nosgx":
            return word
        if word.startswith("clearcpuid=") and {"sgx", "290"} & set(word.partition("=")[2].split(",")):
            return word
    return None


def check_firmware(host: Host, processor: Processor) -> Check:
    """Whether the firmware has enabled SGX, as far as the kernel and the registers tell."""

    def made(status: Status, found: str, advice: str = "") -> Check:
        return Check(
            id="firmware", title="firmware", group=Group.SGX, status=status, found=found, advice=advice
        )

    if not processor.sgx:
        return made(Status.NOT_APPLICABLE, "the processor shows no SGX")
    if processor.sgx1 and processor.kernel_sgx:
        return made(Status.OK, "SGX is enabled")
    word = _kernel_off(host)
    if word is not None:
        return made(
            Status.PROBLEM, f"the kernel's command line switches SGX off: {word}", f"boot without {word}"
        )
    control = _feature_control(host)
    said = "; ".join(
        line for line in host.kernel_log("SGX") or () if "disabled by BIOS" in line or "FEAT_CTL" in line
    )
    advice = (
        _IN_A_VM
        if processor.hypervisor
        else "enable SGX in the firmware's setup (often under Processor or Security, as Software Guard "
        "Extensions, with a size for PRMRR), update the firmware if it has no such setting, then power the "
        "machine off and on"
    )
    if control is not None and not control & 1 << 18:
        locked = "locked" if control & 1 else "not locked"
        return made(Status.PROBLEM, f"SGX is off in IA32_FEATURE_CONTROL ({control:#x}, {locked})", advice)
    if said:
        return made(Status.PROBLEM, f'the kernel says: "{said}"', advice)
    if not processor.sgx1:
        return made(Status.PROBLEM, "SGX is not enabled: CPUID shows SGX without SGX1", advice)
    # SGX1 is there, so the firmware has done its part: the kernel does not know of SGX, or refuses.
    return made(
        Status.UNKNOWN,
        "CPUID shows SGX, /proc/cpuinfo does not: the kernel has no support for it, or has switched it off",
        "see the next checks; `dmesg | grep -i sgx`, as root, tells why",
    )


def check_launch_control(host: Host, processor: Processor) -> Check:
    """Whether launch control is flexible: Linux's driver starts no enclave without it."""

    def made(status: Status, found: str, advice: str = "") -> Check:
        return Check(
            id="launch-control",
            title="launch control",
            group=Group.SGX,
            status=status,
            found=found,
            advice=advice,
        )

    if not processor.sgx:
        return made(Status.NOT_APPLICABLE, "the processor shows no SGX")
    if not processor.launch_control:
        return made(
            Status.PROBLEM,
            "no flexible launch control (FLC): Linux refuses SGX without it",
            "add +sgxlc to the virtual machine's processor"
            if processor.hypervisor
            else "set SGX launch control to unlocked or flexible in the firmware's setup; processors from "
            "before about 2018 have none",
        )
    control = _feature_control(host)
    said = any("Launch Control is locked" in line for line in host.kernel_log("SGX") or ())
    if said or (control is not None and control & 1 and control & 1 << 18 and not control & 1 << 17):
        return made(
            Status.PROBLEM,
            "the firmware has locked launch control: Linux refuses SGX",
            "set SGX launch control to unlocked or flexible (no fixed owner) in the firmware's setup",
        )
    if processor.kernel_sgx and not processor.kernel_launch_control:
        return made(
            Status.PROBLEM,
            "CPUID shows launch control, /proc/cpuinfo does not: the kernel found it locked",
            "set SGX launch control to unlocked or flexible (no fixed owner) in the firmware's setup",
        )
    return made(Status.OK, "flexible (FLC)")


def check_sgx2(processor: Processor) -> Check:
    """Whether enclaves can change after EINIT."""
    if not (processor.sgx and processor.sgx1):
        status, found, advice = Status.NOT_APPLICABLE, "no SGX1 here", ""
    elif processor.sgx2:
        status, found, advice = Status.OK, "SGX1 and SGX2", ""
    else:
        status = Status.WARNING
        found = "SGX1 only: enclaves cannot gain, lose or change pages once they run"
        advice = (
            "add +sgx2 to the virtual machine's processor, if its host has it"
            if processor.hypervisor
            else "nothing, unless an image needs it: TeeMate's own do not"
        )
    return Check(id="sgx2", title="SGX2", group=Group.SGX, status=status, found=found, advice=advice)
