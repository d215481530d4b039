"""A proxy before a gateway that has a fault: what a campaign has to find, or it proves nothing."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from running_gateway import DEADLINE, exchange

FAULTS = ("loses", "cuts", "answers twice", "asks again", "answers with another's", "makes an error up")


class _Proxy(threading.Thread):
    """Hands one request after the other on; every fifth meets the fault."""

    def __init__(self, listener: socket.socket, gateway: str, fault: str) -> None:
        super().__init__()
        self._listener = listener
        self._gateway = gateway
        self._fault = fault
        self._count = 0
        self._last = b""
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # it is shut down
            while True:
                client = self._listener.accept()[0]
                client.settimeout(DEADLINE)
                with client, contextlib.suppress(ConnectionError):
                    client.sendall(self._answer(*_request(client)))

    def _answer(self, path: str, payload: bytes) -> bytes:
        answer, last = exchange(self._gateway, path, payload), self._last
        self._count += 1
        self._last = answer
        if self._count % 5:
            return answer
        match self._fault:
            case "loses":
                return b""
            case "cuts":
                return answer[:-1]
            case "answers twice":
                return answer * 2
            case "asks again":
                return exchange(self._gateway, path, payload)
            case "answers with another's":
                return last
            case _:
                return b"HTTP/1.1 500 \r\nContent-Length: 0\r\n\r\n"


def _request(client: socket.socket) -> tuple[str, bytes]:
    """Read one as :func:`running_gateway.exchange` sends it: path and payload."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(1 << 16)
    head, _, payload = data.partition(b"\r\n\r\n")
    found = re.fullmatch(rb"POST (\S+) .*Content-Length: (\d+)", head, re.DOTALL)
    assert found is not None, head
    while len(payload) < int(found[2]):
        payload += client.recv(1 << 16)
    return found[1].decode(), payload


@contextlib.contextmanager
def faulty(gateway: str, folder: Path, fault: str) -> Iterator[str]:
    """Run it until the block ends; yields where it listens."""
    path = folder / "faulty.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        proxy = _Proxy(listener, gateway, fault)
        try:
            yield str(path)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            proxy.join(DEADLINE)
            path.unlink()
