"""Fixtures that every area may use; what only one area needs is in that area's conftest.py."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from files_image import build_files_image
from hypothesis import HealthCheck, settings
from images import BuiltImage, Images
from running_broker import RunningBroker, run_broker


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--machine",
        action="store_true",
        help="run also the tests that boot the emulated machine with SGX (as TEEMATE_MACHINE=1 does)",
    )
    parser.addoption(
        "--full",
        action="store_true",
        help="count as far as the product's figures say, not as a plain run does",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Have every run find the same, but for those that are to find more."""
    # No bound on an example's time: another program may have the processor.
    settings.register_profile(
        "plain", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.register_profile("full", settings.get_profile("plain"), derandomize=False)
    full = config.getoption("--full") or os.environ.get("TEEMATE_TEST_FULL")
    settings.load_profile("full" if full else "plain")
    # A shell has its background jobs ignore SIGINT; programs that tests interrupt would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _test_build() -> str:
    """What the installed libteemate has switched off: images are then built with the same hole."""
    try:
        from teemate._native import ffi, lib
    except ImportError:
        return ""
    text: str = ffi.string(lib.teemate_test_build()).decode()
    return text


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Signed test images, built once per run: ``images.vault``, ``images.faults``, ``images.bare``."""
    return Images(tmp_path_factory.mktemp("images"), test_build=_test_build())


@pytest.fixture(scope="session")
def files_image(images: Images, tmp_path_factory: pytest.TempPathFactory) -> BuiltImage:
    """An enclave that does with files what its callers say (files_image.py)."""
    return build_files_image(images, tmp_path_factory.mktemp("files"))


@pytest.fixture
def broker() -> Iterator[Callable[..., RunningBroker]]:
    """Start real ``teemate-broker`` processes: call it with a policy's text (see running_broker.py)."""
    with contextlib.ExitStack() as running:

        def start(policy: str, **options: Any) -> RunningBroker:
            return running.enter_context(run_broker(policy, **options))

        yield start
