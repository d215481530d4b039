# SPDX-License-Identifier: Apache-2.0
"""Get SQLite's source, which is not in this repository, when the database enclave is built.

Usage: sqlite_source.py    prints the folder with sqlite3_amalgamation.c and sqlite3_interface.h

The sdist of apsw-sqlite3mc on PyPI carries SQLite's amalgamation.  pip gets it, from wherever pip is set
up to look, and compares its SHA-256; what is cut out of it is compared again, so that a damaged cache is
found.  No code of the sdist runs: pip asks a source package for its metadata by calling its build
backend, and finds one of ours, which knows them.

What was got is kept in $XDG_CACHE_HOME/teemate (~/.cache/teemate), and found there by later builds.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE, VERSION = "apsw-sqlite3mc", "3.54.0.0"
SDIST_SHA256 = "60a021cd9f6c8f3e2aa6cb54e197cb344379d5eb9a688b7647a136fc24956db4"
SOURCE_SHA256 = "4ba3f50a5731035460058fd298b0fbe90728a28c48133976cbb4fa7c6ec392b1"
AMALGAMATION = "sqlite3_amalgamation.c"
INTERFACE = "sqlite3_interface.h"

_BACKEND = f'''
import pathlib

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder) / "{PACKAGE.replace("-", "_")}-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {PACKAGE}\\nVersion: {VERSION}\\n")
    return info.name
'''


class SourceMissingError(Exception):
    """SQLite's source is neither kept nor to be had; says why."""


def sqlite_source() -> Path:
    """Return the folder with the two files, which it gets unless they are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "teemate" / f"sqlite-{SOURCE_SHA256[:16]}"
    if _digest(folder) == SOURCE_SHA256:
        return folder
    with tempfile.TemporaryDirectory(prefix="teemate-sqlite-") as name:
        amalgamation, interface = _cut(_download(Path(name)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in ((AMALGAMATION, amalgamation), (INTERFACE, interface)):
            new = folder / f".{file}.{os.getpid()}"
            new.write_bytes(text)
            new.replace(folder / file)
    except OSError as error:
        raise SourceMissingError(f"it cannot be kept: {error}") from error
    found = _digest(folder)
    if found != SOURCE_SHA256:
        raise SourceMissingError(
            f"what was cut out of {PACKAGE} {VERSION} has SHA-256 {found}: not as expected"
        )
    return folder


def _digest(folder: Path) -> str | None:
    try:
        texts = [(folder / name).read_bytes() for name in (AMALGAMATION, INTERFACE)]
    except OSError:
        return None
    return hashlib.sha256(b"".join(hashlib.sha256(text).digest() for text in texts)).hexdigest()


def _download(work: Path) -> bytes:
    backend = work / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(_BACKEND)
    requirements = work / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
    # A build's own isolated environment has no pip: the interpreter's is meant.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONNOUSERSITE"}
    environment["PYTHONPATH"] = str(backend.parent)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--require-hashes"]
    command += ["--dest", str(work / "got"), "--requirement", str(requirements)]
    done = subprocess.run(  # noqa: S603 (a list, no shell)
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"status {done.returncode}"
        raise SourceMissingError(f"pip could not get {PACKAGE} {VERSION}: {said}")
    (sdist,) = (work / "got").iterdir()
    with tarfile.open(sdist) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith("/sqlite3/sqlite3.c"))
        file = archive.extractfile(member)
        assert file is not None
        return file.read()


def _cut(text: bytes) -> tuple[bytes, bytes]:
    """Leave the cipher extension out, and let local.h say where global variables go."""
    source = _between(
        text,
        b'/*** Begin of #include "sqlite3patched.c" ***/',
        b'/*** End of #include "sqlite3patched.c" ***/',
    )
    source, count = re.subn(rb"( *)#define SQLITE_WSD const\n", rb"", source)
    if count != 1:
        raise SourceMissingError("the amalgamation does not say where its global variables go")
    # Another's source: the warnings that ours are compiled with are not meant for it.
    interface = _between(
        source,
        b"/************** Begin file sqlite3.h *",
        b"/******** Begin file sqlite3rtree.h *",
    )
    # Variables are declared there as the amalgamation defines them, in every object that includes it.
    interface = re.sub(
        rb"\nSQLITE_API (?:const )?char \*?sqlite3_(?:version|temp_directory|data_directory)\b[^;]*;",
        rb"",
        interface,
    )
    return b"#pragma GCC system_header\n" + source, b"#pragma GCC system_header\n/*" + interface + b"#endif\n"


def _between(text: bytes, start: bytes, end: bytes) -> bytes:
    begin = text.find(start)
    stop = text.find(end, begin)
    if begin < 0 or stop < 0:
        raise SourceMissingError(f"the amalgamation has no {start.decode()}")
    return text[begin + len(start) : stop]


if __name__ == "__main__":
    try:
        print(sqlite_source())
    except SourceMissingError as missing:
        raise SystemExit(str(missing)) from missing
