"""One name, one enclave: operations that would give or take a name at the same time."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from images import BuiltImage, Images
from raw_client import RawClient
from running_broker import RunningBroker

Broker = Callable[..., RunningBroker]
Connect = Callable[..., RawClient]
Policy = Callable[..., str]

CREATE = "[[create]]\nuid = 0\nrequire_sdk = false\n"


@pytest.fixture
def running(broker: Broker, vault_policy: Policy) -> RunningBroker:
    return broker(vault_policy(more=CREATE))


def post_create(client: RawClient, image: BuiltImage, name: str, **args: Any) -> int:
    with image.sgxs.open("rb") as file:
        return client.post(
            "create", (file.fileno(),), name=name, sigstruct=image.sigstruct.read_bytes(), **args
        )


def create(client: RawClient, image: BuiltImage, name: str) -> dict[str, Any]:
    return client.reply(post_create(client, image, name))


def enclaves(client: RawClient) -> dict[str, int]:
    """Name and generation; and there are no others that have none."""
    found = {info["name"]: info["generation"] for info in client.ok("enclaves")["enclaves"]}
    stats = client.ok("stats")["stats"]
    assert stats["addresses"]["ranges"] == len(found), "an enclave without a name is left"
    return found


def test_what_comes_back_to_a_filled_host_keeps_its_name(
    running: RunningBroker, images: Images, connect: Connect
) -> None:
    client = connect(running)
    client.ok("drain", all=True)
    undrained = client.post("undrain", all=True)
    created = post_create(client, images.vault, "vault")
    refusal = client.reply(created)["error"]["message"]  # whether it is on its way back yet or is there
    assert re.search("was taken down to empty the host|is being built|there is an enclave", refusal), refusal
    assert client.reply(undrained)["ok"] == {"enclaves": ["vault"], "failed": []}
    assert enclaves(client) == {"vault": 2}
    client.ok("attach", enclave="vault")


def test_what_could_not_be_built_again_can_be_destroyed_and_its_name_is_free_then(
    broker: Broker, vault_policy: Policy, images: Images, connect: Connect, tmp_path: Path
) -> None:
    image = tmp_path / "vault.sgxs"
    image.write_bytes(images.vault.sgxs.read_bytes())
    running = broker(vault_policy(more=CREATE).replace(str(images.vault.sgxs), str(image)))
    client = connect(running)
    client.ok("drain", all=True)
    image.write_bytes(b"")
    (failed,) = client.ok("undrain", all=True)["failed"]
    assert failed["enclave"] == "vault"
    assert "destroy gives it up" in create(client, images.vault, "vault")["error"]["message"]
    assert client.ok("destroy", enclave="vault") == {"revoked": 0}
    assert client.ok("stats")["stats"]["lifecycle"]["stored"] == 0
    client.fails("destroy", "not-found", enclave="vault")
    assert "ok" in create(client, images.vault, "vault")
    assert enclaves(client) == {"vault": 1}


def test_an_emptied_enclave_that_is_destroyed_costs_its_maker_nothing_and_does_not_come_back(
    running: RunningBroker, images: Images, connect: Connect
) -> None:
    client = connect(running)
    assert "ok" in create(client, images.vault, "mine")
    client.ok("drain", all=True)
    (user,) = client.ok("stats")["stats"]["users"]
    assert user["used"]["pages"] > 0
    client.ok("destroy", enclave="mine")
    (user,) = client.ok("stats")["stats"]["users"]
    assert user["used"]["pages"] == 0
    assert client.ok("undrain", all=True)["enclaves"] == ["vault"]
    assert enclaves(client) == {"vault": 2}


def test_only_owner_and_administrators_destroy_what_was_taken_down(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    policy = vault_policy().replace('name = "vault"', 'name = "vault"\nowner = 4243')
    running = broker(policy)
    connect(running).ok("drain", all=True)
    (running.folder / "broker.toml").write_text(policy)
    client = connect(running)
    client.ok("destroy", enclave="vault")  # an administrator
    running = broker(policy.replace("uids = [0]", "uids = [4242]"))
    connect(running).fails("destroy", "denied", enclave="vault")
    connect(running).fails("destroy", "denied", enclave="nothing")


def test_what_is_being_made_when_the_host_is_emptied_is_taken_down_before_the_answer(
    running: RunningBroker, images: Images, connect: Connect
) -> None:
    client = connect(running)
    created = post_create(client, images.vault, "mine")
    drained = client.post("drain", all=True)
    assert client.reply(created)["error"]["code"] == "draining"
    assert [told["emptied"] for told in client.reply(drained)["ok"]["enclaves"]] == [True]
    assert enclaves(client) == {}


def test_what_was_coming_back_when_the_host_is_emptied_again_stays_away(
    running: RunningBroker, connect: Connect
) -> None:
    client = connect(running)
    client.ok("drain", all=True)
    undrained, drained = client.post("undrain", all=True), client.post("drain", all=True)
    (failed,) = client.reply(undrained)["ok"]["failed"]
    assert "is being emptied" in failed["reason"]
    assert client.reply(drained)["ok"]["enclaves"] == []
    assert enclaves(client) == {}
    assert client.ok("undrain", all=True) == {"enclaves": ["vault"], "failed": []}
    assert enclaves(client) == {"vault": 2}


def test_an_enclave_that_is_destroyed_while_the_host_is_emptied_is_taken_down_once(
    running: RunningBroker, images: Images, connect: Connect
) -> None:
    client = connect(running)
    for ops in (("drain", "destroy"), ("destroy", "drain")):
        assert "ok" in create(client, images.vault, "mine")
        drain, destroy = {"all": True}, {"enclave": "mine", "force": True}
        numbers = [client.post(op, **(drain if op == "drain" else destroy)) for op in ops]
        replies = {message["id"]: message for message in (client.receive(), client.receive()) if message}
        assert all("ok" in replies[number] for number in numbers), replies
        assert enclaves(client) == {}
        client.ok("undrain", all=True)
        assert list(enclaves(client)) == ["vault"]


def test_an_enclave_that_is_destroyed_while_it_is_upgraded_ends_with_both_generations(
    running: RunningBroker, images: Images, connect: Connect
) -> None:
    admin, other, holder = (connect(running) for _ in range(3))
    grant = holder.ok("attach", enclave="vault")["grant"]
    with images.vault.sgxs.open("rb") as file:
        upgraded = admin.post(
            "upgrade", (file.fileno(),), enclave="vault", deadline=60,
            sigstruct=images.vault.sigstruct.read_bytes(),
        )  # fmt: skip
    assert holder.event()["event"] == "draining"
    destroyed = other.post("destroy", enclave="vault", force=True)
    assert holder.event()["event"] == "revoked"
    holder.ok("detach", grant=grant, clean=True)
    assert other.reply(destroyed)["ok"] == {"revoked": 1}
    assert admin.reply(upgraded)["error"]["code"] in ("enclave-lost", "image-error")
    assert enclaves(other) == {}


def test_a_new_enclave_does_not_wait_for_the_rebuild_of_one_that_had_its_name(
    broker: Broker, images: Images, connect: Connect, tmp_path: Path
) -> None:
    image = tmp_path / "bare.sgxs"
    image.write_bytes(images.bare.sgxs.read_bytes())
    running = broker(
        f'[administrators]\nuids = [0]\n[[enclave]]\nname = "bare"\nimage = "{image}"\n'
        f'sigstruct = "{images.bare.sigstruct}"\nrequire_sdk = false\nrebuild_pause = 3600.0\n'
        f"[[enclave.attach]]\nuid = 0\n{CREATE}"
    )
    client = connect(running)
    total = client.ok("enclaves")["enclaves"][0]["slots"]["total"]
    grant = client.ok("attach", enclave="bare", slots=total)["grant"]
    image.write_bytes(b"")  # its next generation fails at once, and again only after the pause
    client.ok("detach", grant=grant, clean=True)  # without an SDK a slot is used once
    while not client.ok("stats")["stats"]["generations"]["failed"]:
        pass
    assert client.ok("stats")["stats"]["generations"]["pending"] == 1
    client.ok("destroy", enclave="bare")
    assert "ok" in create(client, images.bare, "bare")
    client.ok("attach", enclave="bare", wait=0)
    assert enclaves(client) == {"bare": 1}
    assert client.ok("stats")["stats"]["generations"]["pending"] == 0
