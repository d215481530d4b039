"""Who is refused slots hears who has them, as far as that is its business."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from backends import SHARING
from raw_client import RawClient
from running_broker import RunningBroker

from teemate._containers import container_name
from teemate.broker.connections.identity import Identity
from teemate.broker.policy.limits import TokenBucket
from teemate.broker.policy.rules import Administrators
from teemate.broker.slots.shortage import shortage
from teemate.broker.slots.table import SlotTable

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.enclaves.enclave import Enclave
    from teemate.broker.service import Service

Broker = Callable[..., RunningBroker]
Connect = Callable[..., RawClient]
Policy = Callable[..., str]

ID = "3f9a51c07be2" + "0" * 52


@contextmanager
def user(uid: int) -> Iterator[None]:
    """Connect as that user."""
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="connects as other users")
@pytest.mark.parametrize(("asks", "sees"), [(4001, True), (0, True), (4002, False), (4003, False)])
def test_owner_and_administrators_hear_names_and_others_of_themselves_only(
    broker: Broker, vault_policy: Policy, connect: Connect, asks: int, sees: bool
) -> None:
    running = broker(vault_policy(f"owner = 4001\nslots_per_client = 64\n{SHARING}", attach='uid = "*"'))
    with user(4001):
        owners = connect(running)
    with user(4002):
        strangers = connect(running)
    total = owners.ok("enclaves")["enclaves"][0]["slots"]["total"]
    owners.ok("attach", enclave="vault", slots=total - 2)
    strangers.ok("attach", enclave="vault", slots=2)
    with user(asks):
        asking = connect(running)
    error = asking.fails("attach", "busy", enclave="vault", slots=1, wait=0)
    text, detail = error["message"], error["detail"]
    assert text.startswith(f"vault: all {total} slots in use: ")
    assert "wait=0 s for a slot elapsed ([[enclave]] wait bounds it, 30 s)" in text
    assert text.endswith("slots is set at image build, see `teemate image build --slots`")
    assert (detail["limit"], detail["maximum"], detail["used"]) == ("slots of the image", total, total)
    holders = {holder["uid"]: holder["slots"] for holder in detail.get("holders", [])}
    if sees:
        assert f"{total - 2} by uid 4001 (" in text
        assert "2 by uid 4002 (" in text
        assert holders == {4001: total - 2, 4002: 2}
    elif asks == 4002:
        assert "2 by uid 4002 (" in text
        assert f"{total - 2} by other users" in text
        assert holders == {4002: 2}
    else:
        assert f"{total} by other users" in text
        assert holders == {}
    if not sees:
        told = repr(error)
        assert "4001" not in told
        assert str(os.getpid()) not in told or asks == 4002


def test_slots_that_are_not_in_use_are_explained_too(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    running = broker(vault_policy("slots_per_client = 64"))
    holder, asking = connect(running), connect(running)
    total = holder.ok("enclaves")["enclaves"][0]["slots"]["total"]
    attached = holder.ok("attach", enclave="vault", slots=total)
    indices = [slot["slot"] for slot in attached["slots"][:3]]
    holder.ok("slots.release", grant=attached["grant"], slots=indices)
    text = asking.fails("attach", "busy", enclave="vault", slots=1, wait=0)["message"]
    assert f"vault: {total - 3} of {total} slots in use: {total - 3} by uid {os.geteuid()} (" in text
    assert "3 withheld from processes that may still use them" in text


def test_a_user_at_its_limit_hears_where_its_processes_are(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    running = broker(vault_policy("clients_per_uid = 2", "[limits]\ngrants = 3\nslots = 2\n"))
    one, other = connect(running), connect(running)
    one.ok("attach", enclave="vault", slots=1)
    other.ok("attach", enclave="vault", slots=1)
    error = connect(running).fails("attach", "limit-reached", enclave="vault")
    assert f"uid {os.geteuid()} has 2 of 2 clients on enclave 'vault' (" in error["message"]
    error = one.fails("attach", "limit-reached", enclave="vault", slots=1)
    assert "holds 2 of 2 slots and asked for 1 more" in error["message"]
    assert "(its processes: " in error["message"]
    assert error["detail"]["setting"] == "[limits] slots"
    one.ok("attach", enclave="vault", slots=0)
    error = one.fails("attach", "limit-reached", enclave="vault", slots=0)
    assert "holds 3 of 3 grants" in error["message"]


@pytest.mark.parametrize(
    ("cgroup", "name"),
    [
        ("/", ""),
        ("", ""),
        ("/system.slice/ssh.service", "ssh.service"),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
        (f"/system.slice/docker-{ID}.scope", "docker-3f9a51c07be2"),
        (f"/docker/{ID}", "docker-3f9a51c07be2"),
        (f"/machine.slice/libpod-{ID}.scope/container", "libpod-3f9a51c07be2"),
        (
            f"/kubepods.slice/kubepods-burstable.slice/cri-containerd-{ID}.scope",
            "cri-containerd-3f9a51c07be2",
        ),
        (f"/kubepods/burstable/pod12/{ID}", "pod12-3f9a51c07be2"),
        (f"/{ID}", "container-3f9a51c07be2"),
        ("/tm/web-3", "web-3"),
    ],
)
def test_a_container_has_a_short_name(cgroup: str, name: str) -> None:
    assert container_name(cgroup) == name


def test_who_is_refused_pays_for_the_looking() -> None:
    identity = Identity(pid=1, uid=5, gid=5, groups=frozenset(), label="", cgroup="/")
    bucket = TokenBucket(1.0, 2.0, lambda: 0.0)
    client = SimpleNamespace(identity=identity, account=SimpleNamespace(bucket=bucket))
    service = SimpleNamespace(policy=SimpleNamespace(administrators=Administrators()), grants={})
    enclave = SimpleNamespace(
        name="large", policy=SimpleNamespace(owner=0), slots=SlotTable(range(128), lambda: 0.0)
    )
    found = shortage(cast("Service", service), cast("Client", client), cast("Enclave", enclave))
    assert found.text == "large: 0 of 128 slots in use: 128 on their way back"
    assert not bucket.take_if_there(), "128 slots were the two tokens that there were"
