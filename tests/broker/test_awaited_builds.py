"""Who attaches to an enclave that is being built waits for it, as for a slot."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from images import Images
from played_manager import HeldBarriers, played_manager
from raw_client import raw_client

EMPTY = "[administrators]\nuids = [0]\n"


def entry(
    images: Images, name: str = "vault", *, image: Path | None = None, uid: int = 0, extra: str = ""
) -> str:
    return f"""
[[enclave]]
name = "{name}"
image = "{image or images.vault.sgxs}"
sigstruct = "{images.vault.sigstruct}"
{extra}
[[enclave.attach]]
uid = {uid}
"""


@contextmanager
def slow_broker(
    folder: Path, policy: str, *, leftover: bool = False
) -> Iterator[tuple[str, Callable[[], None]]]:
    """A broker that listens, and finishes no enclave of its policy before what is yielded is called.

    `leftover`: it has not even begun, since it tidies up after a last one.
    """
    with played_manager(folder, EMPTY) as manager:
        manager.kill()  # the manager listens on for the next one
        (folder / "broker.toml").write_text(EMPTY + policy)
        if leftover:
            manager.stored["image-9999"] = os.memfd_create("left over")
        held = HeldBarriers()
        manager.heed = held
        starting = threading.Thread(target=manager.start)
        starting.start()
        try:
            yield manager.socket, held.release
        finally:
            held.release()
            starting.join()


@pytest.mark.parametrize("leftover", [False, True])
def test_an_attach_while_the_broker_starts_is_answered_when_the_enclave_is_there(
    images: Images, tmp_path: Path, leftover: bool
) -> None:
    with (
        slow_broker(tmp_path, entry(images), leftover=leftover) as (path, finish),
        raw_client(path) as client,
    ):
        number = client.post("attach", enclave="vault")
        client.ok("ping")  # answered first: the other one waits
        finish()
        assert client.reply(number)["ok"]["enclave"]["name"] == "vault"


def test_an_attach_waits_no_longer_than_it_said_and_the_policy_lets_it(
    images: Images, tmp_path: Path
) -> None:
    policy = entry(images) + entry(images, "hurried", extra="wait = 0.25")
    with slow_broker(tmp_path, policy) as (path, finish), raw_client(path) as client:
        for name, wait, waited, maximum in (("vault", 0.125, 0.125, 30.0), ("hurried", 60.0, 0.25, 0.25)):
            error = client.fails("attach", "busy", enclave=name, wait=wait)
            assert f"{name!r} is being built" in error["message"]
            assert error["detail"] == {
                "limit": "wait", "maximum": maximum, "setting": "[[enclave]] wait", "waited": waited
            }  # fmt: skip
        finish()
        client.ok("attach", enclave="vault")


def test_an_attach_that_waits_for_a_build_which_fails_is_told_so(images: Images, tmp_path: Path) -> None:
    bad = tmp_path / "bad.sgxs"
    bad.write_bytes(images.vault.sgxs.read_bytes()[:-100])
    policy = entry(images) + entry(images, "bad", image=bad)
    with slow_broker(tmp_path, policy) as (path, finish), raw_client(path) as client:
        number = client.post("attach", enclave="bad")
        client.ok("ping")
        finish()
        error = client.reply(number)["error"]
        assert error["code"] == "not-found"
        assert "could not be built" in error["message"]


def test_who_may_not_have_the_enclave_is_denied_at_once(images: Images, tmp_path: Path) -> None:
    with (
        slow_broker(tmp_path, entry(images, uid=12345)) as (path, _finish),
        raw_client(path) as client,
    ):
        client.fails("attach", "denied", enclave="vault")


def test_a_policy_that_is_taken_while_the_enclave_is_built_is_the_enclave_s(
    images: Images, tmp_path: Path
) -> None:
    with slow_broker(tmp_path, entry(images)) as (path, finish), raw_client(path) as client:
        number = client.post("attach", enclave="vault")
        client.ok("ping")
        (tmp_path / "broker.toml").write_text(EMPTY + entry(images, uid=12345))
        client.ok("reload")
        client.fails("attach", "denied", enclave="vault")
        finish()
        assert client.reply(number)["error"]["code"] == "denied"
