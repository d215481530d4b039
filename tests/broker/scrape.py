"""A reader of metrics over a Unix socket or TCP, and samples by name and labels."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from backends import PATIENCE
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as older_format

OPENMETRICS = "application/openmetrics-text;version=1.0.0"


@dataclass(frozen=True)
class Response:
    """What the server answered."""

    status: int
    headers: dict[str, str]
    body: bytes


def ask(address: str | tuple[str, int], request: bytes) -> Response:
    """Send `request` as it is and read to the end."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(60 * PATIENCE)
        sock.connect(address)
        sock.sendall(request)
        received = bytearray()
        while data := sock.recv(65536):
            received += data
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    first, *fields = head.decode().split("\r\n")
    headers = dict(field.split(": ", 1) for field in fields)
    assert headers.pop("Connection") == "close"
    return Response(int(first.split()[1]), headers, body)


def get(address: str | tuple[str, int], accept: str = OPENMETRICS, path: str = "/metrics") -> Response:
    """Ask as Prometheus does."""
    return ask(address, f"GET {path} HTTP/1.1\r\nHost: broker\r\nAccept: {accept}\r\n\r\n".encode())


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: bytes, *, older: bool = False) -> Samples:
    """Parse OpenMetrics strictly, or the older format; returns the values by name and labels."""
    found: Samples = {}
    for family in (older_format if older else text_string_to_metric_families)(text.decode()):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    """Return one sample's value."""
    return found[name, frozenset(labels.items())]
