"""The engine as it is linked: nothing that an enclave forbids, floats in SSE; and a host without cargo."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from function_enclaves import functions_image

LIBRARY = Path(__file__).parents[2] / "native" / "enclaves" / "functions" / "engine_library.py"
# SDM volume 3D, 34.6.1 and table 34-1: what raises #UD or #GP inside; and what needs more than XFRM = 3.
FORBIDDEN = re.compile(
    r"\b(cpuid|syscall|sysenter|sysret|int|int3|into|in|out|ins[bwl]|outs[bwl]|rdtscp?|rdpmc|rdpid|getsec|vmcall"
    r"|vmfunc|invd|wbinvd|hlt|sgdt|sidt|sldt|str|smsw|l[gi]dt|lldt|ltr|lmsw|clts|cli|sti|iret[dq]?|xgetbv|xsetbv"
    r"|xsave\w*|xrstor\w*|v[a-z]+[ps][sd])\b"
)


@cache
def instructions() -> list[str]:
    """Every instruction of the installed image, without its operands."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    elf = functions_image().with_suffix(".elf")
    command = ["objdump", "-d", "--no-show-raw-insn", str(elf)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^ +[0-9a-f]+:\t(.*)$", text, re.MULTILINE)


def forbidden(lines: list[str]) -> set[str]:
    return {line for line in lines if FORBIDDEN.match(line) or "%ymm" in line or "%zmm" in line}


def test_no_instruction_is_forbidden_in_an_enclave() -> None:
    assert len(instructions()) > 100_000  # the engine is in there
    assert forbidden(instructions()) == set()


@pytest.mark.parametrize("line", ["cpuid", "syscall", "int    $0x80", "vaddpd %ymm0,%ymm1,%ymm2", "rdtsc"])
def test_what_is_forbidden_is_found(line: str) -> None:
    assert forbidden([*instructions()[:10], line]) == {line}


def test_floats_are_computed_by_sse_and_by_no_library() -> None:
    used = {line.split()[0] for line in instructions()}
    assert {"addsd", "mulsd", "divsd", "sqrtsd", "addss", "cvttsd2si", "ucomisd"} <= used
    elf = functions_image().with_suffix(".elf")
    symbols = subprocess.run(["nm", str(elf)], capture_output=True, text=True, check=True).stdout
    assert "engine_run" in symbols
    assert not re.search(r"\b__(add|sub|mul|div)[sd]f3\b", symbols)


def check(path: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "HOME": "/nonexistent", "CARGO_HOME": "/nonexistent"} | more
    command = [sys.executable, str(LIBRARY), "--check"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_host_without_cargo_is_told_what_to_install(tmp_path: Path) -> None:
    done = check(str(tmp_path))
    assert done.returncode == 1
    assert "there is no cargo" in done.stderr
    assert "cargo-web" in done.stderr


def test_a_compiler_that_is_too_old_is_named(tmp_path: Path) -> None:
    for name in ("cargo", "rustc"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho 'release: 1.63.0'\n")
        program.chmod(0o755)
    done = check(os.pathsep.join([str(tmp_path), os.defpath]))
    assert done.returncode == 1
    assert "1.63, too old" in done.stderr
    assert "cargo-web" in done.stderr


def played(folder: Path, *, cargo: str) -> str:
    """A PATH with a compiler that is new enough, and a script in the place of cargo."""
    for name, script in (("cargo", cargo), ("rustc", "echo 'release: 1.90.0'")):
        program = folder / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    return os.pathsep.join([str(folder), os.defpath])


def test_where_cargo_cannot_get_the_crates_it_is_said_what_cargo_says(tmp_path: Path) -> None:
    done = check(played(tmp_path, cargo="echo 'no way to the registry' >&2; exit 101"))
    assert done.returncode == 1
    assert "no way to the registry" in done.stderr


def test_what_would_change_the_code_does_not_reach_cargo(tmp_path: Path) -> None:
    changing = {"CARGO_PROFILE_RELEASE_LTO": "off", "RUSTC_WRAPPER": "wrapper", "CARGO_BUILD_RUSTFLAGS": "-g"}
    told = check(
        played(tmp_path, cargo="env >&2; exit 1"), **changing, RUSTFLAGS="-g", CARGO_NET_OFFLINE="true"
    ).stderr
    assert "CARGO_NET_OFFLINE=true" in told  # how to get crates does
    assert not [name for name in (*changing, "RUSTFLAGS") if name in told]
