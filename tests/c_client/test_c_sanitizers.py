"""The C library as somebody builds it for himself, into a prefix, here with sanitizers.

Everything holds with ASan and UBSan.  ThreadSanitizer's runtime owns the address window of enclaves, which
attach says; what does not map an enclave is looked at with it all the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from c_programs import EXTRA_FLAGS, HERE, Program, Refused, compile_program, flags
from fake_broker import FakeBroker, running
from processes import wait_until
from running_broker import RunningBroker

SOURCE = HERE.parents[1]


@pytest.fixture
def full(request: pytest.FixtureRequest) -> None:
    """Building the library anew takes half a minute."""
    if EXTRA_FLAGS or not request.config.getoption("--full"):
        pytest.skip("takes a minute: pytest --full tests/c_client")
    flags("--libs")


def install(folder: Path, sanitizer: str) -> Path:
    """Build the library alone and install it; returns where its libraries are."""
    build, prefix = folder / "build", folder / "prefix"
    meson = [sys.executable, "-m", "mesonbuild.mesonmain"]
    options = ["-Dpackage=false", "-Dclient_library=enabled", "-Dbuildtype=debugoptimized"]
    options += [f"-Db_sanitize={sanitizer}", "-Db_lundef=false"]
    for command in (
        ["setup", "--werror", f"--prefix={prefix}", "--libdir=lib", *options, str(build), str(SOURCE)],
        ["compile", "-C", str(build)],
        ["install", "-C", str(build)],
    ):
        subprocess.run([*meson, *command], check=True)
    return prefix / "lib"


def test_everything_holds_with_address_and_undefined_behaviour_sanitizers(full: None, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TEEMATE_TEST_C_LIBRARY": str(install(tmp_path, "address,undefined")),
        "TEEMATE_TEST_C_FLAGS": "-fsanitize=address,undefined",
        "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(HERE)], check=True, env=environment)


def test_requests_of_many_threads_have_no_data_races_while_the_broker_comes_and_goes(
    full: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("c_programs.PREFIX", install(tmp_path, "thread"))
    monkeypatch.setattr("c_programs.EXTRA_FLAGS", ["-fsanitize=thread"])
    program = compile_program(HERE / "interpreter.c", tmp_path / "interpreter")
    fake = FakeBroker(str(tmp_path / "broker"))
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    with running(fake), Program(program, environment) as user:
        user.connect(fake.path)
        user.do("start", 9, "event", 60000)
        for thread in range(4):
            user.do("start", thread, "pings", 2000)
        for life in range(1, 6):
            wait_until(lambda life=life: fake.performed["ping"] > 1000 * life, "nobody asks")
            fake.kill()
        for thread in range(4):
            user.do("join", thread)
        user.do("join", 9)
        user.do("disconnect")
    assert fake.lives == 6
    assert fake.performed["ping"] >= 8000


def test_a_program_with_thread_sanitizer_is_told_that_it_cannot_attach(
    broker: Callable[..., RunningBroker], policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if EXTRA_FLAGS:
        pytest.skip("one sanitizer at a time")
    flags("--libs")
    monkeypatch.setattr("c_programs.EXTRA_FLAGS", ["-fsanitize=thread"])
    program = compile_program(HERE / "interpreter.c", tmp_path / "interpreter")
    running_broker = broker(policy)
    with Program(program) as user:
        user.connect(running_broker.socket)
        with pytest.raises(Refused, match="ThreadSanitizer cannot hold an enclave") as caught:
            user.attach("vault")
        assert caught.value.code == "unsupported"
        user.do("ping")
        user.do("disconnect")
