"""Standard streams of an invocation: what the enclave asks its caller for while the function runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from teemate._slot import OcallHandler

__all__ = ["Ocalls", "feeding"]

Ocalls = Mapping[str, OcallHandler]


def feeding(source: Iterable[bytes], sink: Callable[[bytes], object]) -> Ocalls:
    """Return what answers the enclave: with pieces of `source`, and by giving to `sink`."""

    def write(data: bytes) -> bytes:
        sink(data)
        return b""

    return {"stdin": _Pieces(source), "stdout": write}


class _Pieces:
    """Of a source, never more than is asked for."""

    def __init__(self, source: Iterable[bytes]) -> None:
        self._source = iter(source)
        self._rest = memoryview(b"")

    def __call__(self, request: bytes) -> bytes:
        most = int.from_bytes(request, "little")
        while not self._rest:
            piece = next(self._source, None)
            if piece is None:
                return b""
            self._rest = memoryview(piece)
        some, self._rest = self._rest[:most], self._rest[most:]
        return bytes(some)
