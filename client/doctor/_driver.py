"""The kernel's part: driver, device nodes, vDSO, FSGSBASE."""

from __future__ import annotations

import errno
import gzip
import os
import re
import struct

from teemate.doctor._check import Check, Group, Status
from teemate.doctor._container import container_signs
from teemate.doctor._host import Host
from teemate.doctor._processor import Processor

__all__ = [
    "ENCLAVE_DEVICE",
    "check_device",
    "check_exec",
    "check_fsgsbase",
    "check_kernel",
    "check_provision",
    "check_vdso",
    "driver_registered",
]

ENCLAVE_DEVICE = "/dev/sgx_enclave"
PROVISION_DEVICE = "/dev/sgx_provision"
_FIRST_KERNEL = (5, 11)
_AT_HWCAP2 = 26
_HWCAP2_FSGSBASE = 1 << 1  # arch/x86/include/uapi/asm/hwcap2.h
_READ_IMPLIES_EXEC = 0x0400000
_OLD_DEVICES = ("/dev/isgx", "/dev/sgx/enclave", "/dev/sgx")
CLIENTS_NEED_NONE = "a program that only attaches needs no device, just the broker's socket"


def _check(
    identifier: str, title: str, status: Status, found: str, advice: str = "", group: Group = Group.SGX
) -> Check:
    return Check(id=identifier, title=title, group=group, status=status, found=found, advice=advice)


def driver_registered(host: Host) -> bool:
    """Whether the running kernel's driver offers enclaves, whatever nodes are in this /dev."""
    return any(line.split()[1:] == ["sgx_enclave"] for line in (host.text("/proc/misc") or "").splitlines())


def _config(host: Host, release: str) -> str | None:
    """Return CONFIG_X86_SGX of the running kernel ("y", "n"); None when its configuration is not here."""
    texts = [host.text(f"/boot/config-{release}"), host.text(f"/lib/modules/{release}/config")]
    try:
        texts.append(gzip.decompress(host.path("/proc/config.gz").read_bytes()).decode(errors="replace"))
    except (OSError, EOFError):
        texts.append(None)
    for text in texts:
        if text:
            return "y" if re.search(r"^CONFIG_X86_SGX=y$", text, re.MULTILINE) else "n"
    return None


def check_kernel(host: Host, processor: Processor) -> Check:
    """Whether the running kernel has the driver, and whether the driver is on."""
    release = host.line("/proc/sys/kernel/osrelease") or "of unknown version"
    name = f"Linux {release}"

    def made(status: Status, found: str, advice: str = "") -> Check:
        return _check("kernel-driver", "kernel driver", status, found, advice)

    if driver_registered(host):
        return made(Status.OK, f"{name} has the driver, and it is on")
    version = re.match(r"(\d+)\.(\d+)", release)
    if version and (int(version[1]), int(version[2])) < _FIRST_KERNEL:
        old = [path for path in _OLD_DEVICES if host.exists(path)]
        extra = f"; {old[0]} belongs to a driver from before it, which cannot be used" if old else ""
        return made(
            Status.PROBLEM,
            f"{name}: the SGX driver came with Linux 5.11{extra}",
            "boot Linux 5.11 or later (SGX2: 6.0)",
        )
    config = _config(host, release)
    if config == "n":
        return made(
            Status.PROBLEM,
            f"{name} was built without the SGX driver (CONFIG_X86_SGX)",
            "boot a kernel with CONFIG_X86_SGX=y, as those of the distributions have it",
        )
    has = "has the driver (CONFIG_X86_SGX=y)" if config == "y" else "may have the driver"
    if not processor.sgx:
        return made(Status.NOT_APPLICABLE, f"{name} {has}; without SGX it stays off")
    log = host.kernel_log("sgx: ")
    lines = [line for line in log or () if line.startswith("sgx: ") and "EPC section" not in line]
    if log is not None and lines:
        said = "; ".join(lines)
        return made(
            Status.PROBLEM,
            f'{name} {has}, and it is off: the kernel says "{said}"',
            "mend what the checks before this one name, and boot again",
        )
    return made(
        Status.PROBLEM,
        f"{name} {has}, and it is off: /proc/misc has no sgx_enclave",
        "mend what the checks before this one name; `dmesg | grep -i sgx`, as root, tells why"
        if log is None
        else "mend what the checks before this one name, and boot again",
    )


