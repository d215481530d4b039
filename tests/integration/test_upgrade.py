"""A new image for an enclave that is in use: nothing that was written is lost, and nobody is turned away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from images import BuiltImage, Images
from policies import enclave_policy
from running_broker import RunningBroker

import teemate
from teemate.image import SigParams
from teemate.vault import PRIVATE, SHARED, Entry, Vault

StartBroker = Callable[..., RunningBroker]


@pytest.fixture
def next_image(images: Images) -> BuiltImage:
    """The vault with more slots: another MRENCLAVE, of the same signer and product."""
    return images.build("vault", heap="8M", slots=14)


@pytest.fixture
def upgrade_policy(images: Images) -> str:
    uid = os.geteuid()
    return (
        f"[administrators]\nuids = [{uid}]\n[[create]]\nuid = {uid}\n"
        + enclave_policy("vault", images.vault, "revoke_grace = 20.0")
        + enclave_policy("faults", images.faults, "")
    )


def info_of(connection: teemate.Broker, name: str) -> teemate.EnclaveInfo:
    (info,) = [info for info in connection.enclaves() if info.name == name]
    return info


def space_of(number: int) -> int:
    return PRIVATE if number % 2 else SHARED


def got(slot: teemate.Slot, key: bytes, space: int = SHARED) -> Entry:
    entry = Vault(slot, space).get(key)
    assert entry is not None
    return entry


def fill(connection: teemate.Broker, count: int) -> dict[bytes, int]:
    """Values in the shared and in this user's own space, some of them large; returns their versions."""
    versions = {}
    with connection.attach("vault") as enclave, enclave.slot() as slot:
        for number in range(count):
            key = f"key {number}".encode()
            value = bytes([number % 256]) * (number * 131 % 3000)
            versions[key] = Vault(slot, space_of(number)).put(key, value)
        vault = Vault(slot)
        vault.put(b"largest", b"x" * 65536)
        vault.put(b"deleted", b"x")
        vault.delete(b"deleted")
    return versions


def test_everything_is_handed_over_and_versions_never_repeat(
    broker: StartBroker, upgrade_policy: str, next_image: BuiltImage
) -> None:
    running = broker(upgrade_policy)
    with teemate.connect(running.socket) as admin:
        versions = fill(admin, 300)
        done = admin.upgrade("vault", next_image.sgxs, next_image.sigstruct)
        assert (done.generation, done.mrenclave) == (2, next_image.mrenclave)
        assert (done.held, done.revoked, done.entries) == (0, 0, 301)
        info = info_of(admin, "vault")
        assert (info.state, info.generation, info.mrenclave) == ("ready", 2, next_image.mrenclave)
        with admin.attach("vault") as enclave, enclave.slot() as slot:
            for number in range(300):
                key = f"key {number}".encode()
                found = got(slot, key, space_of(number))
                assert found.value == bytes([number % 256]) * (number * 131 % 3000)
                assert found.version > max(versions.values())
            assert Vault(slot).get(b"deleted") is None
            assert len(got(slot, b"largest").value) == 65536
        while admin.stats()["generations"]["retired"]:
            pass
        assert admin.stats()["addresses"]["ranges"] == 2
    (record,) = [record for record in running.log() if record["event"] == "upgraded"]
    assert record["entries"] == 301


def test_who_holds_the_old_one_is_told_and_what_it_writes_until_it_leaves_is_there(
    broker: StartBroker, upgrade_policy: str, next_image: BuiltImage
) -> None:
    running = broker(upgrade_policy)
    results: list[teemate.Upgraded] = []
    with teemate.connect(running.socket) as admin, teemate.connect(running.socket) as client:
        with client.attach("vault") as enclave, enclave.slot() as slot:
            Vault(slot).put(b"first", b"1")
            thread = threading.Thread(
                target=lambda: results.append(
                    admin.upgrade("vault", next_image.sgxs, next_image.sigstruct, deadline=60)
                )
            )
            thread.start()
            while not enclave.draining:
                client.ping()
            Vault(slot).put(b"last", b"2")  # calls go on until it leaves
        with client.attach("vault", wait=60) as enclave, enclave.slot() as slot:
            assert enclave.mrenclave == next_image.mrenclave, "it waited, and got the new one"
            assert got(slot, b"first").value == b"1"
            assert got(slot, b"last").value == b"2"
        thread.join(60)
    assert [(done.held, done.revoked, done.entries) for done in results] == [(1, 0, 2)]


def test_who_does_not_leave_keeps_the_old_one_unless_it_is_forced(
    broker: StartBroker, upgrade_policy: str, next_image: BuiltImage
) -> None:
    running = broker(upgrade_policy)
    with teemate.connect(running.socket) as admin, teemate.connect(running.socket) as client:
        with client.attach("vault") as enclave:
            with enclave.slot() as slot:
                Vault(slot).put(b"key", b"value")
            with pytest.raises(teemate.Busy, match="nothing was changed"):
                admin.upgrade("vault", next_image.sgxs, next_image.sigstruct, deadline=0)
            info = info_of(admin, "vault")
            assert (info.state, info.generation) == ("ready", 1)
            with enclave.slot() as slot:
                assert got(slot, b"key").value == b"value"
            done = admin.upgrade("vault", next_image.sgxs, next_image.sigstruct, deadline=0, force=True)
            assert (done.held, done.revoked, done.entries) == (1, 1, 1)
            with pytest.raises(teemate.Revoked), enclave.slot() as slot:
                slot.call("empty")
        with client.attach("vault") as enclave, enclave.slot() as slot:
            assert got(slot, b"key").value == b"value"


def test_an_image_of_another_product_or_without_a_hand_over_changes_nothing(
    broker: StartBroker, upgrade_policy: str, images: Images
) -> None:
    running = broker(upgrade_policy)
    other = images.build("vault", heap="8M", slots=14, sign=SigParams(isvprodid=7))
    with teemate.connect(running.socket) as admin:
        fill(admin, 3)
        with pytest.raises(teemate.ImageError, match="same signer and product"):
            admin.upgrade("vault", other.sgxs, other.sigstruct)
        with pytest.raises(teemate.Unsupported, match="lose_state"):
            admin.upgrade("faults", images.faults.sgxs, images.faults.sigstruct)
        with pytest.raises(teemate.Denied):
            admin.upgrade("vault", images.bare.sgxs, images.bare.sigstruct)
        with pytest.raises(teemate.ImageError):
            admin.upgrade("vault", images.vault.sigstruct, images.vault.sigstruct)
        info = info_of(admin, "vault")
        assert (info.state, info.generation) == ("ready", 1)
        with admin.attach("vault") as enclave, enclave.slot() as slot:
            assert got(slot, b"key 0").value == b""
        done = admin.upgrade("faults", images.faults.sgxs, images.faults.sigstruct, lose_state=True)
        assert (done.generation, done.entries) == (2, 0)
        assert admin.stats()["addresses"]["ranges"] <= 3


def test_the_command_takes_the_new_image(
    broker: StartBroker, upgrade_policy: str, next_image: BuiltImage
) -> None:
    running = broker(upgrade_policy)
    with teemate.connect(running.socket) as admin:
        fill(admin, 2)
    command = [sys.executable, "-c", "from teemate.cli.main import main; main()"]
    arguments = ["upgrade", "vault", str(next_image.sgxs), "--socket", running.socket, "--json"]
    done = subprocess.run([*command, *arguments], capture_output=True, check=True)
    told = json.loads(done.stdout)
    assert (told["generation"], told["entries"]) == (2, 3)
    assert told["mrenclave"] == next_image.mrenclave.hex()
