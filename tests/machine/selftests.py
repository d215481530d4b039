"""The kernel's own SGX selftests, built from Debian's source package of the kernel that the machine runs.

``kernel_source()`` is what other tests need too, which use the selftests' enclave (test_encl.elf).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from machine import HERE, cache

PACKAGE = "linux-source-6.1"
FOLDERS = ("tools/testing/selftests", "tools/include", "arch/x86/include")


def kernel_source() -> Path:
    """The kernel's source tree, as far as the selftests need it: FOLDERS.  In the cache; 140 MB to download.

    The first call takes about half a minute, and installs the packages that building the selftests needs.
    """
    tree = cache() / PACKAGE
    with (cache() / "lock-source").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.exists():
            subprocess.run([HERE / "install-packages"], check=True)
            _extract(tree)
    return tree


def _extract(tree: Path) -> None:
    """Download the package and unpack FOLDERS; `tree` gets its name when it is whole."""
    work = tree.with_name("work-source")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    download = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", PACKAGE]
    if subprocess.run(download, cwd=work, check=False).returncode != 0:
        # A new system has no lists of packages yet.
        subprocess.run(["apt-get", "-qq", "update"], check=True)
        subprocess.run(download, cwd=work, check=True)
    (package,) = work.glob("*.deb")
    members = [f"{PACKAGE}/{folder}" for folder in FOLDERS]
    pipeline = (
        'dpkg-deb --fsys-tarfile "$1" | tar -xO "./usr/src/$2.tar.xz" |'
        ' { folder=$3; shift 3; tar -xJ -C "$folder" "$@"; }'
    )
    shell = ["bash", "-euo", "pipefail", "-c", pipeline, "extract"]
    subprocess.run([*shell, str(package), PACKAGE, str(work), *members], check=True)
    (work / PACKAGE).rename(tree)
    shutil.rmtree(work)


def build(folder: Path, *, retry: bool) -> Path:
    """Build the selftests, unmodified: ``test_sgx``, and the enclave ``test_encl.elf`` beside it.

    :param retry: with an ioctl() that goes on after EAGAIN and EBUSY (retry.c says why).
    """
    source = kernel_source()
    tests = source / "tools/testing/selftests/sgx"
    include = f"-I{source / 'tools/include'}"

    def gcc(*arguments: str | os.PathLike[str]) -> None:
        # -w: compilers have learnt to warn about more since.
        subprocess.run(["gcc", "-w", include, *arguments], cwd=tests, check=True)

    objects = []
    for name in ("main.c", "load.c", "sigstruct.c", "call.S", "sign_key.S"):
        output = folder / f"{name}.o"
        rename = ["-Dioctl=ioctl_retry"] if retry and name == "main.c" else []
        gcc("-O1", "-fPIC", *rename, "-c", name, "-o", output)
        objects.append(output)
    if retry:
        gcc("-O1", "-c", HERE / "emulator/retry.c", "-o", folder / "retry.o")
        objects.append(folder / "retry.o")
    gcc("-static", "-z", "noexecstack", "-o", folder / "test_sgx", *objects, "-lcrypto")
    # As their Makefile does it
    flags = ("-static", "-nostdlib", "-nostartfiles", "-fPIC", "-fno-stack-protector", "-mrdrnd")
    linking = ("-T", "test_encl.lds", "-Wl,--build-id=none,-z,noexecstack")
    enclave = folder / "test_encl.elf"
    gcc(*flags, *linking, "test_encl.c", "test_encl_bootstrap.S", "-o", enclave)
    return folder / "test_sgx"
