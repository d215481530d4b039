"""The emulated SGX machine, from the host's side: boot it, run one command in it, get its output.

The guest sees the host's file system as it is (9p, read-only) with a tmpfs above it (overlayfs), so that
the virtual environment, build folders and work trees lie at their usual paths; what the guest writes is
gone with it, except below the folders that are shared for writing.  ``/dev``, ``/proc``, ``/sys`` and
``/run`` are the guest's own.  It has Debian's unmodified kernel with its SGX driver, and no network.

Only the standard library is used: ``run`` works with any Python 3.11.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import tsc
from post_mortem import post_mortem

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent

SYSTEMD = Path("/lib/systemd/systemd")
TIME_LIMIT = 124
"""Exit status when the command was not done within the time limit (as timeout(1) has it)."""
NO_MACHINE = 125
"""Exit status when there is no machine to run the command in, for a reason that was printed."""
_BOOT_LIMIT = 75
"""Seconds until the guest's first process runs; with the host to itself it takes two or three."""
_BOOTS = 3
"""About one boot in a hundred stands still in the kernel, processors busy, before anything of ours runs."""

# Order matters: each one needs those before it.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "netfs",
    "fscache",
    "9pnet",
    "9pnet_virtio",
    "9p",
    "overlay",
    "msr",
)

KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check cryptomgr.notests nowatchdog"
    " init_on_alloc=0 audit=0 apparmor=0 rdinit=/init"
)


class NoMachineError(Exception):
    """There is no machine: it cannot be built, or it ended before the command did.  The text says why."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the emulated machine is like.  Sizes are QEMU's: a number with the suffix K, M or G."""

    epc: str = "64M"
    memory: str = "2G"
    cpus: int = 1
    """One does the same work in two thirds of the time; what races wants two."""
    processor: tuple[str, ...] = ()
    """Properties of the processor: ``sgx2=off``, ``sgxlc=off`` (no flexible launch control), ``sgx=off``."""
    kernel_arguments: str = ""
    systemd: bool = False
    """The host's systemd is process 1 in there, and the command one of its services."""
    verbose: bool = False
    """Copy the kernel's messages to standard error."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What runs in the machine, and with what.  The guest sees nothing of the host's environment but this."""

    arguments: tuple[str, ...]
    directory: Path = field(default_factory=Path.cwd)
    environment: Mapping[str, str] = field(default_factory=dict)
    venv: Path | None = None
    """A virtual environment whose ``bin`` is to be the first in PATH."""
    shares: tuple[Path, ...] = ()
    """Folders that the guest may write to."""
    user: str = "root"
    """``root``, or ``user``: uid and gid 1000, no capabilities, home /home/user."""


def default_venv() -> Path | None:
    """The virtual environment in use: ``$VIRTUAL_ENV``, else the project's ``.venv``, else this Python's."""
    if "VIRTUAL_ENV" in os.environ:
        return Path(os.environ["VIRTUAL_ENV"])
    if (PROJECT / ".venv").is_dir():
        return PROJECT / ".venv"
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix)
    return None


def _editable_loaders(venv: Path) -> list[Path]:
    """Bring an editable installation up to date here; returns its loaders, which the guest must keep from it.

    Where the project is installed as editable, importing it runs ninja: on an emulated processor that takes
    minutes, and its result would be gone with the guest.
    """
    loaders = list(venv.glob("lib/python3*/site-packages/_*_editable_loader.py"))
    for loader in loaders:
        name = loader.name.removeprefix("_").removesuffix("_editable_loader.py")
        done = subprocess.run(
            [venv / "bin" / "python", "-c", f"import {name}"],
            env=os.environ | {"PATH": f"{venv / 'bin'}:{os.environ.get('PATH', os.defpath)}"},
            stdout=sys.stderr.fileno(),
            check=False,
        )
        if done.returncode != 0:
            raise NoMachineError(f"{name}, which {venv} has as editable, cannot be imported here (see above)")
    return loaders


def cache() -> Path:
    """The folder in which everything that was built or downloaded is kept; it can be deleted at any time."""
    path = Path(os.environ.get("TEEMATE_MACHINE_CACHE") or Path.home() / ".cache" / "teemate-sgx-machine")
    path.mkdir(parents=True, exist_ok=True)
    return path


