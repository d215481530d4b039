"""Fixtures of the tests of what people see of the traffic."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from images import Images
from policies import enclave_policy
from raw_client import RawClient, raw_client
from running_broker import RunningBroker
from watching import Viewer


@pytest.fixture
def policy(images: Images) -> str:
    """A vault for this user, who is an administrator."""
    return f"[administrators]\nuids = [{os.geteuid()}]\n{enclave_policy('vault', images.vault)}"


@pytest.fixture
def connect() -> Iterator[Callable[..., RawClient]]:
    """Connections that end with the test."""
    with ExitStack() as stack:

        def open_client(broker: RunningBroker, **options: object) -> RawClient:
            return stack.enter_context(raw_client(broker.socket, **options))

        yield open_client


@pytest.fixture
def look() -> Iterator[Callable[..., Viewer]]:
    """Viewers that end with the test."""
    with ExitStack() as stack:

        def begin(broker: RunningBroker, **chosen: object) -> Viewer:
            viewer = Viewer(broker.socket, **chosen)
            stack.callback(viewer.connection.close)
            return viewer

        yield begin