def check_device(host: Host) -> Check:
    """Whether this process can open /dev/sgx_enclave."""

    def made(status: Status, found: str, advice: str = "") -> Check:
        return _check("device", ENCLAVE_DEVICE, status, found, advice)

    what = host.stat(ENCLAVE_DEVICE)
    inside = bool(container_signs(host))
    if isinstance(what, int) and what != errno.ENOENT:
        return made(
            Status.PROBLEM,
            f"{ENCLAVE_DEVICE} cannot be looked at: {os.strerror(what)}",
            "give this user access to /dev",
        )
    if isinstance(what, int):
        if not driver_registered(host):
            return made(Status.NOT_APPLICABLE, "no such node, as the driver is not on")
        if inside:
            return made(
                Status.PROBLEM,
                "the kernel has the driver, this container no such node",
                "start the container with --device /dev/sgx_enclave (Kubernetes: Intel's SGX device plugin); "
                + CLIENTS_NEED_NONE,
            )
        minor = _minor(host)
        return made(
            Status.PROBLEM,
            "the kernel has the driver, but there is no such node",
            "mount devtmpfs at /dev or start udev"
            + (f"; by hand: mknod {ENCLAVE_DEVICE} c 10 {minor}" if minor else ""),
        )
    trial = host.machine.try_device(host.path(ENCLAVE_DEVICE))
    mode = host.mode(what)
    if trial.open_errno == 0:
        return made(Status.OK, f"can be opened ({mode})")
    if trial.open_errno == errno.EACCES:
        return made(Status.PROBLEM, *_not_permitted(host, what, mode))
    if trial.open_errno == errno.EPERM:
        return made(
            Status.PROBLEM,
            f"there ({mode}), and opening it is not permitted whatever the mode: a device control group"
            + (" of this container" if inside else "")
            + ", or a security module, forbids it",
            "start the container with --device /dev/sgx_enclave, or give the unit "
            f"DeviceAllow={ENCLAVE_DEVICE} rw and PrivateDevices=no; {CLIENTS_NEED_NONE}",
        )
    if trial.open_errno in (errno.ENXIO, errno.ENODEV):
        return made(
            Status.PROBLEM,
            f"there ({mode}), and no driver stands behind it",
            "mend what the checks before this one name; a node that was made by hand may have a wrong number",
        )
    return made(
        Status.PROBLEM,
        f"there ({mode}), and cannot be opened: {os.strerror(trial.open_errno)}",
        "look at the kernel's log (dmesg)",
    )


def _minor(host: Host) -> str | None:
    for line in (host.text("/proc/misc") or "").splitlines():
        fields = line.split()
        if fields[1:] == ["sgx_enclave"]:
            return fields[0]
    return None


def _not_permitted(host: Host, what: os.stat_result, mode: str) -> tuple[str, str]:
    uid, gids = host.machine.identity()
    groups = ", ".join(host.group_name(gid) for gid in sorted(set(gids)))
    found = f"not permitted: {mode}; this process has uid {uid} and groups {groups}"
    group = host.group_name(what.st_gid)
    if what.st_gid not in gids and what.st_gid != 0 and what.st_mode & 0o060 == 0o060:
        return found, (
            f"put the user into group {group} (usermod -aG {group} USER) and log in again; in a container: "
            f"--group-add {what.st_gid}; {CLIENTS_NEED_NONE}"
        )
    return found, (
        'let udev set it: KERNEL=="sgx_enclave", GROUP="sgx", MODE="0660" in /etc/udev/rules.d/90-sgx.rules, '
        f"then `udevadm trigger`, and put the user into group sgx; {CLIENTS_NEED_NONE}"
    )


def _mount_of(host: Host, name: str) -> tuple[str, list[str]] | None:
    """Return mount point and options of the mount that `name` lies on (the last of the longest counts)."""
    best: tuple[str, list[str]] | None = None
    for line in (host.text("/proc/self/mountinfo") or "").splitlines():
        fields = line.split()
        if len(fields) < 6:
            continue
        point = fields[4]
        covers = name == point or name.startswith(point.rstrip("/") + "/")
        if covers and (best is None or len(point) >= len(best[0])):
            best = (point, fields[5].split(","))
    return best


