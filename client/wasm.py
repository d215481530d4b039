"""Compile C to WebAssembly for the functions enclave: `teemate fn build`.

The compiler is Zig's, which is a C compiler (clang) with a C library for WASI in one wheel of PyPI.  It is a
tool for whoever writes functions, so it is looked for when it is needed, and nothing else needs it.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess  # the compiler is called with a list of arguments, never through a shell
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import BuildFailed

__all__ = ["BUILD_SECONDS", "MODULE_BYTES", "STACK_BYTES", "BuiltModule", "build_module", "find_compiler"]

BUILD_SECONDS = 600.0
"""Most compiles take a second; the first one compiles the C library too, and keeps it."""
MODULE_BYTES = 8 << 20
"""What is larger cannot be deployed (FN_MODULE_MAX)."""
STACK_BYTES = 64 << 10
"""The C stack, which lies below the data: what overflows it traps instead of writing over others' bytes."""

_SAID = 32 << 10
"""How much of what the compiler says is told."""
_ENVIRONMENT = ("PATH", "HOME", "XDG_CACHE_HOME", "ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")
_FLAGS = (
    "-target", "wasm32-wasi",
    "-std=gnu17", "-Wall", "-Wextra",
    "-ffp-contract=off",  # the same digits as any other IEEE machine
    "-s",  # names and line tables are most of a small module
    "-Wl,--gc-sections",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModule:
    """A module that was written to `path`; `sha256` in hexadecimal is what the enclave lists it by."""

    path: Path
    size: int
    sha256: str
    said: str
    """Warnings of the compiler."""


def find_compiler() -> Path:
    """Return the ``zig`` of the wheel `ziglang`, or else of PATH.  BuildFailed when there is none."""
    spec = importlib.util.find_spec("ziglang")
    for folder in (spec and spec.submodule_search_locations) or ():
        zig = Path(folder) / "zig"
        if os.access(zig, os.X_OK):
            return zig
    found = shutil.which("zig")
    if found is None:
        raise BuildFailed(
            "there is no compiler for WebAssembly here: `pip install 'teemate[fn]'` or `pip install ziglang`,"
            " or put a zig on PATH",
            {"reason": "compiler"},
        )
    return Path(found)


def build_module(
    sources: Sequence[Path],
    output: Path,
    *,
    small: bool = False,
    stack: int = STACK_BYTES,
    defines: Sequence[str] = (),
    includes: Sequence[Path] = (),
    timeout: float = BUILD_SECONDS,
    environment: Mapping[str, str] = os.environ,
) -> BuiltModule:
    """Compile and link C `sources` to the module `output`, which is replaced when it is finished.

    `small` optimises for size (-Oz), else for speed (-O2).  `stack` is in bytes.  The same sources give
    the same bytes with one version of the compiler.  Raises :class:`~teemate.errors.BuildFailed`, whose
    ``detail`` has a ``reason``: ``compiler`` (there is none), ``source``, ``compile`` (with what it
    ``said``), ``timeout`` or ``size``; OSError when a file cannot be read or written.
    """
    for source in sources:
        if source.suffix != ".c":
            raise BuildFailed(f"{source} is not C (.c)", {"reason": "source", "file": str(source)})
        if not source.is_file():
            raise BuildFailed(f"{source} is not there", {"reason": "source", "file": str(source)})
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(output.parent))
    zig = find_compiler()
    with tempfile.TemporaryDirectory(prefix="teemate-fn-") as name:
        work = Path(name)
        made = work / "module.wasm"
        folders = sorted({str(source.resolve().parent) for source in sources})
        command = [
            str(zig), "cc", *_FLAGS, "-Oz" if small else "-O2", f"-Wl,-z,stack-size={stack}",
            *(f"-D{define}" for define in defines),
            *(f"-I{folder.resolve()}" for folder in includes),
            *(f"-ffile-prefix-map={folder}=." for folder in folders),
            *(str(source.resolve()) for source in sources),
            "-o", str(made),
        ]  # fmt: skip
        said = _run(command, work, timeout, environment)
        size = made.stat().st_size
        if size > MODULE_BYTES:
            raise BuildFailed(
                f"the module has {size} bytes: at most {MODULE_BYTES} are taken",
                {"reason": "size", "bytes": size},
            )
        module = made.read_bytes()
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(module)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return BuiltModule(path=output, size=size, sha256=hashlib.sha256(module).hexdigest(), said=said)


def _run(command: list[str], work: Path, timeout: float, environment: Mapping[str, str]) -> str:
    """Run the compiler and return what it said, with a bound on that and on its time."""
    variables = {name: environment[name] for name in _ENVIRONMENT if name in environment}
    variables |= {"LC_ALL": "C", "TMPDIR": str(work)}
    if not variables.keys() & {"HOME", "XDG_CACHE_HOME", "ZIG_GLOBAL_CACHE_DIR"}:
        variables["ZIG_GLOBAL_CACHE_DIR"] = str(work / "cache")
    with (work / "said").open("w+b") as file:
        process = subprocess.Popen(  # noqa: S603 (a list, no shell)
            command,
            cwd=work,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # it starts linkers, which end with it
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise BuildFailed(
                f"the compiler was not done after {timeout:g} s (--timeout)",
                {"reason": "timeout", "seconds": timeout},
            ) from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        file.seek(0)
        said = file.read(_SAID).decode(errors="replace").strip()
    if status:
        raise BuildFailed(
            f"the compiler failed with status {status}:\n{said}", {"reason": "compile", "said": said}
        )
    return said
