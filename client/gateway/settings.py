"""What a gateway was told, checked once and handed to its workers."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import asdict, dataclass
from typing import final

__all__ = ["GatewayError", "Settings", "parse_listen"]


class GatewayError(Exception):
    """The gateway cannot run as it was told; the message says what to change."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes are in bytes and times in seconds."""

    broker: str | None = None
    """The broker's socket; None: as :func:`teemate.connect` finds it."""
    enclave: str = "functions"
    """Which enclave has the functions."""
    workers: int = 1
    """How many processes serve."""
    slots: int = 4
    """How many functions a worker runs at once: each takes a slot of the enclave."""
    concurrency: int = 36
    """How many requests, running and waiting, may be for the same function, whichever worker has them."""
    queue: int = 32
    """How many requests may wait for a slot, in all workers, beside those that run."""
    max_body: int = 8 << 20
    """How large a request's body may be; functions take 16 MiB at most."""
    timeout: float = 10.0
    """A request's deadline when it names none."""
    max_timeout: float = 60.0
    """The longest deadline that a request may name."""
    idle: float = 30.0
    """A slot that was not needed for so long goes back to the broker."""
    grace: float = 30.0
    """How long requests that are under way may take when the gateway stops."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("workers", "slots", "concurrency"):
            if getattr(self, name) < 1:
                raise GatewayError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if self.queue < 0 or self.max_body < 0:
            raise GatewayError("queue and max_body are not negative")
        if not 0 < self.timeout <= self.max_timeout:
            raise GatewayError(
                f"the timeout is more than 0 s, and at most {self.max_timeout:g} s (--max-timeout)"
            )
        for name in ("grace", "idle"):
            if getattr(self, name) <= 0:
                raise GatewayError(f"the {name} is more than 0 s")

    @property
    def places(self) -> int:
        """How many requests may be there at once."""
        return self.workers * self.slots + self.queue

    def to_json(self) -> str:
        """For a worker's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """What the supervisor wrote."""
        return cls(**json.loads(text))


def parse_listen(text: str) -> tuple[str, int] | str:
    """Return the path of ``unix:PATH``, or address and port of a loopback ``HOST:PORT``.

    Raises :class:`GatewayError` for any other: what comes in is not encrypted, and whoever can connect may
    invoke.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path or len(path.encode()) > 107:
            raise GatewayError(f"{text!r}: a socket's path has 1 to 107 bytes")
        return path
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
        number = int(port)
    except ValueError:
        loopback, number = False, -1
    if not colon or not loopback or not 0 <= number <= 0xFFFF:
        raise GatewayError(
            f"{text!r}: listen at unix:PATH or at a loopback address and port, such as 127.0.0.1:8080;"
            " a proxy with TLS and authentication belongs before what others may reach"
        )
    return host, number
