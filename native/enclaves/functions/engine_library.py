# SPDX-License-Identifier: Apache-2.0
"""Compile the WebAssembly engine of the functions enclave, which is Rust, and keep what comes out.

Usage: engine_library.py            prints the static library, which it makes unless it is kept
       engine_library.py --check    says with its status, and in words, whether it can be made

cargo gets the crates that Cargo.lock pins, from wherever it is set up to look, compares their hashes, and
keeps them in its own cache; none is in this repository.  The library is kept in $XDG_CACHE_HOME/teemate
(~/.cache/teemate) by what it was made of.

What comes out depends on the sources and on rustc alone (`rustc -vV` of who wants the same MRENCLAVE has to
say the same): not on folders, nor on how cargo is set up by the environment.

The target is x86_64-unknown-linux-gnu, for its ready-made `core` and `alloc`: they compute floats with SSE2
and pass them in registers, as System V's ABI has it; what is compiled here may use SSE4.1, as the SDK may.
(x86_64-unknown-none has soft floats.)  Nothing of Linux or libc is linked; the code is position independent,
and chooses nothing at run time by what the processor has, since CPUID does not exist in an enclave.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CRATE = Path(__file__).resolve().parent / "engine"
TARGET = "x86_64-unknown-linux-gnu"
FEATURES = "-C target-cpu=x86-64 -C target-feature=+sse3,+ssse3,+sse4.1"
FLAGS = f"-C relocation-model=pic {FEATURES} -C force-unwind-tables=no"
# The curve by integers alone: its other backends ask the processor, by CPUID, what it has.
FLAGS += ' --cfg curve25519_dalek_backend="serial"'
NAME = "libteemate_functions.a"
OLDEST = (1, 86)  # wasmi's
# What of the environment changes what is compiled, or by whom; where cargo looks for crates does not.
CHANGING = ("CARGO_BUILD_", "CARGO_ENCODED_", "CARGO_PROFILE_", "CARGO_TARGET_", "RUSTC", "RUSTFLAGS")


class EngineMissingError(Exception):
    """The engine cannot be compiled here; says why, and what to do."""


def _cargo() -> tuple[str, bytes]:
    """Return cargo's path, and what its compiler says of itself."""
    advice = "install cargo 1.86 or newer (Debian 12: apt install cargo-web; elsewhere: rustup)"
    home = os.environ.get("CARGO_HOME") or str(Path.home() / ".cargo")
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(home) / "bin")])
    cargo, rustc = (shutil.which(program, path=places) for program in ("cargo", "rustc"))
    if cargo is None or rustc is None:
        raise EngineMissingError(f"there is no {'cargo' if cargo is None else 'rustc'}: {advice}")
    done = subprocess.run([rustc, "-vV"], capture_output=True, check=False)  # noqa: S603 (a list, no shell)
    found = re.search(rb"^release: (\d+)\.(\d+)", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise EngineMissingError(f"{rustc} does not say its version: {advice}")
    if (int(found[1]), int(found[2])) < OLDEST:
        raise EngineMissingError(f"{rustc} is {found[1].decode()}.{found[2].decode()}, too old: {advice}")
    return cargo, done.stdout


def _sources() -> list[Path]:
    return [CRATE / "Cargo.toml", CRATE / "Cargo.lock", *sorted(CRATE.glob("*/*.*"))]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(CHANGING)}
    return kept | {"CARGO_TERM_COLOR": "never"}


def _run(command: list[str], environment: dict[str, str]) -> str:
    command += ["--locked", "--manifest-path", str(CRATE / "Cargo.toml")]
    done = subprocess.run(  # noqa: S603 (a list, no shell)
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip() or f"status {done.returncode}"
        raise EngineMissingError(f"cargo could not {command[1]} it: {said}")
    return done.stdout


def _crates(cargo: str) -> list[Path]:
    """Return where the crates lie, which cargo gets unless it has them."""
    command = [cargo, "metadata", "--quiet", "--format-version=1", f"--filter-platform={TARGET}"]
    packages = json.loads(_run(command, _environment()))["packages"]
    return sorted(Path(package["manifest_path"]).parent for package in packages)


def check() -> None:
    """Raise an error that says why when the library is not kept and cannot be made."""
    cargo, version = _cargo()
    if not _kept(version).is_file():
        _crates(cargo)


def _kept(version: bytes) -> Path:
    text = b"\0".join([version, FLAGS.encode(), *(source.read_bytes() for source in _sources())])
    base = Path(os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")) / "teemate"
    return base / f"functions-engine-{hashlib.sha256(text).hexdigest()[:16]}" / NAME


def engine_library() -> Path:
    """Return the static library, which is made unless it is kept."""
    cargo, version = _cargo()
    library = _kept(version)
    folder = library.parent
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who builds at the same time waits, and finds it
        if not library.is_file():
            _build(cargo, folder, library)
    return library


def _build(cargo: str, folder: Path, library: Path) -> None:
    work = folder / f".build.{os.getpid()}"
    # Neither where crates are kept nor where this lies gets into the image.
    flags = [*FLAGS.split(), *(f"--remap-path-prefix={path}={path.name}" for path in _crates(cargo))]
    environment = _environment() | {"CARGO_ENCODED_RUSTFLAGS": "\x1f".join(flags)}
    command = [cargo, "build", "--quiet", "--release", "--target", TARGET, "--target-dir", str(work)]
    try:
        _run(command, environment)
        (work / TARGET / "release" / NAME).replace(library)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["--check"]:
            check()
        else:
            print(engine_library())
    except EngineMissingError as missing:
        raise SystemExit(str(missing)) from missing
