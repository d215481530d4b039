"""Requests about whole enclaves that are asked again after the broker died in the middle of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from images import Images
from played_manager import Message, PlayedManager, played_manager
from raw_client import RawClient, raw_client

from teemate import errors
from teemate.broker.enclaves.upgrade import Upgrades

Policy = Callable[..., str]
Connect = Callable[..., RawClient]


@pytest.fixture
def manager(tmp_path: Path, vault_policy: Policy) -> Iterator[PlayedManager]:
    with played_manager(tmp_path, vault_policy(more="[[create]]\nuid = 0\n")) as manager:
        yield manager


@pytest.fixture
def client(manager: PlayedManager) -> Iterator[RawClient]:
    """The administrator that asks."""
    with raw_client(manager.socket) as client:
        yield client


def kept(manager: PlayedManager, kind: str) -> int:
    return sum(name.startswith(f"{kind}-") for name in list(manager.stored))


def create(client: RawClient, images: Images, name: str) -> dict[str, Any]:
    with images.vault.sgxs.open("rb") as image:
        sigstruct = images.vault.sigstruct.read_bytes()
        return client.ok("create", (image.fileno(),), name=name, sigstruct=sigstruct)


class Request:
    """One that can be asked again, as the library does."""

    def __init__(self, client: RawClient, op: str, image: Path | None = None, **args: Any) -> None:
        self._client, self._op, self._args, self._image = client, op, args, image
        client._number += 1
        self.number = client._number
        self.ask()

    def ask(self) -> None:
        message = {"id": self.number, "op": self._op, "args": self._args}
        if self._image is None:
            self._client.send(message)
            return
        with self._image.open("rb") as image:
            self._client.send(message, (image.fileno(),))

    def answer(self) -> dict[str, Any]:
        reply = self._client.reply(self.number)
        assert "ok" in reply, reply
        ok: dict[str, Any] = reply["ok"]
        return ok


def die_at(manager: PlayedManager, here: Callable[[Message], bool]) -> threading.Event:
    """Have the broker die instead of sending the message that `here` finds, and everything after it."""
    dead = threading.Event()

    def heed(message: Message) -> bool:
        if not dead.is_set() and here(message):
            assert manager.broker is not None
            manager.broker.kill()
            dead.set()
        return not dead.is_set()

    manager.heed = heed
    return dead


def restart(manager: PlayedManager, *clients: RawClient) -> None:
    manager.kill()
    manager.heed = lambda _message: True
    manager.start()
    for client in clients:
        client.reconnect()


def nth(number: int, key: str, kind: str) -> Callable[[Message], bool]:
    """The so manieth message about a descriptor of that kind, from 1 on."""
    seen: list[str] = []

    def here(message: Message) -> bool:
        if message.get(key) == "1" and message["FDNAME"].startswith(f"{kind}-"):
            seen.append(message["FDNAME"])
        return len(seen) == number

    return here


def test_a_drain_of_the_host_tells_of_what_the_last_broker_had_taken_down(
    manager: PlayedManager, client: RawClient, images: Images
) -> None:
    create(client, images, "mine")
    with raw_client(manager.socket) as holder:
        grant = holder.ok("attach", enclave="mine")["grant"]
        drain = Request(client, "drain", all=True, deadline=60)
        assert holder.event()["event"] == "draining"
        while kept(manager, "enclave") != 1:  # until the vault is gone
            pass
        restart(manager, client, holder)
        drain.ask()
        assert holder.event()["event"] == "draining"
        holder.ok("detach", grant=grant, clean=True)
        mine, vault = drain.answer()["enclaves"]
    counts = {"revoked": 0, "left": 0, "leaked": 0, "busy": 0, "emptied": True}
    assert mine == {"enclave": "mine", "held": 1, **counts}
    assert vault == {"enclave": "vault", "held": 0, **counts}
    assert (kept(manager, "enclave"), kept(manager, "image")) == (0, 2)


def test_a_drain_that_had_revoked_says_so(manager: PlayedManager, client: RawClient) -> None:
    with raw_client(manager.socket) as holder:
        grant = holder.ok("attach", enclave="vault")["grant"]
        drain = Request(client, "drain", enclave="vault", deadline=0, force=True)
        assert [holder.event()["event"] for _ in range(2)] == ["draining", "revoked"]
        restart(manager, client, holder)
        drain.ask()
        holder.ok("detach", grant=grant, clean=True)
        (told,) = drain.answer()["enclaves"]
    assert told == {"enclave": "vault", "held": 1, "revoked": 1, "left": 0, "leaked": 0, "busy": 0}


def test_an_undrain_of_the_host_brings_back_the_rest_and_tells_of_all(
    manager: PlayedManager, client: RawClient, images: Images
) -> None:
    create(client, images, "mine")
    client.ok("drain", all=True)
    dead = die_at(manager, nth(2, "FDSTORE", "enclave"))
    undrain = Request(client, "undrain", all=True)
    assert dead.wait(30)
    restart(manager, client)
    undrain.ask()
    ok = undrain.answer()
    assert (sorted(ok["enclaves"]), ok["failed"]) == (["mine", "vault"], [])
    infos = {info["name"]: info for info in client.ok("enclaves")["enclaves"]}
    assert [(infos[name]["state"], infos[name]["generation"]) for name in ("mine", "vault")] == [
        ("ready", 2), ("ready", 2)
    ]  # fmt: skip
    assert [kept(manager, kind) for kind in ("enclave", "arena", "image")] == [2, 2, 2]


def test_an_undrain_that_was_done_and_not_answered_is_answered(
    manager: PlayedManager, client: RawClient
) -> None:
    client.ok("drain", enclave="vault", deadline=0)
    undrain = Request(client, "undrain", enclave="vault")
    assert undrain.answer() == {"enclaves": ["vault"], "failed": []}
    restart(manager, client)
    undrain.ask()
    assert undrain.answer() == {"enclaves": ["vault"], "failed": []}


def upgrade(client: RawClient, images: Images, **args: Any) -> Request:
    sigstruct = images.vault.sigstruct.read_bytes()
    return Request(client, "upgrade", images.vault.sgxs, enclave="vault", sigstruct=sigstruct, **args)


def vault(client: RawClient) -> tuple[str, int]:
    (info,) = client.ok("enclaves")["enclaves"]
    return info["state"], info["generation"]


@pytest.mark.parametrize(
    "here",
    [
        nth(2, "FDSTORE", "enclave"),
        nth(1, "FDSTOREREMOVE", "enclave"),
        nth(1, "FDSTOREREMOVE", "arena"),
        nth(1, "FDSTOREREMOVE", "image"),
    ],
    ids=["before it is built", "when the old one goes", "half of it gone", "most of it gone"],
)
def test_an_upgrade_is_made_once_whenever_the_broker_dies(
    manager: PlayedManager, client: RawClient, images: Images, here: Callable[[Message], bool]
) -> None:
    if here({"FDSTORE": "1", "FDNAME": "enclave-1"}):
        raise AssertionError("the vault is there already")
    dead = die_at(manager, here)
    request = upgrade(client, images)
    assert dead.wait(30)
    restart(manager, client)
    request.ask()
    ok = request.answer()
    assert (ok["generation"], ok["held"], ok["revoked"]) == (2, 0, 0)
    assert vault(client) == ("ready", 2)
    while kept(manager, "enclave") != 1:  # the old one goes by itself
        pass
    restart(manager, client)
    request.ask()
    assert request.answer() == ok
    assert vault(client) == ("ready", 2)
    client.ok("attach", enclave="vault")


def test_an_upgrade_that_the_broker_did_not_live_through_leaves_the_old_enclave_as_it_was(
    manager: PlayedManager, client: RawClient, images: Images
) -> None:
    with raw_client(manager.socket) as holder:
        grant = holder.ok("attach", enclave="vault")["grant"]
        request = upgrade(client, images, deadline=60)
        assert holder.event()["event"] == "draining"
        restart(manager, client, holder)
        assert holder.event() == {"event": "ready", "enclave": "vault", "generation": 1}
        assert vault(client) == ("ready", 1)
        holder.ok("slots.acquire", grant=grant, count=1, wait=20)
        request.ask()
        assert holder.event()["event"] == "draining"
        holder.ok("detach", grant=grant, clean=True)
        assert request.answer()["generation"] == 2
    assert vault(client) == ("ready", 2)


class _Upgraded:
    """As much of a service as the waiting of an upgrade needs; whoever holds the enclave keeps it."""

    def __init__(self) -> None:
        self.intent: dict[str, Any] = {}
        self.deadlines: list[float] = []
        self.state = self.lifecycle = self

    def intend(self, _client: object, intent: dict[str, Any], _request: int) -> None:
        self.intent = intent

    def begin(self, _enclave: object, _reason: str) -> None:
        pass

    async def drain_one(self, _enclave: object, deadline: float, *_: object) -> dict[str, object]:
        self.deadlines.append(deadline - trio.current_time())
        return {"left": 1, "busy": 0}


async def test_an_upgrade_that_is_asked_for_again_has_what_is_left_of_its_time() -> None:
    service: Any = _Upgraded()
    nothing: Any = SimpleNamespace(
        name="vault", upgrading=False, identity=SimpleNamespace(uid=0), built=SimpleNamespace(mrenclave=b"")
    )
    args: Any = SimpleNamespace(enclave="vault", deadline=600.0, force=False, lose_state=False)

    async def wait(until: float | None) -> float:
        with pytest.raises(errors.Busy):
            await Upgrades(service)._replace(nothing, 1, args, nothing, nothing, until)
        return float(service.deadlines[-1])

    assert await wait(None) == pytest.approx(600.0, abs=60.0)
    first = service.intent["until"]
    assert await wait(first - 500.0) <= 100.0
    assert await wait(first - 1000.0) == pytest.approx(0.0, abs=1.0)
    assert service.intent["until"] == first, "a deadline is written down once"
