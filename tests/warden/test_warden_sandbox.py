"""What a warden can no longer do."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "native"

# x86-64 numbers (arch/x86/entry/syscalls/syscall_64.tbl).
CALLS = {
    "getpid": 39,
    "clock_gettime": 228,
    "socket": 41,
    "connect": 42,
    "execve": 59,
    "ptrace": 101,
    "open": 2,
    "process_vm_readv": 310,
    "unshare": 272,
    "setuid": 105,
    "ioctl": 16,
    "io_uring_setup": 425,
    "bpf": 321,
    "vfork": 58,
    "memfd_create": 319,
}


@pytest.fixture(scope="module")
def sandboxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that goes into the warden's sandbox and tries something."""
    program = tmp_path_factory.mktemp("sandbox") / "sandboxed"
    subprocess.run(
        [
            *("cc", "-std=gnu17", "-D_GNU_SOURCE", "-Wall", "-Werror", "-pthread"),
            *(f"-I{NATIVE}/include", f"-I{NATIVE}/warden"),
            *(str(HERE / "sandboxed.c"), str(NATIVE / "warden" / "sandbox.c"), "-o", str(program)),
        ],
        check=True,
    )
    return program


def run(program: Path, *arguments: str, fds: str = "3</dev/null") -> subprocess.CompletedProcess[str]:
    """Run it with a descriptor 3, as a warden has one."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" "$@" {fds}', str(program), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["getpid", "clock_gettime"])
def test_a_listed_system_call_comes_back(sandboxed: Path, name: str) -> None:
    assert run(sandboxed, "warden", str(CALLS[name])).returncode == 0
    assert run(sandboxed, "child", str(CALLS[name])).returncode == 0


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"getpid", "clock_gettime"}))
def test_any_other_system_call_kills_the_process(sandboxed: Path, name: str) -> None:
    assert run(sandboxed, "warden", str(CALLS[name])).returncode == -signal.SIGSYS
    assert run(sandboxed, "child", str(CALLS[name])).returncode == -signal.SIGSYS


def test_nothing_can_be_opened_and_asking_does_not_kill(sandboxed: Path) -> None:
    """Libteemate asks for /proc/self/maps when the enclave's range is taken."""
    assert run(sandboxed, "open").returncode == errno.EACCES


def test_the_child_has_fewer_system_calls_than_the_warden(sandboxed: Path) -> None:
    wait4, fork_flags = "61", str(0x1200011)
    assert run(sandboxed, "warden", wait4, "-1").returncode == 0
    assert run(sandboxed, "child", wait4, "-1").returncode == -signal.SIGSYS
    assert run(sandboxed, "child", "56", fork_flags).returncode == -signal.SIGSYS


def test_clone_makes_threads_and_plain_children_but_no_namespaces(sandboxed: Path) -> None:
    assert run(sandboxed, "fork").returncode == 7
    new_user_namespace = str(0x10000000 | signal.SIGCHLD)
    assert run(sandboxed, "warden", "56", new_user_namespace).returncode == -signal.SIGSYS


def test_prctl_can_only_do_what_the_child_needs(sandboxed: Path) -> None:
    pr_set_dumpable = "4"
    assert run(sandboxed, "warden", "157", pr_set_dumpable).returncode == -signal.SIGSYS


def test_it_can_ask_for_processes_but_not_kill_them(sandboxed: Path) -> None:
    kill, ours = "62", str(os.getpid())
    assert run(sandboxed, "warden", kill, ours, "0").returncode == 0
    assert run(sandboxed, "warden", kill, ours, str(int(signal.SIGURG))).returncode == -signal.SIGSYS
    tgkill, prlimit64 = "234", "302"
    assert run(sandboxed, "warden", tgkill, ours, ours).returncode == -signal.SIGSYS
    assert run(sandboxed, "warden", prlimit64, ours).returncode == -signal.SIGSYS


