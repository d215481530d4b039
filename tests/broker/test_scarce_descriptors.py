"""A broker whose descriptors are nearly used up."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import ANY

import pytest
from raw_client import RawClient, raw_client
from running_broker import RunningBroker

Connect = Callable[..., RawClient]

DESCRIPTORS = 96


@pytest.fixture
def short_broker(broker: Callable[..., RunningBroker], vault_policy: Callable[..., str]) -> RunningBroker:
    """A broker that may have DESCRIPTORS descriptors and no more."""
    return broker(vault_policy(), launcher=("prlimit", f"--nofile={DESCRIPTORS}"))


def connect_and_greet(running: RunningBroker, stack: contextlib.ExitStack) -> dict[str, Any] | None:
    """The first message that a new connection of a user gets; it stays open until `stack` ends."""
    os.seteuid(4242)
    try:
        client = stack.enter_context(raw_client(running.socket, hello=False))
    finally:
        os.seteuid(0)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before it could speak
        client.post("hello", version=1, client="crowd")
    return client.receive()


def test_a_crowd_of_connections_leaves_the_broker_what_it_needs_for_those_it_has(
    short_broker: RunningBroker, connect: Connect
) -> None:
    admin, leaving = connect(short_broker), connect(short_broker)
    leaving.ok("attach", enclave="vault", slots=2)
    with contextlib.ExitStack() as crowd:
        for _ in range(DESCRIPTORS):
            first = connect_and_greet(short_broker, crowd)
            assert first is not None
            if "error" in first:
                break
        assert first["error"]["code"] == "limit-reached"
        assert "RLIMIT_NOFILE" in first["error"]["message"]
        clients = len(admin.ok("clients")["clients"]) - 1
        leaving.close()  # its process lives on, so the broker goes on watching it
        admin.ok("attach", enclave="vault", slots=1)
        while len(admin.ok("clients")["clients"]) > clients:  # until it has seen that one leave
            pass
        (info,) = admin.ok("enclaves")["enclaves"]
        assert info["slots"]["withheld"] == 2
    while len(admin.ok("clients")["clients"]) > 1:  # until it has seen the crowd leave
        pass
    with contextlib.ExitStack() as later:
        assert connect_and_greet(short_broker, later) == {"id": 1, "ok": ANY}
