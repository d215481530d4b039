"""Draining an enclave or the whole host, and taking it into use again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from images import Images
from raw_client import RawClient
from running_broker import RunningBroker

Connect = Callable[..., RawClient]
Policy = Callable[..., str]


def state_of(client: RawClient, name: str = "vault") -> tuple[str, int]:
    (info,) = [info for info in client.ok("enclaves")["enclaves"] if info["name"] == name]
    return info["state"], info["generation"]


def test_a_drain_tells_the_holders_and_returns_when_they_have_left(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    admin, holder, late = (connect(vault_broker) for _ in range(3))
    first = holder.ok("attach", enclave="vault", slots=2)["grant"]
    second = holder.ok("attach", enclave="vault", slots=1)["grant"]
    number = admin.post("drain", enclave="vault", deadline=60, reason="new kernel")
    assert holder.event() == {"event": "draining", "enclave": "vault", "generation": 1}
    error = late.fails("attach", "draining", enclave="vault")
    assert "new kernel" in error["message"]
    holder.fails("slots.acquire", "draining", grant=first)
    holder.ok("detach", grant=first, clean=True)
    holder.ok("detach", grant=second, clean=True)
    (told,) = admin.reply(number)["ok"]["enclaves"]
    assert told == {"enclave": "vault", "held": 2, "revoked": 0, "left": 0, "leaked": 0, "busy": 0}
    assert state_of(admin) == ("draining", 1)
    assert not holder.events, "one event for each connection, however many grants it holds"


def test_what_is_held_at_the_deadline_is_said_and_goes_on(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    admin, holder = connect(vault_broker), connect(vault_broker)
    grant = holder.ok("attach", enclave="vault", slots=2)["grant"]
    (told,) = admin.ok("drain", enclave="vault", deadline=0)["enclaves"]
    assert (told["held"], told["left"], told["revoked"]) == (1, 1, 0)
    assert [event["event"] for event in [holder.event()]] == ["draining"]
    holder.ok("slots.release", grant=grant, slots=[2], clean=True)
    (record,) = [record for record in vault_broker.log() if record["event"] == "not drained"]
    assert record["grants"] == 1


def test_with_force_what_is_held_at_the_deadline_is_revoked(
    broker: Callable[..., RunningBroker], vault_policy: Policy, connect: Connect
) -> None:
    running = broker(vault_policy("revoke_grace = 0.0"))
    admin, holder = connect(running), connect(running)
    holder.ok("attach", enclave="vault", slots=2)
    (told,) = admin.ok("drain", enclave="vault", deadline=0, force=True)["enclaves"]
    assert (told["held"], told["revoked"]) == (1, 1)
    assert told["leaked"] == 2, "it neither ended nor acknowledged, and nobody may kill it"
    assert [holder.event()["event"] for _ in range(2)] == ["draining", "revoked"]


def test_a_drained_enclave_is_taken_into_use_again(vault_broker: RunningBroker, connect: Connect) -> None:
    admin, holder = connect(vault_broker), connect(vault_broker)
    holder.ok("attach", enclave="vault")
    admin.ok("drain", enclave="vault", deadline=0)
    assert admin.ok("undrain", enclave="vault") == {"enclaves": ["vault"], "failed": []}
    assert [holder.event()["event"] for _ in range(2)] == ["draining", "ready"]
    assert state_of(admin) == ("ready", 1)
    connect(vault_broker).ok("attach", enclave="vault")


def test_who_waits_for_slots_hears_of_the_drain_at_once(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    admin, holder, waiter = (connect(vault_broker) for _ in range(3))
    total = admin.ok("enclaves")["enclaves"][0]["slots"]["total"]
    holder.ok("attach", enclave="vault", slots=total)
    number = waiter.post("attach", enclave="vault", wait=30)
    while admin.ok("enclaves")["enclaves"][0]["slots"]["waiting"] == 0:
        pass
    admin.ok("drain", enclave="vault", deadline=0)
    assert waiter.reply(number)["error"]["code"] == "draining"


def test_a_drained_enclave_can_be_destroyed(vault_broker: RunningBroker, connect: Connect) -> None:
    admin = connect(vault_broker)
    admin.ok("drain", enclave="vault", deadline=0)
    assert admin.ok("destroy", enclave="vault") == {"revoked": 0}
    admin.fails("undrain", "not-found", enclave="vault")


def test_only_owner_and_administrators_drain_and_only_these_the_whole_host(
    broker: Callable[..., RunningBroker], vault_policy: Policy, connect: Connect
) -> None:
    policy = vault_policy().replace("uids = [0]", "uids = [4242]")
    running = broker(policy)
    owner = connect(running)
    owner.fails("drain", "denied", all=True)
    owner.fails("undrain", "denied", all=True)
    owner.ok("drain", enclave="vault", deadline=0)
    running = broker(policy.replace('name = "vault"', 'name = "vault"\nowner = 4243'))
    stranger = connect(running)
    stranger.fails("drain", "denied", enclave="vault", deadline=0)
    stranger.fails("undrain", "denied", enclave="vault")
    stranger.fails("drain", "denied", enclave="nothing")


def test_a_drain_names_one_enclave_or_all(vault_broker: RunningBroker, connect: Connect) -> None:
    for op in ("drain", "undrain"):
        connect(vault_broker).fails(op, "protocol-error")
        connect(vault_broker).fails(op, "protocol-error", enclave="vault", all=True)


def test_the_host_is_emptied_and_filled_again(
    broker: Callable[..., RunningBroker], vault_policy: Policy, images: Images, connect: Connect
) -> None:
    running = broker(vault_policy(more="[[create]]\nuid = 0\n"))
    admin, client = connect(running), connect(running)
    with images.vault.sgxs.open("rb") as file:
        sigstruct = images.vault.sigstruct.read_bytes()
        admin.ok("create", (file.fileno(),), name="mine", sigstruct=sigstruct)
    grant = client.ok("attach", enclave="mine")["grant"]
    (mine, vault) = admin.ok("drain", all=True, deadline=0)["enclaves"]
    assert (mine["left"], mine["emptied"]) == (1, False)
    assert (vault["left"], vault["emptied"]) == (0, True)
    client.ok("detach", grant=grant, clean=True)
    (mine,) = admin.ok("drain", all=True, deadline=20)["enclaves"]
    assert mine["emptied"]
    assert admin.ok("enclaves")["enclaves"] == []
    stats = admin.ok("stats")["stats"]
    assert (stats["lifecycle"], stats["addresses"]["ranges"]) == ({"draining": 0, "stored": 2}, 0)
    assert "undrain --all" in client.fails("attach", "draining", enclave="mine")["message"]
    with images.vault.sgxs.open("rb") as file:
        client.fails("create", "draining", (file.fileno(),), name="another", sigstruct=sigstruct)
    back = admin.ok("undrain", all=True)
    assert sorted(back["enclaves"]) == ["mine", "vault"]
    assert state_of(admin, "mine") == state_of(admin, "vault") == ("ready", 2)
    client.ok("attach", enclave="mine")


def test_an_image_that_is_gone_when_the_host_is_filled_again_is_said_and_kept_for_another_try(
    broker: Callable[..., RunningBroker],
    images: Images,
    vault_policy: Policy,
    connect: Connect,
    tmp_path: Path,
) -> None:
    image = tmp_path / "vault.sgxs"
    content = images.vault.sgxs.read_bytes()
    image.write_bytes(content)
    running = broker(vault_policy().replace(str(images.vault.sgxs), str(image)))
    admin = connect(running)
    admin.ok("drain", all=True, deadline=0)
    image.write_bytes(content[: len(content) // 2])
    (failed,) = admin.ok("undrain", all=True)["failed"]
    assert failed["enclave"] == "vault"
    image.write_bytes(content)
    assert admin.ok("undrain", all=True) == {"enclaves": ["vault"], "failed": []}
    assert state_of(admin, "vault") == ("ready", 2)


def test_an_image_that_its_sender_changes_later_is_built_again_as_it_was(
    broker: Callable[..., RunningBroker],
    images: Images,
    vault_policy: Policy,
    connect: Connect,
    tmp_path: Path,
) -> None:
    running = broker(vault_policy(more="[[create]]\nuid = 0\n"))
    admin = connect(running)
    image = tmp_path / "image"
    image.write_bytes(images.vault.sgxs.read_bytes())
    with image.open("rb") as file:
        sigstruct = images.vault.sigstruct.read_bytes()
        admin.ok("create", (file.fileno(),), name="mine", sigstruct=sigstruct)
    admin.ok("drain", all=True, deadline=0)
    image.write_bytes(b"")
    assert admin.ok("undrain", all=True)["failed"] == []
    assert state_of(admin, "mine") == ("ready", 2)
