from __future__ import annotations

import pytest
from native_library import CRYPTO, VARIANTS, Crypto, build_library


@pytest.fixture(scope="session", params=sorted(VARIANTS))
def crypto(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Crypto:
    variant: str = request.param
    output = tmp_path_factory.mktemp("crypto") / f"crypto-{variant}.so"
    return Crypto(build_library(CRYPTO, output, VARIANTS[variant]))