def build() -> tuple[Path, Path]:
    """Build what is not in the cache yet; returns the folders of the QEMU and of the kernel."""
    done = subprocess.run([HERE / "build"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise NoMachineError("the machine cannot be built (see above)")
    qemu, kernel = done.stdout.splitlines()
    # For work on the patches (edit-patches)
    qemu = os.environ.get("TEEMATE_MACHINE_QEMU", qemu)
    return Path(qemu), Path(kernel)


def _cpio(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """An initramfs (cpio, format "newc": Documentation/driver-api/early-userspace/buffer-format.rst)."""
    archive = bytearray()
    entries = [*files.items(), ("TRAILER!!!", (0, b""))]
    for number, (name, (mode, data)) in enumerate(entries, 1):
        links = 2 if mode & 0o170000 == 0o040000 else 1
        path = name.encode() + b"\0"
        words = (number, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(path), 0)
        archive += b"070701" + b"".join(b"%08X" % word for word in words) + path
        archive += bytes(-len(archive) % 4)
        archive += data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _initramfs(command: Command, qemu: Path, kernel: Path, *, systemd: bool) -> bytes:
    """busybox, the modules, init, and the command as shell text for it."""
    path = os.environ.get("PATH", os.defpath)
    environment = {
        "HOME": "/root" if command.user == "root" else "/home/user",
        "LANG": "C.UTF-8",
        "PATH": f"{path}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "TERM": "dumb",
        "TEEMATE_IN_MACHINE": "1",
    }
    if command.venv is not None:
        environment["VIRTUAL_ENV"] = str(command.venv)
        environment["PATH"] = f"{command.venv}/bin:{environment['PATH']}"
    environment |= command.environment
    loaders = _editable_loaders(command.venv) if command.venv else []
    settings = [
        f"loaders={shlex.quote(' '.join(map(str, loaders)))}",
        f"user={shlex.quote(command.user)}",
        f"systemd={'yes' if systemd else ''}",
        f"modules={shlex.quote(' '.join(MODULES))}",
        f"shares={shlex.quote(chr(10).join(map(str, command.shares)))}",
    ]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    script = [
        *exports,
        f"cd {shlex.quote(str(command.directory))} || exit {NO_MACHINE}",
        f"exec {shlex.join(command.arguments)}",
    ]
    files = {
        "bin": (0o040755, b""),
        "bin/busybox": (0o100755, (qemu / "busybox").read_bytes()),
        "init": (0o100755, (HERE / "guest" / "init").read_bytes()),
        "systemd": (0o100644, (HERE / "guest" / "systemd").read_bytes()),
        "settings": (0o100644, "\n".join(settings).encode() + b"\n"),
        "command": (0o100644, "\n".join(script).encode() + b"\n"),
    }
    for name in MODULES:
        files[f"{name}.ko"] = (0o100644, (kernel / f"{name}.ko").read_bytes())
    return _cpio(files)


def _qemu(
    machine: Machine, command: Command, *, qemu: Path, kernel: Path, files: Path, output: int, errors: int
) -> list[str]:
    """The command line of QEMU.  Serial ports: console, standard output, exit status, standard error.

    ``output`` and ``errors`` are descriptors that it inherits, the same one where the order matters.
    """
    # Without ERMS and FSRM kernel and libc copy and clear by words: TCG does REP MOVSB byte by byte.
    model = "max,vendor=GenuineIntel,family=6,model=106,stepping=6,erms=off,fsrm=off"
    processor = ",".join((model, *machine.processor))
    line = [str(qemu / "qemu-system-x86_64"), "-L", str(qemu / "pc-bios")]
    line += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", "tcg,thread=multi"]
    line += ["-cpu", processor, "-smp", str(machine.cpus), "-m", machine.memory]
    line += ["-object", f"memory-backend-ram,id=ram,size={machine.memory}", "-numa", "node,memdev=ram"]
    if "sgx=off" in machine.processor:
        line += ["-machine", "q35"]
    else:
        line += ["-machine", "q35,sgx-epc.0.memdev=epc,sgx-epc.0.node=0"]
        line += ["-object", f"memory-backend-epc,id=epc,size={machine.epc}"]
    line += ["-kernel", str(kernel / "vmlinuz"), "-initrd", str(files / "initramfs")]
    systemd = "systemd.show_status=false" if machine.systemd else ""
    khz = tsc.frequency()
    clock = f"tsc_early_khz={khz}" if khz else ""
    line += ["-append", f"{KERNEL_ARGUMENTS} {clock} {systemd} {machine.kernel_arguments}"]
    line += ["-add-fd", f"fd={output},set=1", "-chardev", "file,id=output,path=/dev/fdset/1,append=on"]
    if errors != output:
        line += ["-add-fd", f"fd={errors},set=2"]
    line += ["-chardev", f"file,id=errors,path=/dev/fdset/{2 if errors != output else 1},append=on"]
    line += ["-serial", f"file:{files / 'console'}", "-serial", "chardev:output"]
    line += ["-serial", f"file:{files / 'status'}", "-serial", "chardev:errors"]
    # Host and guest agree on inode numbers of several file systems only when these are mapped.
    line += ["-fsdev", "local,id=host,path=/,security_model=none,multidevs=remap,readonly=on"]
    line += ["-device", "virtio-9p-pci,fsdev=host,mount_tag=host"]
    line += ["-monitor", f"unix:{files / 'monitor'},server=on,wait=off"]
    for number, share in enumerate(command.shares):
        line += ["-fsdev", f"local,id=share{number},path={share},security_model=none,multidevs=remap"]
        line += ["-device", f"virtio-9p-pci,fsdev=share{number},mount_tag=share{number}"]
    return line


@contextlib.contextmanager
def _following(path: Path, *, copy: bool) -> Iterator[None]:
    """Copy a growing file to standard error meanwhile."""
    if not copy:
        yield
        return
    with subprocess.Popen(["tail", "-f", "-n", "+1", str(path)], stdout=sys.stderr.fileno()) as tail:
        try:
            yield
        finally:
            tail.terminate()


@contextlib.contextmanager
def _pipe(destination: int) -> Iterator[int]:
    """A pipe whose content is copied to a file as it comes: QEMU wants a descriptor that is for writing only.

    The writing end is closed, and everything was copied, when the block has been left.
    """

    def copy() -> None:
        while data := os.read(reading, 65536):
            while data:
                data = data[os.write(destination, data) :]

    reading, writing = os.pipe()
    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield writing
    finally:
        os.close(writing)
        thread.join()
        os.close(reading)


def run(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    machine: Machine | None = None,
    timeout: float = 300,
    directory: Path | None = None,
    env: Mapping[str, str] | None = None,
    venv: Path | None = None,
    shares: Sequence[Path] = (),
    user: str = "root",
) -> subprocess.CompletedProcess[str]:
    """Boot, run one command, and return what it printed and its exit status.

    :param timeout: seconds for all of it, without building; ``returncode`` is TIME_LIMIT after it.
    :param venv: first in the command's PATH; the default is the one in use.
    :raises NoMachineError: where there is no machine, or it ended early.
    """
    command = Command(
        arguments=tuple(os.fspath(argument) for argument in arguments),
        directory=directory or Path.cwd(),
        environment=dict(env or {}),
        venv=venv or default_venv(),
        shares=tuple(shares),
        user=user,
    )
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        status = boot(command, machine or Machine(), timeout=timeout, output=output, errors=errors)
        texts = []
        for stream in (output, errors):
            stream.seek(0)
            texts.append(stream.read().decode(errors="backslashreplace"))
    return subprocess.CompletedProcess(command.arguments, status, *texts)


def _comes_up(process: subprocess.Popen[bytes], status: Path) -> bool:
    """Whether the guest's first process runs, or QEMU ends, before the time for it is over."""
    end = time.monotonic() + _BOOT_LIMIT
    while time.monotonic() < end:
        if process.poll() is not None or (status.exists() and status.read_bytes()):
            return True
        time.sleep(0.1)
    return False


def boot(command: Command, machine: Machine, *, timeout: float, output: BinaryIO, errors: BinaryIO) -> int:
    """Boot the machine and run a command in it; what it prints goes to two files as it comes.

    Returns the command's exit status, or TIME_LIMIT.  Raises NoMachineError.
    """
    if machine.systemd and not SYSTEMD.exists():
        raise NoMachineError(f"systemd cannot run in it: this host has no {SYSTEMD} (Debian: systemd)")
    qemu, kernel = build()
    with tempfile.TemporaryDirectory(prefix="teemate-machine-") as folder:
        files = Path(folder)
        (files / "initramfs").write_bytes(_initramfs(command, qemu, kernel, systemd=machine.systemd))
        console, status = files / "console", files / "status"
        console.touch()
        with contextlib.ExitStack() as stack:
            pipes = [stack.enter_context(_pipe(output.fileno()))]
            # One for both where they are one file, so that the order is kept.
            if not os.path.sameopenfile(output.fileno(), errors.fileno()):
                pipes.append(stack.enter_context(_pipe(errors.fileno())))
            line = _qemu(
                machine, command, qemu=qemu, kernel=kernel, files=files, output=pipes[0], errors=pipes[-1]
            )
            # timeout(1) ends QEMU in any case, and at once if this process is killed.
            bound = ["setpriv", "--pdeathsig", "TERM", "timeout", "--kill-after=5", str(timeout + 60)]
            stack.enter_context(_following(console, copy=machine.verbose))
            for attempt in range(1, _BOOTS + 1):
                status.unlink(missing_ok=True)
                end = time.monotonic() + timeout
                with subprocess.Popen([*bound, *line], stdin=subprocess.DEVNULL, pass_fds=pipes) as process:
                    try:
                        if attempt < _BOOTS and not _comes_up(process, status):
                            text = post_mortem(files / "monitor", console)
                            print(
                                f"sgx-machine: not up within {_BOOT_LIMIT} s, booted again\n{text}",
                                file=sys.stderr,
                            )
                            continue
                        ended = process.wait(max(end - time.monotonic(), 0))
                    except subprocess.TimeoutExpired:
                        ended = TIME_LIMIT
                        text = post_mortem(files / "monitor", console)
                        print(f"sgx-machine: not done within {timeout:g} s\n{text}", file=sys.stderr)
                    finally:
                        if process.poll() is None:
                            process.terminate()
                break
        words = status.read_text().split() if status.exists() else []
        if len(words) > 1:
            return int(words[-1])
        if ended in (TIME_LIMIT, 128 + 9, -9):
            return TIME_LIMIT
        last = "\n".join(console.read_text(errors="backslashreplace").splitlines()[-20:])
        raise NoMachineError(f"the machine ended early (QEMU's exit status {ended}); it said last:\n{last}")
