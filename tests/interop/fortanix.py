"""Fortanix's published tools, built once into the user's cache.

`sgxs-tools` as a whole wants protoc and takes many minutes; sgxs-sign is one file of it that needs
little.  So its crate is only fetched, and a project that is made here names that file where cargo put it,
as published.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

SGXS_TOOLS = "0.9.4"
FETCH = f"""\
[package]
name = "teemate-interop-fetch"
version = "0.0.0"
edition = "2021"

[lib]
path = "nothing.rs"

# Never true: fetched, and not built.
[target.'cfg(any())'.dependencies]
sgxs-tools = "={SGXS_TOOLS}"
"""
BUILD = """\
[package]
name = "teemate-interop"
version = "0.0.0"
edition = "2018"

[[bin]]
name = "sgxs-sign"
path = {sgxs_sign}

[[bin]]
name = "agree"
path = {agree}

[dependencies]
clap = "=2.34.0"
num = "0.2"
openssl = "0.10"
regex = "1"
sgx-isa = "=0.5.0"
sgxs = {{ version = "=0.8.2", features = ["crypto-openssl"] }}

[profile.dev]
debug = false
"""


class MissingError(Exception):
    """Something that the interop test needs is not here; the text says what."""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "teemate" / "interop"


def _download(*arguments: str, cwd: Path) -> str:
    """Run a cargo command that fails only where the registry cannot be reached."""
    command = [_cargo(), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise MissingError(f"cargo cannot fetch Fortanix's crates: {done.stderr.strip()[-400:]}")
    return done.stdout


def _cargo() -> str:
    path = shutil.which("cargo")
    if path is None:
        raise MissingError("cargo is not installed: Fortanix's crates cannot be built")
    return path


def build() -> Path:
    """Return the folder that holds the programs `sgxs-sign` and `agree`.

    Raises MissingError where cargo, its registry or OpenSSL's headers are not there; a program that
    does not compile is an error of the tests (CalledProcessError).
    """
    _cargo()
    agree = Path(__file__).with_name("agree.rs")
    wanted = hashlib.sha256((FETCH + BUILD).encode() + agree.read_bytes()).hexdigest()
    folder = cache_folder()
    programs, stamp = folder / "target" / "debug", folder / "built"
    if stamp.exists() and stamp.read_text() == wanted:
        return programs
    if (
        shutil.which("pkg-config") is None
        or subprocess.run(["pkg-config", "--exists", "openssl"], check=False).returncode
    ):
        raise MissingError("OpenSSL's headers are not installed (libssl-dev, pkg-config)")

    fetch = folder / "fetch"
    fetch.mkdir(parents=True, exist_ok=True)
    (fetch / "Cargo.toml").write_text(FETCH)
    (fetch / "nothing.rs").touch()
    metadata = json.loads(_download("metadata", "--format-version", "1", cwd=fetch))
    manifest = next(
        package["manifest_path"] for package in metadata["packages"] if package["name"] == "sgxs-tools"
    )
    published = Path(manifest).with_name("src") / "bin" / "sgxs-sign.rs"
    # JSON's strings are TOML's.
    manifest = BUILD.format(sgxs_sign=json.dumps(str(published)), agree=json.dumps(str(agree)))
    (folder / "Cargo.toml").write_text(manifest)
    _download("fetch", cwd=folder)
    command = [_cargo(), "build", "--offline", "--quiet", "--target-dir", str(folder / "target"), "-j", "2"]
    subprocess.run(command, cwd=folder, check=True, timeout=600)
    stamp.write_text(wanted)
    return programs
