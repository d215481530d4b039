from __future__ import annotations

import os
import shutil
from pathlib import Path

import layout
import pytest
from backends import BACKEND
from sim_programs import HARNESS, PROGRAMS, Toolchain


@pytest.fixture(scope="session")
def toolchain(tmp_path_factory: pytest.TempPathFactory) -> Toolchain:
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "the tests need a C compiler"
    tools = Toolchain(compiler=compiler, directory=tmp_path_factory.mktemp("sim"))
    tools.library()
    if BACKEND == "sgx":
        sigstruct = tools.directory / "sigstruct"
        sigstruct.write_bytes(layout.sigstruct())
        os.environ["TEEMATE_TEST_SIGSTRUCT"] = str(sigstruct)
    return tools


@pytest.fixture(scope="session")
def sim_tests(toolchain: Toolchain) -> Path:
    sources = sorted(path.name for path in PROGRAMS.glob("*_tests.c"))
    return toolchain.link("sim-tests", ["main.c", *sources, *HARNESS])


@pytest.fixture(scope="session")
def probe(toolchain: Toolchain) -> Path:
    """A shared library whose constructor enters enclaves in whatever process loads it."""
    return toolchain.link("libprobe.so", ["probe.c", *HARNESS], "-shared", "-Wl,-z,defs")
