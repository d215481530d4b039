"""Enclaves that a broker was making or taking down when it died, with the death at a chosen moment."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from images import Images
from played_manager import HeldBarriers, Message, PlayedManager, played_manager
from raw_client import RawClient, raw_client

POLICY = f"[administrators]\nuids = [0]\n[[create]]\nuid = {os.geteuid()}\n"


def kinds(manager: PlayedManager) -> list[str]:
    """What is in the store, without the listener and the snapshot that always are."""
    return sorted(name.rpartition("-")[0] for name in list(manager.stored) if "-" in name)


def about_an_enclave(message: Message) -> bool:
    """Whether it is one of those that come when an enclave is made or taken down."""
    return bool(message.keys() & {"FDSTORE", "FDSTOREREMOVE", "BARRIER"})


def make(client: RawClient, images: Images, name: str = "mine") -> tuple[int, Callable[[], None]]:
    """Ask for an enclave; returns the request's number and what asks again."""
    args = {"name": name, "sigstruct": images.vault.sigstruct.read_bytes()}
    with images.vault.sgxs.open("rb") as image:
        number = client.post("create", (image.fileno(),), **args)

    def again() -> None:
        with images.vault.sgxs.open("rb") as image:
            client.send({"id": number, "op": "create", "args": args}, (image.fileno(),))

    return number, again


@pytest.mark.parametrize("removed", [0, 1, 2, 3])
def test_a_destroy_that_is_asked_again_is_answered_when_the_store_has_nothing_left(
    images: Images, tmp_path: Path, removed: int
) -> None:
    """The broker dies after it took so many of the enclave's descriptors out of the store."""
    with played_manager(tmp_path, POLICY) as manager, raw_client(manager.socket) as client:
        assert "ok" in client.reply(make(client, images)[0])
        assert kinds(manager) == ["arena", "enclave", "image"]
        dead = threading.Event()
        done: list[str] = []

        def die(message: Message) -> bool:
            if not about_an_enclave(message):
                return True
            if message.get("FDSTOREREMOVE") == "1" and len(done) < removed:
                done.append(message["FDNAME"])
                return True
            assert manager.broker is not None
            manager.broker.kill()
            dead.set()
            return False

        manager.heed = die
        number = client.post("destroy", enclave="mine")
        assert dead.wait(30)
        manager.kill()
        assert len(kinds(manager)) == 3 - removed
        held = HeldBarriers()
        manager.heed = held
        starting = threading.Thread(target=manager.start)  # it is ready when the leftovers are gone
        starting.start()
        try:
            client.reconnect()
            client.send({"id": number, "op": "destroy", "args": {"enclave": "mine"}})
            if removed < 3:
                client.ok("ping")  # answered before the destroy is
                assert client.ok("enclaves")["enclaves"] == [] or not removed
        finally:
            held.release()
            starting.join()
        assert client.reply(number)["ok"] == {"revoked": 0}
        assert kinds(manager) == []
        assert client.ok("enclaves")["enclaves"] == []
        assert "ok" in client.reply(make(client, images)[0])
        assert kinds(manager) == ["arena", "enclave", "image"]


def test_an_undrain_that_comes_while_the_broker_starts_brings_each_enclave_back_once(
    images: Images, tmp_path: Path, vault_policy: Callable[..., str]
) -> None:
    with played_manager(tmp_path, vault_policy()) as manager, raw_client(manager.socket) as client:
        client.ok("drain", all=True)
        assert kinds(manager) == ["image"]
        manager.kill()
        manager.stored["image-9999"] = os.memfd_create("left over")  # what the start waits for
        held = HeldBarriers()
        manager.heed = held
        starting = threading.Thread(target=manager.start)
        starting.start()
        try:
            client.reconnect()
            number = client.post("undrain", all=True)
            with raw_client(manager.socket) as other:  # `busy` when it is being built
                while other.call("attach", enclave="vault", wait=0)["error"]["code"] == "draining":
                    pass
        finally:
            held.release()
            starting.join()
        assert client.reply(number)["ok"] == {"enclaves": ["vault"], "failed": []}
        assert kinds(manager) == ["arena", "enclave", "image"]
        (info,) = client.ok("enclaves")["enclaves"]
        assert info["generation"] == 2


@pytest.mark.parametrize("stored", [1, 2, 3])
def test_a_create_that_is_asked_again_finds_nothing_left_of_the_first_try(
    images: Images, tmp_path: Path, stored: int
) -> None:
    """The broker dies after it put so many of the enclave's descriptors into the store."""
    with played_manager(tmp_path, POLICY) as manager, raw_client(manager.socket) as client:
        dead = threading.Event()

        def die(message: Message) -> bool:
            if not about_an_enclave(message):
                return True
            if message.get("FDSTORE") == "1" and len(kinds(manager)) < stored:
                return True
            assert manager.broker is not None
            manager.broker.kill()
            dead.set()
            return False

        manager.heed = die
        number, again = make(client, images)
        assert dead.wait(30)
        manager.kill()
        assert len(kinds(manager)) == stored
        most = 0

        def watch(message: Message) -> bool:
            nonlocal most
            most = max(most, len(kinds(manager)) + (message.get("FDSTORE") == "1"))
            return True

        manager.heed = watch
        manager.start()
        client.reconnect()
        again()
        assert "ok" in client.reply(number)
        assert kinds(manager) == ["arena", "enclave", "image"]
        assert most == 3, "the first try's descriptors were in the store beside the second's"
        assert len(client.ok("enclaves")["enclaves"]) == 1
