from __future__ import annotations

import os
from pathlib import Path

import pytest
from selftest_build import Material
from selftest_image import SelftestImage


@pytest.fixture(scope="session")
def material() -> Material:
    """What selftest_build.py has built."""
    folder = os.environ.get("TEEMATE_SELFTEST_ENCLAVE")
    if folder is None:
        pytest.skip(
            "the kernel's selftest enclave needs the kernel's source (a download of 140 MB): "
            "pytest --machine tests/machine/test_selftest_enclave_machine.py runs these on both backends"
        )
    return Material(folder=Path(folder))


@pytest.fixture(scope="session")
def selftest(material: Material, tmp_path_factory: pytest.TempPathFactory) -> SelftestImage:
    """The enclave as an image of ours, signed with a key of this run."""
    return material.image(tmp_path_factory.mktemp("selftest"))
