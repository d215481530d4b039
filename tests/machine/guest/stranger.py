"""The other program of sharing.py: it gets an enclave's descriptor in a message, and orders one by one."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from sharing import Geometry, Raw, restrict, touch  # noqa: E402


class Orders:
    """What a stranger can do."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._raw: Raw | None = None

    def raw(self) -> Raw:
        assert self._raw is not None
        return self._raw

    def open(self, fd: int, geometry: dict[str, Any]) -> None:
        """Map the enclave whose descriptor came along."""
        self._raw = Raw.open(fd, Geometry.from_json(geometry)).map()

    def call(self, operation: int, rsi: int, rdx: int, tcs: int) -> int:
        """Enter."""
        return self.raw().call(operation, rsi, rdx, tcs=tcs)

    def create(self, sgxs: str, sigstruct: str, *, debug: bool = False, mapped: bool = True) -> Raw:
        """Build an enclave, and hand its descriptor back."""
        from images import BuiltImage

        image = BuiltImage(
            name="raw", sgxs=Path(sgxs), sigstruct=Path(sigstruct), elf=Path(), mrenclave=b"", slots=2
        )
        self._raw = Raw.create(image, debug=debug)
        if mapped:
            self._raw.map()
        return self._raw

    def device(self) -> int:
        """Open the device here, and hand the descriptor over."""
        return os.open("/dev/sgx_enclave", os.O_RDWR | os.O_CLOEXEC)

    def read_implies_exec(self) -> None:
        """Make every readable mapping from now on executable, which no enclave may be."""
        ctypes.CDLL(None).personality(0x0400000)

    def touch(self, offset: int, size: int) -> None:
        """Bring pages in."""
        touch(self.raw().geometry.base + offset, size)

    def restrict_until_busy(self, offset: int, length: int, permissions: int, rounds: int) -> list[int]:
        """Do the ioctl again and again, until it has answered EBUSY once; the errnos that it gave."""
        seen = set()
        for _ in range(rounds):
            seen.add(restrict(self.raw().fd, offset, length, permissions)[0])
            if 16 in seen:
                break
        return sorted(seen)


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    orders = Orders(channel)
    while True:
        data, fds, _, _ = socket.recv_fds(channel, 1 << 20, 1)
        if not data:
            return
        order = json.loads(data)
        do = order.pop("do")
        try:
            result = getattr(orders, do)(*fds, **order)
        except Exception as error:
            channel.send(json.dumps({"error": type(error).__name__, "message": str(error)}).encode())
            continue
        if do == "device":
            socket.send_fds(channel, [json.dumps({"result": None}).encode()], [result])
            os.close(result)
        elif isinstance(result, Raw):
            answer = json.dumps({"geometry": result.geometry.to_json()}).encode()
            socket.send_fds(channel, [answer], [result.fd])
        else:
            channel.send(json.dumps({"result": result}).encode())


if __name__ == "__main__":
    main()
