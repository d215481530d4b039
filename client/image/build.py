"""Compile an enclave against the SDK, and make an image of the result.

The same sources give the same bytes, whatever the directory, the user, the time and the language
settings: paths are mapped away, the order of objects is fixed, and nothing of the environment
but ``PATH`` reaches the compiler.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import shutil
import subprocess  # the compiler is called with a list of arguments, never through a shell
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ._problem import problem
from .elf import load_elf
from .layout import Layout, LayoutOptions, plan, write

__all__ = ["Built", "SdkPaths", "build_elf", "build_image", "layout_image", "sdk_paths"]


_OBJECTS_KEPT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SdkPaths:
    """Where the SDK for enclave authors lies: `native` has ``sdk/``, ``include/`` and ``lib/``."""

    native: Path

    @property
    def sdk(self) -> Path:
        """Sources, linker script, flags.toml and the template."""
        return self.native / "sdk"

    @property
    def template(self) -> Path:
        """The project that `teemate enclave new` copies."""
        return self.sdk / "template"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flags:
    compile: tuple[str, ...]
    link: tuple[str, ...]
    sources: tuple[str, ...]
    test_build: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A finished image: `sgxs` was written; MRENCLAVE has 32 bytes."""

    sgxs: Path
    layout: Layout
    mrenclave: bytes


def sdk_paths() -> SdkPaths:
    """Find the SDK: beside this package once installed, in the source tree before.

    Raises :class:`~teemate.errors.ImageError` (step ``build``) when it is at neither place.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "native", package.parent / "native")
    for candidate in candidates:
        if (candidate / "sdk" / "flags.toml").is_file():
            return SdkPaths(native=candidate)
    raise problem("build", f"the SDK is not at {' nor '.join(map(str, candidates))}: install TeeMate anew")


def _flags(sdk: SdkPaths) -> _Flags:
    raw = tomllib.loads((sdk.sdk / "flags.toml").read_text(encoding="utf-8"))
    return _Flags(
        compile=tuple(raw["compile"]),
        link=tuple(raw["link"]),
        sources=tuple(raw["sources"]),
        test_build={name: tuple(flags) for name, flags in raw.get("test_build", {}).items()},
    )


def compiler() -> list[str]:
    """The C compiler's command: ``CC``, or cc.  ImageError when there is none."""
    command = shlex.split(os.environ.get("CC", "cc"))
    if not command or shutil.which(command[0]) is None:
        raise problem(
            "build",
            f"there is no C compiler ({' '.join(command) or 'CC is empty'}): install gcc, "
            "or lay out a ready ELF with --elf",
        )
    return command


def build_elf(
    sources: Sequence[Path],
    output: Path,
    *,
    bare: bool = False,
    test_build: str = "",
    defines: Sequence[str] = (),
    includes: Sequence[Path] = (),
    sdk: SdkPaths | None = None,
    archives: Sequence[Path] = (),
    objects_kept: Path | None = None,
) -> None:
    """Compile and link `sources` (C and assembly) to the unstripped ELF `output`.

    With `bare`, the SDK is left out: the sources bring an entry of their own, ``_start``.
    `defines` are ``NAME`` or ``NAME=VALUE``; `archives` are static libraries that the
    sources need.  `test_build` switches one protection off, for tests.
    In the folder `objects_kept` objects stay for the next time that the same compiler is given the same text.
    Raises :class:`~teemate.errors.ImageError` (step ``build``) with what the compiler said.
    """
    sdk = sdk or sdk_paths()
    flags = _flags(sdk)
    if test_build and test_build not in flags.test_build:
        raise problem(
            "build", f"there is no test build {test_build!r}: {', '.join(flags.test_build) or 'none'}"
        )
    for source in sources:
        if source.suffix not in (".c", ".S", ".s"):
            raise problem("build", f"{source} is neither C (.c) nor assembly (.S)", file=str(source))
        if not source.is_file():
            raise problem("build", f"{source} is not there", file=str(source))
    command = compiler()
    native = sdk.native.resolve()
    common = [
        *flags.compile,
        *flags.test_build.get(test_build, ()),
        *(f"-D{name}" for name in defines),
        *(f"-I{path.resolve()}" for path in includes),
        *(f"-I{native / name}" for name in ("sdk", "include", "lib")),
    ]
    files = [source.resolve() for source in sources]
    if not bare:
        files += [(sdk.sdk / name).resolve() for name in flags.sources]
    with tempfile.TemporaryDirectory(prefix="teemate-build-") as name:
        work = Path(name)
        # The number of an object keeps two of one name apart, and the order that of the sources.
        objects = [f"{number:03}-{source.stem}.o" for number, source in enumerate(files)]

        def compile_one(source: Path, target: str) -> None:
            # gcc takes the last map that fits, so the SDK's own sources stay under native/.
            places = ((work, "."), (source.parent, "."), (native, "native"))
            maps = [f"-ffile-prefix-map={old}={new}" for old, new in places]
            step = [*command, *common, *maps, "-c", str(source), "-o", target]
            if objects_kept is None:
                _run(step, work)
            else:
                _compile_kept(step, work, objects_kept, places)

        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            list(pool.map(compile_one, files, objects))
        link = [flag for flag in flags.link if not (bare and flag.startswith("-Wl,--orphan-handling"))]
        script = [] if bare else [f"-Wl,-T,{native / 'sdk' / 'enclave.lds'}"]
        # libgcc: what the compiler calls for 128-bit arithmetic and the like; it is freestanding.
        libraries = [str(archive.resolve()) for archive in archives]
        _run([*command, *link, *script, *objects, *libraries, "-lgcc", "-o", "out.elf"], work)
        with _replacing(output) as file:
            shutil.copyfile(work / "out.elf", file)


