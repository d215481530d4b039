"""Clients that are greeted without Python are answered as all others are, and seen as all others."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest
from other_users import child, together
from processes import wait_until
from raw_client import RawClient
from running_broker import RunningBroker

from teemate import wire

Broker = Callable[..., RunningBroker]
Policy = Callable[..., str]
Connect = Callable[..., RawClient]

OFF = "[broker]\nahead = 0"
USER = 4711


def attendant(admin: RawClient) -> dict[str, Any]:
    found: dict[str, Any] = admin.ok("stats")["stats"]["attendant"]
    return found


def expected(admin: RawClient, connect: Callable[[], RawClient]) -> None:
    """Return when there are places for who comes like that."""

    def are() -> bool:
        connect().close()
        now = attendant(admin)
        return bool(now["places"] and now["ready"])

    wait_until(are, "there are places")


def cold(
    there: RunningBroker, connect: Connect, **args: object
) -> tuple[RawClient, dict[str, Any], dict[str, Any]]:
    """A connection that says what it wants at once, with what it is answered."""
    client = connect(there, hello=False)
    hello = client.post("hello", version=1, counters=True, client="cold", session=os.urandom(32))
    attach = client.post("attach", enclave="vault", slots=1, wait=2.5, **args)
    return client, client.reply(hello), client.reply(attach)


def greeted(
    admin: RawClient, there: RunningBroker, connect: Connect
) -> tuple[RawClient, dict[str, Any], dict[str, Any]]:
    """The same of one that was greeted ahead: who is stopped before it says hello, for long, is not."""
    found: list[Any] = []

    def is_greeted() -> bool:
        for client, _hello, reply in found:
            client.ok("detach", grant=reply["ok"]["grant"], clean=True)
            client.close()
        before = attendant(admin)["greeted"]
        found[:] = [cold(there, connect)]
        return bool(attendant(admin)["greeted"] == before + 1)

    wait_until(is_greeted, "somebody was greeted ahead")
    client, hello, reply = found[0]
    return client, hello, reply


def played(there: RunningBroker, connect: Connect, *, ahead: bool) -> list[Any]:
    """What a client is answered and what is told of it, apart from what is another one each time."""
    admin = connect(there)
    if ahead:
        expected(admin, lambda: connect(there))
    client, hello, reply = greeted(admin, there, connect) if ahead else cold(there, connect)
    assert bool(attendant(admin)["greeted"]) == ahead
    said: list[Any] = [hello, list(hello["ok"])]
    grant = reply["ok"].pop("grant")
    (slot,) = reply["ok"]["slots"]
    for other in ("key", "bind", "slot", "tcs"):
        slot.pop(other)
    said += [reply, list(reply["ok"]["enclave"]), len(client.fds)]
    listed = admin.ok("clients")["clients"][-1]
    said.append({**listed, "client": 0, "grants": 0, "connected": 0})
    held = [entry for entry in admin.ok("holders", enclave="vault")["slots"] if "grant" in entry]
    said.append([{**entry, "grant": 0, "slot": 0, "client": 0} for entry in held])
    said.append(client.call("ping"))
    said.append(client.call("detach", grant=grant, clean=True))
    (users,) = admin.ok("stats")["stats"]["users"]
    said.append(users["used"])
    record = there.audit("grant")[-1]
    said.append({**record, "timestamp": 0, "grant": 0, "slots": 0, "client": 0})
    return said


def test_who_is_greeted_ahead_is_answered_charged_and_recorded_as_everybody_else(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    one, other = broker(vault_policy(more=OFF)), broker(vault_policy())
    assert played(one, connect, ahead=False) == played(other, connect, ahead=True)


def test_a_viewer_sees_who_was_greeted_ahead(broker: Broker, vault_policy: Policy, connect: Connect) -> None:
    there = broker(vault_policy())
    admin, viewer = connect(there), connect(there)
    expected(admin, lambda: connect(there))
    viewer.ok("monitor")
    greeted(admin, there, connect)
    (client,) = (one["client"] for one in admin.ok("clients")["clients"] if one["grants"])
    seen: list[dict[str, Any]] = []
    while [message["op"] for message in seen].count("attach") < 2:
        messages = [message for message in viewer.event()["messages"] if message["client"] == client]
        seen += [message for message in messages if message["op"] in ("hello", "attach")]
    assert [(m["op"], m["from"]) for m in seen] == [
        ("hello", "client"), ("hello", "broker"), ("attach", "client"), ("attach", "broker")
    ]  # fmt: skip
    assert len(seen[3]["fds"]) == 2


def test_a_hello_that_is_not_plain_is_answered_by_the_broker(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    there = broker(vault_policy())
    admin = connect(there)
    expected(admin, lambda: connect(there))
    greeted(admin, there, connect)
    before = attendant(admin)["greeted"]
    for args in ({"version": 1, "other": 1}, {"version": 1, "client": "\u00e9"}):
        client = connect(there, hello=False)
        assert client.ok("hello", **args)["version"] == 1
    connect(there, hello=False).fails("hello", "unsupported", version=2)
    client = connect(there, hello=False)
    client.sock.send(wire.encode({"id": 1, "op": "ping"}))
    client.breaks_protocol()
    client = connect(there, hello=False)
    read, write = os.pipe()
    client.send({"id": 1, "op": "hello", "args": {"version": 1}}, (read,))
    os.close(read)
    os.close(write)
    client.breaks_protocol()
    assert attendant(admin)["greeted"] == before


def test_who_connects_and_says_nothing_has_the_brokers_patience_and_no_more(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    there = broker(vault_policy(more="[limits]\nhandshake_seconds = 0.5"))
    admin = connect(there)
    expected(admin, lambda: connect(there))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.settimeout(60)
        silent.connect(there.socket)
        error = wire.decode(wire.receive(silent).data)["error"]
    assert isinstance(error, dict)
    assert error["detail"]["limit"] == "handshake_seconds"


def test_a_policy_that_allows_it_no_more_holds_for_who_was_expected(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    there = broker(vault_policy())
    admin = connect(there)
    expected(admin, lambda: connect(there))
    (there.folder / "broker.toml").write_text(vault_policy(attach=f"uid = {USER}"))
    admin.ok("reload")
    assert not attendant(admin)["places"]
    _client, hello, reply = cold(there, connect)
    assert hello["ok"]["version"] == 1
    assert reply["error"]["code"] == "denied"


def told_in(there: RunningBroker, connect: Connect, groups: list[int]) -> dict[str, Any]:
    """What a process of the user in these groups is answered."""

    def work() -> dict[str, Any]:
        signal.alarm(60)
        os.setgroups(groups)
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        _client, _hello, reply = cold(there, connect)
        return {"code": reply["error"]["code"] if "error" in reply else "", "pid": os.getpid()}

    (result,) = together([child(work, 0)])
    return result


@pytest.mark.skipif(os.geteuid() != 0, reason="it starts processes of another user: run it as root")
def test_rights_of_a_group_are_those_of_who_is_in_it_whoever_of_the_user_was_expected(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    there = broker(vault_policy("insecure_sim_sharing = true", attach="gid = 4712"))
    os.chmod(there.folder, 0o755)
    admin = connect(there)

    def are() -> bool:
        assert told_in(there, connect, [4712])["code"] == ""
        return bool(attendant(admin)["places"])

    wait_until(are, "there are places")
    before = attendant(admin)["greeted"]
    assert told_in(there, connect, [])["code"] == "denied"
    assert told_in(there, connect, [4713])["code"] == "denied"
    assert attendant(admin)["greeted"] == before

    def is_greeted() -> bool:
        assert told_in(there, connect, [4712])["code"] == ""
        return bool(attendant(admin)["greeted"] > before)

    wait_until(is_greeted, "who is in the group is greeted ahead")


def test_descriptors_and_charges_balance_after_many_cold_clients(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    there = broker(vault_policy())
    admin = connect(there)
    expected(admin, lambda: connect(there))

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{there.pid}/fd"))

    used = admin.ok("stats")["stats"]["users"][0]["used"]
    before = descriptors()
    for _ in range(50):
        client, _hello, reply = cold(there, connect)
        client.ok("detach", grant=reply["ok"]["grant"], clean=True)
        client.close()
    assert attendant(admin)["greeted"] > 0
    wait_until(lambda: descriptors() <= before, "the broker has as many descriptors as before")
    wait_until(lambda: admin.ok("stats")["stats"]["users"][0]["used"] == used, "charges are as before")


def test_a_client_that_ends_at_once_is_seen_to_end(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    """Its process may have ended before Python knows of it."""
    there = broker(vault_policy())
    admin = connect(there)
    expected(admin, lambda: connect(there))
    for _ in range(10):

        def work() -> dict[str, Any]:
            signal.alarm(60)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            cold(there, connect)
            os.kill(os.getpid(), signal.SIGKILL)
            return {}

        together([child(work, 0)])

    def gone() -> bool:
        stats = admin.ok("stats")["stats"]
        return bool(stats["clients"] == 1 and not stats["grants"])

    wait_until(gone, "nothing is left of them")
    assert attendant(admin)["greeted"] > 0
    assert not [record for record in there.log() if record["level"] == "error"]
