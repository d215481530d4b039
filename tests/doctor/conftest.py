"""A host on which all is well, for tests to break."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_host import FakeHost


@pytest.fixture
def fake(tmp_path: Path) -> FakeHost:
    """Files in a folder of its own; nothing of the real host is looked at."""
    return FakeHost(tmp_path / "root")
