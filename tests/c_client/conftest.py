"""The C library in programs of their own, against real brokers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from c_programs import HERE, Program, compile_program
from images import Images
from policies import enclave_policy
from running_broker import RunningBroker, run_broker


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """interpreter.c with the shared library."""
    return compile_program(HERE / "interpreter.c", tmp_path_factory.mktemp("c") / "interpreter")


@pytest.fixture
def program(interpreter: Path) -> Iterator[Callable[[], Program]]:
    """Start programs: call it once for each."""
    with ExitStack() as running:
        yield lambda: running.enter_context(Program(interpreter))


@pytest.fixture(scope="session")
def shared(policy: str) -> Iterator[RunningBroker]:
    """One broker for all tests that leave it as it was."""
    with run_broker(policy) as running:
        yield running


@pytest.fixture(scope="session")
def policy(images: Images) -> str:
    """A vault, and enclaves that fault, for this user."""
    return "\n".join(
        [
            f"[administrators]\nuids = [{os.geteuid()}]",
            enclave_policy("vault", images.vault, "slots_per_client = 4"),
            enclave_policy("faults", images.faults),
        ]
    )