def check_exec(host: Host) -> Check:
    """Whether pages of the device can be mapped for execution: not when its mount is noexec."""

    def made(status: Status, found: str, advice: str = "") -> Check:
        return _check("device-exec", "executable mappings", status, found, advice)

    if isinstance(host.stat(ENCLAVE_DEVICE), int):
        return made(Status.NOT_APPLICABLE, f"no {ENCLAVE_DEVICE}")
    mount = _mount_of(host, ENCLAVE_DEVICE)
    noexec = mount is not None and "noexec" in mount[1]
    point = mount[0] if mount else "/dev"
    advice = (
        f"mount -o remount,exec {point} (in /etc/fstab for good; in a unit: no NoExecPaths=); "
        "a container: a /dev of its own without noexec, or no device at all, since programs that attach "
        "use the broker's"
    )
    trial = host.machine.try_device(host.path(ENCLAVE_DEVICE))
    if trial.open_errno:
        if noexec:
            return made(
                Status.PROBLEM, f"{point} is mounted noexec: no enclave's code could be mapped", advice
            )
        return made(Status.NOT_APPLICABLE, "the device cannot be opened")
    if trial.map_errno == 0:
        return made(Status.OK, "a page of the device can be mapped for execution")
    if trial.map_errno == errno.EPERM:
        why = f"{point} is mounted noexec" if noexec else f"its mount ({point}) is noexec for this process"
        return made(Status.PROBLEM, f"mapping the device for execution is refused: {why}", advice)
    if trial.map_errno == errno.EACCES:
        personality = int(host.line("/proc/self/personality") or "0", 16)
        if personality & _READ_IMPLIES_EXEC:
            return made(
                Status.PROBLEM,
                "this process runs with READ_IMPLIES_EXEC, with which the driver maps nothing",
                "leave out the call of personality(2) that sets it",
            )
        return made(
            Status.PROBLEM,
            "mapping the device for execution is refused: a security module forbids it",
            "allow it there (SELinux: execute and map on sgx_enclave_dev_t)",
        )
    return made(
        Status.PROBLEM,
        f"mapping the device for execution fails: {os.strerror(trial.map_errno)}",
        "look at the kernel's log (dmesg)",
    )


def check_provision(host: Host) -> Check:
    """Whether enclaves with PROVISIONKEY could be initialised: few want it."""

    def made(status: Status, found: str, advice: str = "") -> Check:
        return _check("provision", PROVISION_DEVICE, status, found, advice)

    only = "needed only for enclaves with PROVISIONKEY, such as those that make quotes"
    what = host.stat(PROVISION_DEVICE)
    if isinstance(what, int):
        if not driver_registered(host):
            return made(Status.NOT_APPLICABLE, "no such node, as the driver is not on")
        return made(
            Status.WARNING, f"no such node; {only}", f"nothing, unless you want them: see {ENCLAVE_DEVICE}"
        )
    error = host.machine.try_open(host.path(PROVISION_DEVICE))
    if not error:
        return made(Status.OK, f"can be opened; {only}")
    return made(
        Status.WARNING,
        f"cannot be opened ({os.strerror(error)}); {only}",
        f"nothing, unless you want them: put the broker's user into group {host.group_name(what.st_gid)}",
    )


def check_vdso(host: Host) -> Check:
    """Whether the vDSO has the function that enters."""
    if host.machine.vdso_enters():
        status, found, advice = Status.OK, "has __vdso_sgx_enter_enclave", ""
    else:
        status = Status.PROBLEM
        found = "has no __vdso_sgx_enter_enclave, so nothing can enter an enclave"
        advice = "boot Linux 5.11 or later with CONFIG_X86_SGX=y"
        if re.search(r"(^|\s)vdso=0(\s|$)", host.text("/proc/cmdline") or ""):
            found, advice = "is switched off by the kernel's command line (vdso=0)", "boot without vdso=0"
        elif _auxv(host, 33) in (None, 0):  # AT_SYSINFO_EHDR
            found = "is not there: this kernel, or what stands for it (a sandbox such as gVisor), gives none"
            advice = "run on the host's kernel itself"
    return _check("vdso", "vDSO", status, found, advice)


def _auxv(host: Host, wanted: int) -> int | None:
    """Return an entry of this process's auxiliary vector."""
    try:
        raw = host.path("/proc/self/auxv").read_bytes()
    except OSError:
        return None
    for key, value in struct.iter_unpack("<QQ", raw[: len(raw) // 16 * 16]):
        if key == wanted:
            return int(value)
    return 0


def check_fsgsbase(host: Host) -> Check:
    """Whether programs may write FS and GS base themselves."""
    flags = _auxv(host, _AT_HWCAP2)
    if flags is None:
        status, found, advice = Status.UNKNOWN, "/proc/self/auxv cannot be read", ""
    elif flags & _HWCAP2_FSGSBASE:
        status, found, advice = Status.OK, "on", ""
    else:
        status = Status.PROBLEM
        found = "off: backend sgx cannot enter without it, and the sim needs a system call more per entry"
        advice = "boot Linux 5.9 or later without nofsgsbase"
        if "nofsgsbase" in (host.text("/proc/cmdline") or "").split():
            advice = "boot without nofsgsbase"
    return _check("fsgsbase", "FSGSBASE", status, found, advice, Group.HOST)
