"""Messages for the broker that are nearly right: recorded ones, changed as CBOR or as bytes."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from typing import Any

import cbor2
from raw_client import RawClient

VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda rng: rng.choice(
        (0, 1, 2, 23, 24, 255, 256, 4095, 65535, 65536, 2**32 - 1, 2**53 - 1, 2**53, 2**64 - 1)
    ),
    lambda rng: -rng.choice((1, 2, 256, 2**63, 2**64)),
    lambda rng: rng.choice((0.0, -0.0, 0.001, 1e308, float("inf"), float("-inf"), float("nan"))),
    lambda rng: rng.choice(("", "vault", "*", "a" * 64, "a" * 65, "\x00", "\n", "é" * 32, "\U0001f600" * 17)),
    lambda rng: rng.choice((b"", b"\x00" * 16, b"\xff" * 32, b"k" * 88)),
    lambda rng: bytes(rng.choice((31, 32, 33, 1807, 1808, 1809))),
    lambda rng: rng.choice((True, False, None)),
    lambda rng: [rng.randrange(20) for _ in range(rng.randrange(6))],
    lambda rng: {"a": rng.randrange(9), "b": [None]},
    lambda rng: _nested(rng.randrange(1, 10)),
)
OPERATIONS = ("hello", "ping", "enclaves", "attach", "slots.acquire", "slots.release", "detach", "create",
              "destroy", "drain", "undrain", "upgrade", "revoke", "clients", "stats", "holders",
              "slots.steal", "")  # fmt: skip
KEYS = ("id", "op", "args", "grant", "client", "enclave", "slots", "count", "wait", "clean", "stolen", "name",
        "sigstruct", "backend", "debug", "owner", "force", "all", "deadline", "reason", "grace", "after",
        "resume", "version", "counters", "activity", "calls", "unknown")  # fmt: skip


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if depth % 2 else {"x": value}
    return value


class Recording(RawClient):
    """A client whose requests are kept."""

    def __init__(self, path: str, **options: Any) -> None:
        self.requests: list[dict[str, Any]] = []
        super().__init__(path, **options)

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        self.requests.append(message)
        super().send(message, fds)


def record(path: str, image: str, sigstruct: bytes) -> list[dict[str, Any]]:
    """Return the requests of an administrator that uses every operation of a broker with a vault."""
    client = Recording(path, name="recorded")
    try:
        client.ok("ping")
        client.ok("enclaves")
        grant = client.ok("attach", enclave="vault", slots=2, wait=1.0)
        client.ok("clients", after=0, activity=True)
        client.ok("holders", enclave="vault", first=0, calls=True)
        more = client.ok("slots.acquire", grant=grant["grant"], count=1, wait=0.5)
        client.ok("slots.release", grant=grant["grant"], slots=[more["slots"][0]["slot"]], clean=True)
        client.ok("detach", grant=grant["grant"], clean=True)
        client.ok("clients", after=0)
        client.ok("stats")
        fd = os.open(image, os.O_RDONLY)
        client.ok("create", (fd,), name="other", sigstruct=sigstruct, backend="auto", debug=False, owner=0)
        os.close(fd)
        client.ok("drain", enclave="other", deadline=0.1, force=True, reason="recorded")
        client.ok("undrain", enclave="other")
        client.ok("revoke", enclave="other", grace=0.1, reason="recorded")
        fd = os.open(image, os.O_RDONLY)
        client.ok("upgrade", (fd,), enclave="other", sigstruct=sigstruct, deadline=0.1, force=True)
        os.close(fd)
        client.ok("drain", all=True, deadline=0.1, force=True, reason="recorded")
        client.ok("undrain", all=True)
        client.ok("destroy", enclave="other", force=True)
        return client.requests
    finally:
        client.close()


class Mutator:
    """Makes one message after the other, the same ones for the same seed and corpus."""

    def __init__(self, seed: int, corpus: list[dict[str, Any]]) -> None:
        self._rng = random.Random(seed)
        # Those that end or build enclaves are rarer, else there is mostly nothing to attach to.
        rare = ("create", "destroy", "drain", "revoke", "upgrade")
        self._corpus = [message for message in corpus for _ in range(1 if message["op"] in rare else 25)]
        self._encoded = [cbor2.dumps(message) for message in self._corpus]
        self.grants: list[int] = [1]
        self._sockets = socket.socketpair()
        self._files = (os.open("/dev/null", os.O_RDONLY), os.memfd_create("fuzz"), *os.pipe())
        os.write(self._files[1], b"ECREATE\0" + bytes(4096))
        self.image: int | None = None
        self._number = 0
        self._with_image = False
        """Whether the last message is made of one that an image comes with."""

    def data(self) -> bytes:
        """The next message."""
        rng = self._rng
        index = int(rng.random() * len(self._corpus))
        self._with_image = self._corpus[index]["op"] in ("create", "upgrade")
        how = rng.random()
        if how < 0.45:
            return self._bytes(self._encoded[index])
        if how < 0.50:
            other = self._encoded[int(rng.random() * len(self._encoded))]
            mine = self._encoded[index]
            return mine[: int(rng.random() * len(mine))] + other[int(rng.random() * len(other)) :]
        message = self._fresh(self._corpus[index])
        if how < 0.90:
            for _ in range(1 + int(rng.random() * 3)):
                self._change(message)
        data: bytes = cbor2.dumps(message)
        return data if how < 0.85 else self._bytes(data) if how < 0.9 else data

    def descriptors(self) -> tuple[int, ...]:
        """Descriptors for the next message, mostly none; they stay the mutator's."""
        rng = self._rng
        if self._with_image and self.image is not None and rng.random() < 0.5:
            return (self.image,)
        if rng.random() > 0.02:
            return ()
        if self.image is not None and rng.random() < 0.03:
            return (self.image,)
        if rng.random() < 0.05:
            return (self._sockets[0].fileno(),) * (1 + int(rng.random() * 5))
        return tuple(rng.choice(self._files) for _ in range(1 + int(rng.random() * 3)))

    def chance(self, probability: float) -> bool:
        """Whether something that happens with `probability` does."""
        return self._rng.random() < probability

    def _fresh(self, message: dict[str, Any]) -> dict[str, Any]:
        """A copy with an id of its own, about a grant that may exist."""
        self._number += 1
        args = dict(message.get("args", {}))
        if "grant" in args:
            args["grant"] = self.grants[int(self._rng.random() * len(self.grants))]
        if "slots" in args and isinstance(args["slots"], list):
            args["slots"] = [2 + int(self._rng.random() * 12)]
        return {"id": self._number, "op": message["op"], "args": args}

    def _change(self, message: dict[str, Any]) -> None:
        rng = self._rng
        where: dict[str, Any] = message
        args = message.get("args")
        if type(args) is dict and args and rng.random() < 0.75:
            where = args
        what = rng.random()
        if what < 0.1 and where:
            del where[rng.choice(list(where))]
        elif what < 0.2:
            message["op"] = rng.choice(OPERATIONS)
        elif what < 0.35:
            where[rng.choice(KEYS)] = rng.choice(VALUES)(rng)
        elif where:
            where[rng.choice(list(where))] = rng.choice(VALUES)(rng)

    def _bytes(self, data: bytes) -> bytes:
        rng = self._rng
        changed = bytearray(data)
        for _ in range(1 + int(rng.random() * 4)):
            if not changed:
                break
            at = int(rng.random() * len(changed))
            what = rng.random()
            if what < 0.4:
                changed[at] ^= 1 << int(rng.random() * 8)
            elif what < 0.55:
                changed[at] = int(rng.random() * 256)
            elif what < 0.65:  # heads of items: indefinite, huge, tags, simple values
                changed[at] = rng.choice(
                    (0x5F, 0x7F, 0x9F, 0xBF, 0xFF, 0x1B, 0x3B, 0x5B, 0x7B, 0x9B, 0xBB, 0xC0, 0xF8)
                )
            elif what < 0.75:
                del changed[at:]
            elif what < 0.85:
                del changed[at : at + 1 + int(rng.random() * 8)]
            elif what < 0.95:
                changed[at:at] = rng.randbytes(1 + int(rng.random() * 8))
            else:
                end = at + 1 + int(rng.random() * 30)
                changed[at:at] = changed[at:end] * (1 + int(rng.random() * 40))
        return bytes(changed)

    def close(self) -> None:
        for fd in self._files:
            os.close(fd)
        for sock in self._sockets:
            sock.close()