def _compile_kept(step: list[str], work: Path, folder: Path, places: Sequence[tuple[Path, str]]) -> None:
    """Do `step`, which compiles to its last word, or take the object that it made the last time.

    Paths are mapped to the names in `places`, in the object as in what it is known by; its text shows macros.
    """
    target = work / step[-1]
    text = target.with_suffix(".i")
    place = step.index("-c")
    _run([*step[:place], "-E", "-fno-working-directory", *step[place + 1 : -1], str(text)], work)
    version = subprocess.run([*compiler(), "-v"], capture_output=True, check=False).stderr  # noqa: S603
    known = (
        "\0".join(word for word in step[:place] if "-map=" not in word and word[:2] != "-D").encode()
        + text.read_bytes()
    )
    for old, new in reversed(places):
        known = known.replace(str(old).encode(), new.encode())
    kept = folder / f"{hashlib.sha256(version + known).hexdigest()[:32]}.o"
    try:
        os.utime(kept)  # the next one that goes is another
        shutil.copyfile(kept, target)
    except FileNotFoundError:
        _run(step, work)
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing(kept) as new_object:
            shutil.copyfile(target, new_object)
        for old_object in sorted(folder.glob("*.o"), key=_used)[:-_OBJECTS_KEPT]:
            old_object.unlink(missing_ok=True)


def _used(kept: Path) -> float:
    """When it was used last; another build may take it away at any time."""
    try:
        return kept.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _run(command: list[str], work: Path) -> None:
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C",
        "SOURCE_DATE_EPOCH": "0",
        "TMPDIR": str(work),
    }
    done = subprocess.run(  # noqa: S603 (a list, no shell)
        command,
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise problem("build", f"{command[0]} failed with status {done.returncode}:\n{said}", compiler=said)


class _replacing:  # noqa: N801 (used as a function)
    """``with _replacing(path) as temporary``: what is written there takes the place of `path` at the end.

    So a file is there whole or not at all, also for programs that have the old one mapped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        if not self._path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(self._path.parent))
        return self._temporary

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        if kind is None:
            self._temporary.replace(self._path)
        else:
            with suppress(FileNotFoundError):
                self._temporary.unlink()


def layout_image(elf: Path, output: Path, options: LayoutOptions) -> Built:
    """Make the SGXS file `output` of a ready ELF; needs no compiler.

    Raises :class:`~teemate.errors.ImageError` (step ``elf`` or ``layout``), OSError when a file cannot be
    read or written.  `output` is replaced when it is finished, not before.
    """
    layout = plan(load_elf(elf), options)
    with _replacing(output) as temporary:
        with temporary.open("wb") as stream:
            mrenclave = write(layout, stream)
    return Built(sgxs=output, layout=layout, mrenclave=mrenclave)


def build_image(
    sources: Sequence[Path],
    output: Path,
    options: LayoutOptions,
    *,
    bare: bool = False,
    test_build: str = "",
    defines: Sequence[str] = (),
    includes: Sequence[Path] = (),
) -> Built:
    """Compile `sources` and lay them out: writes `output`, ``x.sgxs``, and beside it ``x.elf``."""
    elf = output.with_suffix(".elf")
    build_elf(sources, elf, bare=bare, test_build=test_build, defines=defines, includes=includes)
    return layout_image(elf, output, options)
