"""Fixtures of the broker's tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from images import Images
from raw_client import RawClient, raw_client
from running_broker import RunningBroker

BASE_POLICY = """
[administrators]
uids = [0]
"""


FOR_ROOT = {"broker", "vault_policy", "vault_broker", "world"}
"""Fixtures of tests whose policies speak of uid 0, or whose clients are of several users."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip for others what only root is served in."""
    if os.geteuid() == 0:
        return
    for item in items:
        here = item.path.parent == Path(__file__).parent
        if here and isinstance(item, pytest.Function) and FOR_ROOT.intersection(item.fixturenames):
            item.add_marker(pytest.mark.skip(reason="it serves uid 0, or several users: run it as root"))


@pytest.fixture
def vault_policy(images: Images) -> Callable[..., str]:
    """The text of a policy with the vault; `extra` are lines of its [[enclave]], `more` other tables."""
    vault = images.vault

    def make(extra: str = "", more: str = "", *, attach: str = "uid = 0") -> str:
        return f"""{BASE_POLICY}
[[enclave]]
name = "vault"
image = "{vault.sgxs}"
sigstruct = "{vault.sigstruct}"
{extra}
[[enclave.attach]]
{attach}
{more}
"""

    return make


@pytest.fixture
def vault_broker(broker: Callable[..., RunningBroker], vault_policy: Callable[..., str]) -> RunningBroker:
    """A broker with the vault, 12 client slots, for root."""
    return broker(vault_policy())


@pytest.fixture
def faults_broker(broker: Callable[..., RunningBroker], images: Images) -> RunningBroker:
    """A broker with the enclave that has bad things happen on request, for this user."""
    return broker(f"""
[administrators]
uids = [{os.geteuid()}]
[[enclave]]
name = "faults"
image = "{images.faults.sgxs}"
sigstruct = "{images.faults.sigstruct}"
[[enclave.attach]]
uid = {os.geteuid()}
""")


@pytest.fixture
def connect() -> Iterator[Callable[..., RawClient]]:
    """Connections that end with the test."""
    with ExitStack() as stack:

        def open_client(broker: RunningBroker, **options: Any) -> RawClient:
            return stack.enter_context(raw_client(broker.socket, **options))

        yield open_client
