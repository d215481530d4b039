"""A broker that sends nonsense: the C library says so with a typed error, and nothing leaks."""

from __future__ import annotations

import copy
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cbor2
import pytest
from c_programs import Program, Refused
from running_broker import RunningBroker

from teemate.wire import close_all, decode, receive, send

StartBroker = Callable[..., RunningBroker]
StartProgram = Callable[[], Program]

HELLO: dict[str, Any] = {"version": 1, "broker": "hostile", "max_message": 65536}
INFO: dict[str, Any] = {
    "name": "x", "generation": 1, "backend": "sim", "isolation": "gate", "state": "ready",
    "mrenclave": bytes(32), "mrsigner": bytes(32), "isvprodid": 0, "isvsvn": 0, "debug": False, "sdk": True,
    "base": 0x400000000000, "size": 0x800000, "pages": 100, "owner": 0,
    "slots": {"total": 4, "free": 3, "used": 1, "withheld": 0, "quarantined": 0, "waiting": 0}, "clients": 1,
}  # fmt: skip
SLOT = {"slot": 2, "tcs": 8192, "generation": 1, "key": bytes(16), "bind": bytes(88)}
ATTACHED: dict[str, Any] = {
    "grant": 1, "enclave": INFO, "arena": 1, "slots": [SLOT],
    "segments": [[0, 4096, 1, 2], [8192, 4096, 3, 1]],
}  # fmt: skip

Answer = Callable[[dict[str, Any]], tuple[bytes, int]]
"""Gets a request, returns the bytes that it is answered with and how many descriptors ride on them.

No bytes: the connection ends."""


@contextmanager
def hostile(path: Path, answer: Answer) -> Iterator[None]:
    """Greet everybody; what follows is `answer`'s.  Its descriptors are of pipes."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    ends = os.pipe()
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            while True:
                sock, _ = listener.accept()
                with sock:
                    while packet := receive(sock):
                        if not packet.data:
                            break
                        request = decode(packet.data)
                        if request["op"] == "stop":
                            return
                        if request["op"] == "hello":
                            send(sock, cbor2.dumps({"id": request["id"], "ok": HELLO}))
                            continue
                        data, count = answer(request)
                        if not data:
                            break
                        try:
                            send(sock, data, [ends[index % 2] for index in range(count)])
                        except OSError:  # it has had enough
                            break
        except ConnectionResetError:
            pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(path))
            send(sock, cbor2.dumps({"id": 1, "op": "stop"}))
            thread.join(60)
        listener.close()
        close_all(ends)
    assert not thread.is_alive()
    assert not failures, failures


def meet(user: Program, path: Path, *words: object) -> str:
    """Connect, ask, disconnect; returns the code of the error, or "ok"."""
    user.connect(str(path))
    code = "ok"
    try:
        user.do(*words)
    except Refused as error:
        code = error.code if error.text else "without a word"
    user.do("disconnect")
    return code


def with_listener(user: Program, path: Path) -> int:
    """Attach in vain for the first time; returns how many descriptors the program has from then on."""
    before = user.number("fds")
    with hostile(path, lambda request: (cbor2.dumps({"id": request["id"], "ok": {}}), 0)):
        assert meet(user, path, "attach", "x", 1, 0) == "protocol-error"
    after = user.number("fds")
    assert after == before + 2  # epoll, eventfd
    return after


def with_id(data: bytes) -> Answer:
    """An answer of a fixed form: bytes after a map's head of two pairs, the first being the right id."""
    return lambda request: (b"\xa2\x62id" + cbor2.dumps(request["id"]) + data, 0)