def test_the_32_bit_system_calls_are_no_way_around(sandboxed: Path) -> None:
    x32_getpid = str(0x40000000 + CALLS["getpid"])
    assert run(sandboxed, "warden", x32_getpid).returncode == -signal.SIGSYS


def test_capabilities_privileges_descriptors_and_core_dumps_are_given_up(sandboxed: Path) -> None:
    shown = run(sandboxed, "show", fds="3</dev/null 5</dev/null 9</dev/null").stderr.splitlines()
    told = dict(line.replace("\t", " ").split(":", 1) for line in shown if not line.startswith("open"))
    assert told["Name"].strip() == "teemate-warden"
    assert told["NoNewPrivs"].strip() == "1"
    assert told["core"].strip() == "0"
    for field in ("CapInh", "CapPrm", "CapEff", "CapAmb") + (("CapBnd",) if os.geteuid() == 0 else ()):
        assert int(told[field], 16) == 0, field
    assert [line for line in shown if line.startswith("open")] == ["open: 0", "open: 1", "open: 3"]


def test_without_a_socketpair_it_does_not_start(sandboxed: Path) -> None:
    failed = run(sandboxed, "show", fds="3<&-")
    assert failed.returncode == 2
    assert "descriptors" in failed.stderr


# ---- with storage ----------------------------------------------------------------------------

FOLDER = "3</dev/null 4</tmp 6</tmp"
# Number, and what it is about: a descriptor that the filter looks at, or -1.
FILE_CALLS = {
    "openat2": (437, 4),
    "unlinkat": (263, 4),
    "getdents64": (217, 4),
    "flock": (73, 4),
    "fsync": (74, 4),
    "pwrite64": (18, -1),
    "ftruncate": (77, -1),
    "fdatasync": (75, -1),
}


@pytest.mark.parametrize("name", sorted(FILE_CALLS))
def test_files_are_for_wardens_with_storage_alone(sandboxed: Path, name: str) -> None:
    number, folder = FILE_CALLS[name]
    assert run(sandboxed, "warden", str(number), str(folder), fds=FOLDER).returncode == -signal.SIGSYS
    assert run(sandboxed, "storage", "warden", str(number), str(folder), fds=FOLDER).returncode == 0
    if folder != -1:  # nor by another descriptor, nor by the working directory
        for other in ("3", "-100"):
            tried = run(sandboxed, "storage", "warden", str(number), other, fds=FOLDER)
            assert tried.returncode == -signal.SIGSYS


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"getpid", "clock_gettime"}))
def test_storage_brings_nothing_else(sandboxed: Path, name: str) -> None:
    tried = run(sandboxed, "storage", "warden", str(CALLS[name]), fds=FOLDER)
    assert tried.returncode == -signal.SIGSYS


def test_with_storage_it_keeps_the_folder_and_no_other_descriptor(sandboxed: Path) -> None:
    shown = run(sandboxed, "storage", "show", fds=FOLDER).stderr.splitlines()
    assert [line for line in shown if line.startswith("open")] == [f"open: {n}" for n in (0, 1, 3, 4)]
    failed = run(sandboxed, "storage", "show", fds="3</dev/null 4<&-")
    assert failed.returncode == 2
    assert "descriptors" in failed.stderr


def has_landlock() -> bool:
    """Whether the kernel has it: landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION)."""
    return ctypes.CDLL(None).syscall(444, None, 0, 1) >= 1


def test_no_path_leads_out_of_the_folder(sandboxed: Path, tmp_path: Path) -> None:
    (tmp_path / "inside").write_text("")
    fds = f"3</dev/null 4<'{tmp_path}'"
    assert run(sandboxed, "storage", "outside", "inside", fds=fds).returncode == 0
    if not has_landlock():
        pytest.skip("this kernel has no Landlock: openat2's own flags are what is left")
    for path in ("/etc/passwd", "../../../../../../etc/passwd"):
        assert run(sandboxed, "storage", "outside", path, fds=fds).returncode == errno.EACCES
