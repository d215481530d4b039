"""Fixtures that every area may use; what only one area needs is in that area's conftest.py."""

from __future__ import annotations

import pytest
from images import Images


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
