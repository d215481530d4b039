from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from image_sources import BARE, SAMPLE

from teemate.image import build_elf, generate_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey


@pytest.fixture(scope="session")
def key() -> RSAPrivateKey:
    return generate_key()


@pytest.fixture(scope="session")
def bare_elf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An enclave without the SDK, as the compiler leaves it."""
    folder = tmp_path_factory.mktemp("bare")
    source = folder / "bare.S"
    source.write_text(BARE)
    build_elf([source], folder / "bare.elf", bare=True)
    return folder / "bare.elf"


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source of an enclave with the SDK."""
    source = tmp_path_factory.mktemp("sample") / "sample.c"
    source.write_text(SAMPLE)
    return source


@pytest.fixture(scope="session")
def sample_elf(sample: Path) -> Path:
    """An enclave with the SDK, as the compiler leaves it."""
    output = sample.with_suffix(".elf")
    build_elf([sample], output)
    return output