MALFORMED: dict[str, Answer] = {
    "nothing of CBOR": lambda _request: (b"\xff", 0),
    "an array": lambda _request: (b"\x80", 0),
    "a map that ends early": lambda _request: (b"\xa2\x62id\x01", 0),
    "a text that ends early": with_id(b"\x7a\xff\xff\xff\xffok"),
    "a length of 64 bits": with_id(b"\x7b\xff\xff\xff\xff\xff\xff\xff\xffok"),
    "a byte string that is all there ever was": with_id(b"\x62ok\x5b\x7f\xff\xff\xff\xff\xff\xff\xff"),
    "a key that is no text": with_id(b"\x01\xa0"),
    "a tag": with_id(b"\x62ok\xc1\xa0"),
    "an indefinite map": with_id(b"\x62ok\xbf\xff"),
    "a simple value": with_id(b"\x62ok\xf7"),
    "more items than bytes": with_id(b"\x62ok\x9a\xff\xff\xff\xff"),
    "a map of too many": with_id(b"\x62ok\xbb\xff\xff\xff\xff\xff\xff\xff\xff"),
    "too deep": with_id(b"\x62ok" + b"\x81" * 3000 + b"\x80"),
    "bytes behind it": with_id(b"\x62ok\xa0\x00"),
    "text that is not UTF-8": with_id(b"\x62ok\xa1\x61\xff\x01"),
    "neither answer nor error": with_id(b"\x62ok\x01"),
    "an answer to nobody": lambda _request: (cbor2.dumps({"id": 77, "ok": {}}), 0),
    "an answer to a text": lambda _request: (cbor2.dumps({"id": "1", "ok": {}}), 0),
    "descriptors without number": lambda request: (cbor2.dumps({"id": request["id"], "ok": {}}), 60),
    "five descriptors": lambda request: (cbor2.dumps({"id": request["id"], "ok": {}}), 5),
}  # fmt: skip


def test_malformed_messages_are_protocol_errors_and_nothing_leaks(
    tmp_path: Path, program: StartProgram
) -> None:
    asked: list[Answer] = []
    user = program()
    before = with_listener(user, tmp_path / "first")
    with hostile(tmp_path / "broker", lambda request: asked[-1](request)):
        for name, answer in MALFORMED.items():
            asked.append(answer)
            for words in (("ping",), ("attach", "x", 1, 0), ("list",)):
                assert meet(user, tmp_path / "broker", *words) == "protocol-error", (name, words)
            assert user.number("fds") == before, name
    assert user.number("mapped") == 0


def without(key: str) -> dict[str, Any]:
    changed = copy.deepcopy(ATTACHED)
    del changed[key]
    return changed


def changed(*path: object, to: object) -> dict[str, Any]:
    answer = copy.deepcopy(ATTACHED)
    place: Any = answer
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return answer


WRONG_ATTACHES = [
    *(without(key) for key in ("grant", "enclave", "segments", "slots")),
    changed("grant", to=-1),
    changed("enclave", to={}),
    changed("enclave", "backend", to="auto"),
    changed("enclave", "state", to="odd"),
    changed("enclave", "mrenclave", to=bytes(31)),
    changed("enclave", "isvsvn", to=65536),
    changed("enclave", "slots", to=[]),
    changed("segments", to={}),
    changed("segments", 0, to=[0, 4096, 1]),
    changed("segments", 0, to=[0, 4096, 8, 2]),
    changed("segments", 0, to=[0, 4096, 1, 3]),
    changed("segments", 0, to=[0, 4096, 1, "2"]),
    changed("slots", to="none"),
    changed("slots", 0, to=7),
    changed("slots", 0, "slot", to=4096),
    changed("slots", 0, "key", to=bytes(15)),
    changed("slots", 0, "bind", to=bytes(89)),
    changed("slots", 0, "key", to="0123456789abcdef"),
]


