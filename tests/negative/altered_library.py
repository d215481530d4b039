"""A pytest plugin: run the tests against a library that has one protection switched off.

``pytest -p altered_library`` with TEEMATE_ALTERED naming the library puts it in the place of
``teemate._native``; images are then built with the same hole (tests/conftest.py asks the library).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "native"


class Library:
    """Builds libteemate and its binding, all but the files that know test builds once."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        assert compiler is not None, "the tests need a C compiler"
        self._folder = folder
        # As native/lib/meson.build has it: handlers run with the enclave's FS, so no stack protector.
        self._command = [compiler, "-std=gnu17", "-O1", "-fPIC", "-fvisibility=hidden", "-D_GNU_SOURCE"]
        self._command += ["-fno-stack-protector", "-DPy_LIMITED_API=0x030b0000"]
        self._command += [f"-I{NATIVE / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
        binding = folder / "_native.c"
        headers = [str(NATIVE / "include" / name) for name in ("sgx_arch.h", "teemate.h")]
        generator = [sys.executable, str(NATIVE / "binding" / "build_binding.py")]
        subprocess.run([*generator, *headers, str(binding)], check=True, capture_output=True)
        sources = sorted(path for path in (NATIVE / "lib").iterdir() if path.suffix in (".c", ".S"))
        self._altered = [path for path in sources if "TEEMATE_TEST_BUILD" in path.read_text()]
        same = [path for path in sources if path not in self._altered]
        subprocess.run([*self._command, "-c", *map(str, [binding, *same])], cwd=folder, check=True)
        self._objects = sorted(folder.glob("*.o"))

    def without(self, protection: str | None) -> Path:
        """Return the module without `protection`, or with all of them."""
        output = self._folder / (protection or "all")
        output.mkdir()
        macros = []
        if protection is not None:
            macros = [f'-DTEEMATE_TEST_BUILD="{protection}"', f"-DTEEMATE_TEST_BUILD_{protection.upper()}"]
        inputs = [*self._altered, *self._objects]
        module = output / "_native.abi3.so"
        command = [*self._command, *macros, "-shared", *map(str, inputs), "-o", str(module)]
        subprocess.run(command, check=True)
        return module


def _substitute(path: str) -> None:
    import teemate

    spec = importlib.util.spec_from_file_location("teemate._native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["teemate._native"] = module
    teemate._native = module  # type: ignore[attr-defined]


if "TEEMATE_ALTERED" in os.environ:
    # Before anything of the package holds functions of the real one.
    assert not any(name.startswith("teemate.") for name in sys.modules)
    _substitute(os.environ["TEEMATE_ALTERED"])
