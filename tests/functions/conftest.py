"""Functions: the examples, the compiler's wrapper, the gateway."""

from __future__ import annotations

import pytest
from example_programs import Programs


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("examples"))