def test_answers_to_attach_that_make_no_sense_are_refused(tmp_path: Path, program: StartProgram) -> None:
    asked: list[tuple[dict[str, Any], int]] = []
    user = program()
    before = with_listener(user, tmp_path / "first")

    def answer(request: dict[str, Any]) -> tuple[bytes, int]:
        ok, fds = asked[-1] if request["op"] == "attach" else ({}, 0)
        return cbor2.dumps({"id": request["id"], "ok": ok}), fds

    with hostile(tmp_path / "broker", answer):
        for ok in WRONG_ATTACHES:
            asked.append((ok, 2))
            assert meet(user, tmp_path / "broker", "attach", "x", 1, 0) == "protocol-error", ok
            assert user.number("fds") == before
        for count in (0, 1, 3, 4):
            asked.append((ATTACHED, count))
            assert meet(user, tmp_path / "broker", "attach", "x", 1, 0) == "protocol-error", count
            assert user.number("fds") == before
        # Well formed, but the descriptors are of no enclave, or it cannot be where it is said to be.
        for ok in (
            ATTACHED,
            changed("enclave", "base", to=0),
            changed("enclave", "base", to=0x1000),
            changed("enclave", "size", to=1 << 63),
            changed("enclave", "size", to=12345),
            changed("segments", to=[[0, 4096, 1, 2]] * 2),
            changed("segments", to=[[1 << 62, 1 << 63, 1, 2]]),
            changed("enclave", "backend", to="sgx"),
            changed("slots", to=[]),
        ):
            asked.append((ok, 2))
            assert meet(user, tmp_path / "broker", "attach", "x", 1, 0) != "ok", ok
            assert user.number("fds") == before
            assert user.number("mapped") == 0


def test_descriptors_that_nobody_asked_for_are_closed(tmp_path: Path, program: StartProgram) -> None:
    user = program()
    before = user.number("fds")
    with hostile(tmp_path / "broker", lambda request: (cbor2.dumps({"id": request["id"], "ok": {}}), 4)):
        assert meet(user, tmp_path / "broker", "ping") == "ok"
        assert user.number("fds") == before
    events: list[dict[str, Any]] = [
        {"event": "revoked", "grant": 5, "slots": [1], "deadline": 1},
        {"event": "revoked", "grant": "five", "slots": 1, "deadline": "soon"},
        {"event": "later than we are", "what": {}},
        {"event": "draining"},
    ]
    sent = iter([*(cbor2.dumps(event) for event in events), b""])
    with hostile(tmp_path / "other", lambda _request: (next(sent), 3)):
        user.connect(str(tmp_path / "other"))
        for job in range(len(events)):  # requests that are never answered
            user.do("start", job, "ping")
        assert user.do("event", 20000)[0] == "3"
        assert user.number("fds") == before + 3  # the socket, epoll, eventfd
        with pytest.raises(Refused):
            user.do("ping")
        for job in range(len(events)):
            with pytest.raises(Refused) as caught:
                user.do("join", job)
            assert caught.value.code == "connection-lost"
        user.do("disconnect")


@pytest.mark.parametrize("seed", range(4))
def test_mutated_answers_neither_crash_nor_leak(tmp_path: Path, program: StartProgram, seed: int) -> None:
    """Every outcome is a code; a crash ends the program, which fails the test."""
    generator = random.Random(seed)
    codes: set[str] = set()
    user = program()
    before = with_listener(user, tmp_path / "first")

    def mutate(request: dict[str, Any]) -> tuple[bytes, int]:
        ok = ATTACHED if request["op"] == "attach" else {"enclaves": [INFO] * 3}
        data = bytearray(cbor2.dumps({"id": request["id"], "ok": ok}))
        for _ in range(generator.randrange(1, 4)):
            kind = generator.randrange(4)
            place = generator.randrange(len(data))
            if kind == 0:
                data[place] ^= 1 << generator.randrange(8)
            elif kind == 1:
                data[place] = generator.choice([0x00, 0x1B, 0x5B, 0x7B, 0x9B, 0xBB, 0xF9, 0xFF])
            elif kind == 2:
                del data[place : place + generator.randrange(1, 20)]
            else:
                data[place:place] = generator.randbytes(generator.randrange(1, 9))
            if not data:
                data = bytearray(b"\xa0")
        return bytes(data), generator.randrange(4)

    with hostile(tmp_path / "broker", mutate):
        for turn in range(60):
            words = ("attach", "x", 1, 0) if turn % 2 else ("list",)
            codes.add(meet(user, tmp_path / "broker", *words))
            assert user.number("fds") == before
    assert codes - {"ok"}
    assert user.number("mapped") == 0
