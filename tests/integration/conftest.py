"""Integration tests: real brokers, wardens and enclaves; what is said is checked against the schema."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator

import pytest
from images import Images
from policies import enclave_policy
from recorder import Recorder

from teemate import wire


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Validate every message that this process exchanges with a broker."""
    recorder = Recorder()
    send, receive = wire.send, wire.receive
    failures: list[Exception] = []

    def recording_send(sock: socket.socket, data: bytes, fds: Iterable[int] = (), flags: int = 0) -> None:
        try:
            recorder.sent(id(sock), data)
        except Exception as error:
            failures.append(error)
        send(sock, data, fds, flags)

    def recording_receive(sock: socket.socket, buffer: bytearray | None = None) -> wire.Packet:
        packet = receive(sock, buffer)
        if packet.data:
            try:
                recorder.received(id(sock), packet.data)
            except Exception as error:
                failures.append(error)
        return packet

    monkeypatch.setattr(wire, "send", recording_send)
    monkeypatch.setattr(wire, "receive", recording_receive)
    yield recorder
    assert not failures, f"messages that client/protocol.cddl does not allow: {failures}"


@pytest.fixture
def policy(images: Images) -> str:
    """A vault, and enclaves that fault, for this user."""
    return "\n".join(
        [
            f"[administrators]\nuids = [{os.geteuid()}]",
            enclave_policy("vault", images.vault),
            enclave_policy("faults", images.faults),
        ]
    )
