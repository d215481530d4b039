"""What a connection does when a message cannot be sent."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import CapturingLogger

from teemate import wire
from teemate.broker.connections.clients import Client
from teemate.broker.connections.connection import Connection
from teemate.broker.policy.limits import Ledger, Limits
from teemate.broker.telemetry.audit import Complaints
from teemate.broker.telemetry.monitoring import Monitoring
from teemate.errors import LimitReached


def connection_and_account() -> tuple[Connection, Any]:
    account = Ledger(Limits()).account(0)
    log: Any = CapturingLogger()
    service: Any = SimpleNamespace(log=log, complaints=Complaints(log), clients={}, monitoring=Monitoring())
    peer: Any = SimpleNamespace(identity=SimpleNamespace(uid=0), pidfd=-1)
    sock: Any = None
    return Connection(Client(service, 1, peer, account), sock), account


def failing(number: int) -> Any:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


async def test_a_reply_whose_descriptors_cannot_be_kept_is_not_sent_and_charges_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection, account = connection_and_account()
    monkeypatch.setattr(wire, "send", failing(errno.EAGAIN))
    monkeypatch.setattr(os, "dup", failing(errno.EMFILE))
    with pytest.raises(LimitReached):
        connection.send({"id": 1, "ok": {}}, (0,))
    assert connection.statistics().queued_bytes == 0
    assert not any(account.used.values())
    assert not connection.closing


@pytest.mark.parametrize(("number", "ends"), [(errno.ENOBUFS, True), (errno.EPIPE, False)])
async def test_a_reply_that_is_lost_ends_the_connection_unless_the_client_has_left(
    monkeypatch: pytest.MonkeyPatch, number: int, ends: bool
) -> None:
    connection, _ = connection_and_account()
    monkeypatch.setattr(wire, "send", failing(number))
    connection.send({"id": 1, "ok": {}})
    assert connection.closing is ends
