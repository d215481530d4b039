"""The C library as somebody builds it for himself, here with ASan and UBSan: all of these tests hold for it.

ThreadSanitizer is not among them: its runtime owns the address window of enclaves, and attach says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from c_programs import EXTRA_FLAGS, HERE, Program, Refused, compile_program, flags
from running_broker import RunningBroker

SOURCE = HERE.parents[1]


@pytest.fixture
def full(request: pytest.FixtureRequest) -> None:
    """Building the library anew takes half a minute."""
    if EXTRA_FLAGS or not request.config.getoption("--full"):
        pytest.skip("takes a minute: pytest --full tests/c_client")


def test_everything_holds_with_address_and_undefined_behaviour_sanitizers(
    full: None, tmp_path: Path
) -> None:
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    meson = [sys.executable, "-m", "mesonbuild.mesonmain"]
    options = ["-Dpackage=false", "-Dbuildtype=debugoptimized", "-Db_lundef=false"]
    options.append("-Db_sanitize=address,undefined")
    commands = [
        [
            *(*meson, "setup", "--werror", f"--prefix={prefix}", "--libdir=lib"),
            *(*options, str(build), str(SOURCE)),
        ],
        [*meson, "compile", "-C", str(build)],
        [*meson, "install", "-C", str(build)],
    ]
    for command in commands:
        subprocess.run(command, check=True)
    environment = {
        **os.environ,
        "TEEMATE_TEST_C_LIBRARY": str(prefix / "lib"),
        "TEEMATE_TEST_C_FLAGS": "-fsanitize=address,undefined",
        "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(HERE)], check=True, env=environment)


def test_a_program_with_thread_sanitizer_is_told_that_it_cannot_attach(
    broker: Callable[..., RunningBroker], policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if EXTRA_FLAGS:
        pytest.skip("one sanitizer at a time")
    assert flags("--libs")
    monkeypatch.setattr("c_programs.EXTRA_FLAGS", ["-fsanitize=thread"])
    program = compile_program(HERE / "interpreter.c", tmp_path / "interpreter")
    running = broker(policy)
    with Program(program) as user:
        user.connect(running.socket)
        with pytest.raises(Refused, match="ThreadSanitizer cannot hold an enclave") as caught:
            user.attach("vault")
        assert caught.value.code == "unsupported"
        user.do("ping")
        user.do("disconnect")
