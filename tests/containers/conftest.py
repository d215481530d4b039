"""What containers need of the host, and what runs in them."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from elves import kept_builds
from runc import start

from teemate.bench._oci import Root, program_root, python_root, runc_program
from teemate.errors import Unsupported

HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def _containers(roots: Path) -> None:
    """Skip where no container can be made: without runc, without root, or in a container that forbids it."""
    try:
        runc_program()
    except Unsupported as error:
        pytest.skip(error.message)
    root = program_root(roots / "true", Path("/usr/bin/true"))
    with start(root, ["/program"], str(roots / "socket")) as container:
        told = container.output.read()
        status = container.process.wait()
    if status:
        pytest.skip(f"runc makes no containers here: {told.strip()}")


@pytest.fixture(scope="session")
def roots() -> Iterator[Path]:
    """Where root file systems lie: a container's root has to get there, which pytest's folders forbid."""
    with tempfile.TemporaryDirectory(prefix="teemate-roots-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="session")
def python(roots: Path) -> Root:
    """A root file system with Python and the package `teemate`."""
    return python_root(roots / "python")


@pytest.fixture(scope="session")
def bare(roots: Path) -> Root:
    """A root file system with client.c and the libraries that it needs."""
    libraries = Path(str(files("teemate") / "native" / "client"))
    if not libraries.is_dir():
        pytest.skip("needs the C library (libcbor-dev, .ci/apt-packages)")
    return program_root(roots / "bare", _client(libraries, kept_builds() or roots), libraries)


def _client(libraries: Path, folder: Path) -> Path:
    """Compile client.c, unless that was done: it takes long in the emulated machine."""
    source, program = HERE / "client.c", folder / "container-client"
    if program.exists() and program.stat().st_mtime >= source.stat().st_mtime:
        return program
    folder.mkdir(parents=True, exist_ok=True)
    include = libraries.parent / "include"
    flags = ["-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror"]
    own = folder / f"container-client-{os.getpid()}"  # another run may be at it too
    subprocess.run(
        ["cc", *flags, f"-I{include}", str(source), f"-L{libraries}", "-lteemate", "-o", str(own)],
        check=True,
    )
    own.replace(program)
    return program
