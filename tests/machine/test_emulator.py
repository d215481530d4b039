"""What the kernel's selftests do not cover of the emulated processor, and of sharing an enclave."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import machine
import pytest
from machine import Machine

SOURCES = machine.HERE / "emulator"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the enclave, its SIGSTRUCTs (no heap, 16 MiB, 16 MiB measured), and the programs."""
    subprocess.run([machine.HERE / "install-packages"], check=True)
    folder = tmp_path_factory.mktemp("emulator")

    def run(*line: str | Path) -> None:
        subprocess.run(line, cwd=SOURCES, check=True)

    enclave = ["-ffreestanding", "-fno-stack-protector", "-fcf-protection=none", "-mgeneral-regs-only"]
    enclave += ["-mfsgsbase", "-fPIE", "-fno-asynchronous-unwind-tables", "-fno-jump-tables"]
    warnings = ["-O1", "-Wall", "-Werror"]
    run("gcc", *warnings, *enclave, "-c", "encl.c", "-o", folder / "encl.o")
    elf, image = folder / "encl.elf", folder / "encl.bin"
    run("ld", "-T", "encl.lds", "-static", "--no-dynamic-linker", "-o", elf, folder / "encl.o")
    run("objcopy", "-O", "binary", "-j", ".text", "-j", ".data", "--pad-to", "0x18000", elf, image)
    run("gcc", *warnings, "sign.c", "-o", folder / "sign", "-lcrypto")
    run("openssl", "genrsa", "-3", "-traditional", "-out", folder / "key.pem", "3072")
    for name, *heap in (("encl", "0", "0"), ("encl16", "0x1000000", "0"), ("encl16m", "0x1000000", "1")):
        run(folder / "sign", image, folder / "key.pem", *heap, folder / f"{name}.sig")
    for name in ("isa", "share", "loss"):
        run("gcc", *warnings, "-static", "-pthread", f"{name}.c", "-o", folder / name, "-lcrypto")
    return folder


def checks(output: str, verdict: str) -> list[str]:
    """The checks that the programs report with this verdict, ``ok`` or ``FAIL``."""
    return re.findall(rf"^{verdict} +(.*)$", output, re.M)


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize(("program", "count"), [("isa", 60), ("share", 40)])
def test_the_emulated_instructions_do_what_the_sdm_says(
    programs: Path, program: str, count: int, cpus: int
) -> None:
    done = machine.run([f"./{program}"], directory=programs, machine=Machine(cpus=cpus))
    assert checks(done.stdout, "FAIL") == [], done.stdout
    assert len(checks(done.stdout, "ok")) >= count, done.stdout
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cpus", [1, 2])
def test_enclaves_are_lost_and_broken_as_linux_has_it(programs: Path, cpus: int) -> None:
    """The C program's checks, and a kernel that takes it without complaint."""
    line = f"./loss {machine.HERE / 'guest' / 'epc'}; dmesg | grep -E 'WARNING|BUG:|Oops' && echo FAIL dmesg"
    done = machine.run(["sh", "-c", line], directory=programs, machine=Machine(cpus=cpus))
    assert checks(done.stdout, "FAIL") == [], done.stdout
    assert len(checks(done.stdout, "ok")) == 25, done.stdout
