"""Attaches that are answered without Python are answered as all others are, and seen as all others."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from processes import wait_until
from raw_client import RawClient
from running_broker import RunningBroker

Broker = Callable[..., RunningBroker]
Policy = Callable[..., str]
Connect = Callable[..., RawClient]

OFF = "[broker]\nahead = 0"


def given(admin: RawClient) -> int:
    number: int = admin.ok("stats")["stats"]["attendant"]["given"]
    return number


def seated(admin: RawClient, count: int = 1) -> None:
    """Return when so many connections are seated, and something is ready for them."""

    def are() -> bool:
        now = admin.ok("stats")["stats"]["attendant"]
        return bool(now["seats"] >= count and now["ready"])

    wait_until(are, "connections have seats")


def drop_descriptors(client: RawClient) -> list[str]:
    """Close those that came; returns what they were."""
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in client.fds]
    for fd in client.fds:
        os.close(fd)
    client.fds = []
    return links


def played(broker: RunningBroker, connect: Connect, *, ahead: bool) -> list[Any]:
    """What two clients are answered, apart from what is another one each time."""
    admin, clients = connect(broker), [connect(broker), connect(broker)]
    said: list[Any] = []
    grants = []
    for left, client in ((2, clients[0]), (1, clients[1])):
        if ahead:
            seated(admin, left)
        reply = client.call("attach", enclave="vault", slots=1, wait=2.5)
        grants.append(reply["ok"].pop("grant"))
        (slot,) = reply["ok"]["slots"]
        slot["tcs"] -= 4096 * slot.pop("slot")
        assert len(slot.pop("key")) == 16
        assert len(slot.pop("bind")) == 88
        said += [reply, list(reply["ok"]["enclave"]), drop_descriptors(client)]
    assert given(admin) == (2 if ahead else 0)
    said.append([entry for entry in admin.ok("holders", enclave="vault")["slots"] if "grant" in entry])
    said.append(sorted(admin.ok("enclaves")["enclaves"][0]["slots"].items()))
    for client, grant in zip(clients, grants, strict=True):
        said.append(client.call("detach", grant=grant, clean=True))
    (users,) = admin.ok("stats")["stats"]["users"]
    said.append(users["used"])
    said.append([{**record, "timestamp": 0, "grant": 0, "slots": 0} for record in broker.audit("grant")])
    return said


def plain(said: list[Any]) -> list[Any]:
    """Without numbers of grants and slots, which are drawn ahead too."""
    holders = [{**entry, "grant": 0, "slot": 0} for entry in sorted(said[6], key=lambda e: e["client"])]
    return [*said[:6], holders, *said[7:]]


def test_what_is_given_ahead_is_answered_charged_and_recorded_as_everything_else(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    one, other = broker(vault_policy(more=OFF)), broker(vault_policy())
    assert plain(played(one, connect, ahead=False)) == plain(played(other, connect, ahead=True))


def test_a_viewer_sees_what_was_given_ahead(broker: Broker, vault_policy: Policy, connect: Connect) -> None:
    there = broker(vault_policy())
    admin, viewer, client = connect(there), connect(there), connect(there)
    viewer.ok("monitor")
    seated(admin)
    grant = client.ok("attach", enclave="vault", slots=1)["grant"]
    assert given(admin) == 1
    seen: list[dict[str, Any]] = []
    while len(seen) < 2:
        seen += [message for message in viewer.event()["messages"] if message["op"] == "attach"]
    asked, told = seen[:2]
    assert (asked["from"], told["from"]) == ("client", "broker")
    assert asked["kind"] == "request"
    assert len(told["fds"]) == 2
    assert told["grant"] == grant


def test_a_policy_that_allows_it_no_more_holds_for_who_was_seated(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    there = broker(vault_policy())
    admin, client = connect(there), connect(there)
    seated(admin)
    (there.folder / "broker.toml").write_text(vault_policy(attach="uid = 4711"))
    admin.ok("reload")
    client.fails("attach", "denied", enclave="vault", slots=1)
    assert given(admin) == 0


def test_a_client_that_asks_for_what_is_not_plain_is_answered_by_the_broker(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    there = broker(vault_policy())
    admin, client = connect(there), connect(there)
    for args in ({"slots": 2}, {"slots": 1, "wait": 1, "other": None}, {"wait": 1.0}):
        seated(admin)
        grant = client.ok("attach", enclave="vault", **args)["grant"]
        client.ok("detach", grant=grant, clean=True)
    seated(admin)
    client.fails("attach", "not-found", enclave="nothing", slots=1)
    assert given(admin) == 0


def test_a_client_that_came_for_one_attach_is_seated_when_it_stays(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    there = broker(vault_policy())
    admin = connect(there)
    os.kill(there.pid, signal.SIGSTOP)  # so that it finds all at once, as of who knows what it wants
    client = connect(there, hello=False)
    hello = client.post("hello", version=1, client="brief")
    attach = client.post("attach", enclave="vault", slots=1)
    os.kill(there.pid, signal.SIGCONT)
    client.reply(hello)
    reply = client.reply(attach)
    for passed in (0, 1):
        drop_descriptors(client)
        client.ok("detach", grant=reply["ok"]["grant"], clean=True)
        assert given(admin) == 0  # after this round the broker waits for the client's next message
        if passed:
            seated(admin)
        reply = client.call("attach", enclave="vault", slots=1)
        assert given(admin) == passed
