"""Attach, acquire, release, detach, revoke, destroy, as a client sees them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backends import BACKEND, SHARING
from images import Images
from processes import wait_for_end
from raw_client import RawClient, raw_client
from running_broker import RunningBroker, run_broker

from teemate import wire

Broker = Callable[..., RunningBroker]
Policy = Callable[..., str]
Connect = Callable[..., RawClient]

HOLDER = """
import os, sys
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
from raw_client import RawClient
client = RawClient(sys.argv[2], name="holder")
client.ok("attach", enclave="vault", slots=int(sys.argv[3]))
print("attached", flush=True)
sys.stdin.read()
if sys.argv[4] == "close":
    client.sock.close()
    print("closed", flush=True)
    sys.stdin = os.fdopen(3)
    sys.stdin.read()
"""

SETTING = "[[enclave]] slots_per_client"


def counts(client: RawClient) -> dict[str, int]:
    (info,) = client.ok("enclaves")["enclaves"]
    slots: dict[str, int] = info["slots"]
    return slots


def take_all(client: RawClient, count: int = 12) -> dict[str, Any]:
    """Attach for every slot of the vault: succeeds only when all of them are back and armed."""
    return client.ok("attach", enclave="vault", slots=count, wait=20)


def test_an_attach_is_one_round_trip_with_everything_in_one_reply(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    client = connect(vault_broker, hello=False)
    client.send({"id": 1, "op": "hello", "args": {"version": 1}})
    client.send({"id": 2, "op": "attach", "args": {"enclave": "vault", "slots": 2}})
    assert client.reply(1)["ok"]["version"] == 1
    ok = client.reply(2)["ok"]
    info = ok["enclave"]
    assert info["backend"] == BACKEND
    assert info["isolation"] == "gate"
    assert info["state"] == "ready"
    assert info["slots"] == {
        "total": 12,
        "free": 10,
        "used": 2,
        "withheld": 0,
        "quarantined": 0,
        "waiting": 0,
    }
    assert ok["arena"] == info["base"] + info["size"] + 4096
    assert info["base"] % info["size"] == 0
    assert len(client.fds) == 2
    first, second = ok["slots"]
    assert (first["slot"], second["slot"]) == (2, 3)
    assert second["tcs"] == first["tcs"] + 4096
    assert first["key"] != second["key"]
    assert len(first["key"]) == 16
    assert len(first["bind"]) == 88
    assert any(
        offset <= first["tcs"] < offset + size and kind == 1 for offset, size, _, kind in ok["segments"]
    )


def test_the_mrenclave_is_that_of_the_image(
    vault_broker: RunningBroker, connect: Connect, images: Images
) -> None:
    (info,) = connect(vault_broker).ok("enclaves")["enclaves"]
    assert info["mrenclave"] == images.vault.mrenclave


def test_every_assignment_of_a_slot_has_a_new_key_and_a_larger_generation(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    client = connect(vault_broker)
    seen: dict[int, tuple[int, bytes]] = {}
    for _ in range(3):
        ok = take_all(client)
        for slot in ok["slots"]:
            generation, key = seen.get(slot["slot"], (0, b""))
            assert slot["generation"] > generation
            assert slot["key"] != key
            seen[slot["slot"]] = slot["generation"], slot["key"]
        client.ok("detach", grant=ok["grant"], clean=True)
    assert sorted(seen) == list(range(2, 14))


def test_more_slots_than_exist_or_are_allowed_is_busy_and_names_the_limit(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    running = broker(vault_policy("slots_per_client = 13"))
    client = connect(running)
    assert (
        client.fails("attach", "busy", enclave="vault", slots=13)["detail"]["limit"] == "slots of the image"
    )
    error = client.fails("attach", "busy", enclave="vault", slots=14)
    assert error["detail"]["limit"] == "slots_per_client"
    assert "slots_per_client" in error["message"]
    grant = client.ok("attach", enclave="vault", slots=12)["grant"]
    assert (
        client.fails("slots.acquire", "busy", grant=grant, count=2)["detail"]["limit"] == "slots_per_client"
    )
    other = connect(running)
    error = other.fails("attach", "busy", enclave="vault", wait=0.05)
    assert error["detail"]["waited"] == 0.05
    assert "all 12 slots in use: 12 by uid" in error["message"]
    assert counts(client)["waiting"] == 0
    assert len(client.ok("clients")["clients"][1]["grants"]) == 0


def test_who_waits_gets_slots_as_soon_as_they_are_clean(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    holder, waiter = connect(vault_broker), connect(vault_broker)
    held = take_all(holder)
    number = waiter.post("attach", enclave="vault", slots=2, wait=20)
    # The waiter is served by the broker's own clock: its connection answers other requests meanwhile.
    waiter.post("ping")
    assert waiter.receive() == {"id": number + 1, "ok": {}}
    assert counts(holder)["waiting"] == 1
    holder.ok("slots.release", grant=held["grant"], slots=[7, 9], clean=True)
    got = waiter.reply(number)["ok"]
    assert sorted(slot["slot"] for slot in got["slots"]) == [7, 9]


def test_a_waiter_that_leaves_leaves_nothing_behind(vault_broker: RunningBroker, connect: Connect) -> None:
    holder, waiter = connect(vault_broker), connect(vault_broker)
    held = take_all(holder)
    waiter.post("attach", enclave="vault", slots=2, wait=20)
    waiter.post("ping")
    waiter.receive()
    waiter.close()
    holder.ok("detach", grant=held["grant"], clean=True)
    take_all(holder)
    users = holder.ok("stats")["stats"]["users"]
    assert users[0]["used"]["slots"] == 12
    assert users[0]["used"]["grants"] == 1


def test_slots_given_back_without_word_that_they_are_clean_are_withheld_while_the_process_lives(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    client = connect(vault_broker)
    grant = client.ok("attach", enclave="vault", slots=3)["grant"]
    assert client.ok("slots.release", grant=grant, slots=[2]) == {"released": 0, "withheld": 1}
    assert client.ok("slots.release", grant=grant, slots=[3], clean=True) == {"released": 1}
    assert counts(client)["withheld"] == 1
    client.ok("detach", grant=grant)
    assert counts(client)["withheld"] == 2
    client.fails("slots.release", "not-found", grant=grant, slots=[2], clean=True)
    assert connect(vault_broker).fails("attach", "busy", enclave="vault", slots=12, wait=0)


def test_an_acknowledgement_that_comes_later_brings_a_withheld_slot_back(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    client = connect(vault_broker)
    attached = client.ok("attach", enclave="vault", slots=1)
    grant, slots = attached["grant"], [attached["slots"][0]["slot"]]
    client.ok("slots.release", grant=grant, slots=slots)
    client.ok("slots.release", grant=grant, slots=slots, clean=True)
    client.ok("slots.acquire", grant=grant, count=12, wait=20)


def test_slots_that_are_waited_for_or_withheld_count_against_slots_per_client(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    running = broker(vault_policy("slots_per_client = 12"))
    other, client = connect(running), connect(running)
    others = other.ok("attach", enclave="vault", slots=8)["grant"]
    first = client.post("attach", enclave="vault", slots=8, wait=20)
    error = client.fails("attach", "busy", enclave="vault", slots=5)
    assert error["detail"] == {
        "limit": "slots_per_client",
        "maximum": 12,
        "held": 8,
        "asked": 5,
        "setting": SETTING,
    }
    other.ok("detach", grant=others, clean=True)
    grant = client.reply(first)["ok"]["grant"]
    client.ok("detach", grant=grant)
    assert counts(client)["withheld"] == 8
    assert client.fails("attach", "busy", enclave="vault", slots=5)["detail"]["held"] == 8


def test_a_process_that_connects_attaches_and_leaves_again_and_again_withholds_no_more_than_a_client_may(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    running = broker(vault_policy("slots_per_client = 4"))
    admin = connect(running)
    before = admin.ok("stats")["stats"]["processes"]["watched"]
    for round_ in range(12):
        visitor = connect(running)
        reply = visitor.call("attach", enclave="vault", slots=2)
        visitor.close()
        while len(admin.ok("clients")["clients"]) > 1:  # until the broker has seen it leave
            pass
        if round_ < 2:
            assert "ok" in reply
            continue
        assert reply["error"]["code"] == "busy"
        assert reply["error"]["detail"] == {
            "limit": "slots_per_client",
            "maximum": 4,
            "held": 4,
            "asked": 2,
            "setting": SETTING,
        }
        assert "4 withheld from earlier connections" in reply["error"]["message"]
    assert counts(admin)["withheld"] == 4
    assert admin.ok("stats")["stats"]["processes"]["watched"] <= before + 2
    with_another = start_holder(running, 4)  # another process is not held back
    end(with_another)


def start_holder(
    broker: RunningBroker, slots: int, how: str = "wait", **options: Any
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(Path(__file__).parent), broker.socket, str(slots), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        **options,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"attached\n"
    return process


def end(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.wait()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()


def test_a_killed_client_s_slots_are_scrubbed_and_free_again(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    client = connect(vault_broker)
    holder = start_holder(vault_broker, 4)
    assert counts(client)["used"] == 4
    end(holder)
    take_all(client)


def test_slots_of_a_client_that_closed_its_connection_are_withheld_until_it_ends(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    client = connect(vault_broker)
    reading, writing = os.pipe()

    def give_fd_3() -> None:
        os.dup2(reading, 3)

    holder = start_holder(vault_broker, 4, "close", preexec_fn=give_fd_3, pass_fds=(3,))
    os.close(reading)
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.close()
    assert holder.stdout.readline() == b"closed\n"
    while counts(client)["withheld"] != 4:  # each turn is a round trip, after the broker saw the end
        client.ok("ping")
    client.fails("attach", "busy", enclave="vault", slots=9, wait=0)
    os.close(writing)
    holder.wait()
    holder.stdout.close()
    take_all(client)


def test_a_grant_ends_with_its_process_even_if_a_child_keeps_the_connection(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    code = HOLDER.replace("sys.stdin.read()", "pid = os.fork()\nif pid == 0: os.read(3, 1)\nos._exit(0)", 1)
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent), vault_broker.socket, "4", "wait"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.dup2(reading, 3),
        pass_fds=(3,),
    )
    os.close(reading)
    process.wait()
    client = connect(vault_broker)
    take_all(client)
    assert process.stdout is not None
    process.stdout.close()
    os.close(writing)


def test_a_revoked_grant_is_told_acknowledged_and_its_slots_go_to_others(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    client, admin = connect(vault_broker), connect(vault_broker)
    grant = client.ok("attach", enclave="vault", slots=3)["grant"]
    number = admin.post("revoke", grant=grant, grace=20, reason="test")
    event = client.event()
    assert event == {"event": "revoked", "grant": grant, "slots": [2, 3, 4], "deadline": 20.0}
    client.fails("slots.acquire", "revoked", grant=grant)
    client.ok("detach", grant=grant, clean=True)
    assert admin.reply(number)["ok"] == {"grants": 1, "cleared": 3, "quarantined": 0, "leaked": 0, "busy": 0}
    take_all(admin)
    (record,) = vault_broker.audit("revocation")
    assert record["grant"] == grant
    assert record["why"] == "test"


def test_a_client_that_does_not_acknowledge_leaks_its_mapping_and_its_slots_are_withheld(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    client, admin = connect(vault_broker), connect(vault_broker)
    grant = client.ok("attach", enclave="vault", slots=3)["grant"]
    ok = admin.ok("revoke", client=1, grace=0)
    assert ok == {"grants": 1, "cleared": 0, "quarantined": 0, "leaked": 3, "busy": 0}
    assert counts(admin)["withheld"] == 3
    assert client.event()["grant"] == grant
    client.ok("detach", grant=grant, clean=True)
    take_all(admin)


def test_a_client_that_does_not_acknowledge_is_killed_where_the_policy_says_so(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    running = broker(vault_policy("revoke_kill = true"))
    admin = connect(running)
    holder = start_holder(running, 3)
    ok = admin.ok("revoke", enclave="vault", grace=0)
    assert ok == {"grants": 1, "cleared": 3, "quarantined": 0, "leaked": 0, "busy": 0}
    assert holder.wait() == -signal.SIGKILL
    end(holder)
    take_all(admin)


def test_a_revocation_ends_requests_of_the_grant_that_wait(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    holder, client, admin = connect(vault_broker), connect(vault_broker), connect(vault_broker)
    holder.ok("attach", enclave="vault", slots=11)
    grant = client.ok("attach", enclave="vault", slots=1)["grant"]
    waiting = client.post("slots.acquire", grant=grant, count=2, wait=20)
    client.post("ping")
    client.receive()
    revoke = admin.post("revoke", grant=grant, grace=20)
    assert client.reply(waiting)["error"]["code"] == "revoked"
    client.ok("detach", grant=grant, clean=True)
    assert admin.reply(revoke)["ok"]["cleared"] == 1


def test_what_does_not_exist_cannot_be_revoked(vault_broker: RunningBroker, connect: Connect) -> None:
    admin = connect(vault_broker)
    admin.fails("revoke", "not-found", grant=77)
    admin.fails("revoke", "not-found", client=77)
    admin.fails("revoke", "not-found", enclave="nothing")
    assert admin.ok("revoke", enclave="vault")["grants"] == 0


def test_an_enclave_is_created_attached_and_destroyed(
    broker: Broker, vault_policy: Policy, connect: Connect, images: Images
) -> None:
    running = broker(vault_policy(more="[[create]]\nuid = 0\n"))
    admin, client = connect(running), connect(running)
    with images.vault.sgxs.open("rb") as image:
        info = admin.ok(
            "create", (image.fileno(),), name="mine", sigstruct=images.vault.sigstruct.read_bytes()
        )
        assert info["mrenclave"] == images.vault.mrenclave
        assert info["state"] == "ready"
        again = {"name": "mine", "sigstruct": images.vault.sigstruct.read_bytes()}
        admin.fails("create", "busy", (image.fileno(),), **again)
    ranges = [(i["base"], i["base"] + 2 * i["size"]) for i in admin.ok("enclaves")["enclaves"]]
    assert ranges[0][1] <= ranges[1][0] or ranges[1][1] <= ranges[0][0]
    grant = client.ok("attach", enclave="mine")["grant"]
    admin.fails("destroy", "busy", enclave="mine")
    number = admin.post("destroy", enclave="mine", force=True)
    assert client.event()["event"] == "revoked"
    client.fails("attach", "draining", enclave="mine")
    client.ok("detach", grant=grant, clean=True)
    assert admin.reply(number)["ok"] == {"revoked": 1}
    client.fails("attach", "not-found", enclave="mine")
    used = admin.ok("stats")["stats"]["users"][0]["used"]
    assert used["pages"] == 0
    assert used["slots"] == 0


def test_limits_of_the_policy_are_named_when_they_are_met(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    running = broker(
        vault_policy("clients_per_uid = 2", more="[limits]\nconnections = 4\ngrants = 3\nslots = 4\n")
    )
    clients = [connect(running) for _ in range(4)]
    extra = connect(running, hello=False)
    message = extra.receive()
    assert message is not None
    assert message["error"]["code"] == "limit-reached"
    assert message["error"]["detail"]["setting"] == "[limits] connections"
    first, second, third, admin = clients
    grant = first.ok("attach", enclave="vault", slots=3)["grant"]
    second.ok("attach", enclave="vault")
    error = second.fails("attach", "limit-reached", enclave="vault")
    assert error["detail"]["limit"] == "slots"
    assert (
        third.fails("attach", "limit-reached", enclave="vault", slots=0)["detail"]["limit"]
        == "clients_per_uid"
    )
    second.ok("attach", enclave="vault", slots=0)
    assert second.fails("attach", "limit-reached", enclave="vault", slots=0)["detail"]["limit"] == "grants"
    first.ok("detach", grant=grant, clean=True)
    third.ok("attach", enclave="vault", slots=0)
    assert admin.ok("stats")["stats"]["users"][0]["used"]["grants"] == 3


def test_slots_go_in_turn_between_users_over_the_real_socket(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    running = broker(vault_policy(SHARING, attach='uid = "*"'))
    admin = connect(running)
    held = take_all(admin)
    mine = [connect(running, name="mine") for _ in range(2)]
    numbers = [attach_and_wait(client) for client in mine]
    stranger = connect_as(running, 4242, connect)
    theirs = attach_and_wait(stranger)
    admin.ok("slots.release", grant=held["grant"], slots=[5], clean=True)
    assert stranger.reply(theirs)["ok"]["slots"][0]["slot"] == 5, "the others' user holds more than its share"
    admin.ok("slots.release", grant=held["grant"], slots=[6], clean=True)
    assert mine[0].reply(numbers[0])["ok"]["slots"][0]["slot"] == 6
    admin.ok("slots.release", grant=held["grant"], slots=[7], clean=True)
    assert mine[1].reply(numbers[1])["ok"]["slots"][0]["slot"] == 7


def attach_and_wait(client: RawClient) -> int:
    """Ask for a slot that is not there; when this returns, the broker has the request in its queue."""
    number = client.post("attach", enclave="vault", wait=20)
    client.post("ping")
    assert client.receive() == {"id": number + 1, "ok": {}}
    return number


def connect_as(running: RunningBroker, uid: int, connect: Connect) -> RawClient:
    """A connection that the kernel reports as `uid`'s: effective ids are taken when connect() is called."""
    os.seteuid(uid)
    try:
        return connect(running)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_the_broker_ends_its_wardens_and_its_socket_with_itself(
    broker: Broker, vault_policy: Policy, connect: Connect, signal_number: int
) -> None:
    running = broker(vault_policy())
    client = connect(running)
    (enclave,) = client.ok("stats")["stats"]["enclaves"]
    warden = os.pidfd_open(enclave["warden"]["pid"])
    os.kill(running.pid, signal_number)
    assert client.receive() is None
    import select

    poll = select.poll()
    poll.register(warden, select.POLLIN)
    assert poll.poll(30_000), "the warden outlived the broker"
    os.close(warden)


def test_the_broker_ends_well_while_clients_hold_slots_and_wait_for_some(
    vault_policy: Callable[..., str],
) -> None:
    with contextlib.ExitStack() as clients:
        with run_broker(vault_policy()) as running:
            holder = clients.enter_context(raw_client(running.socket))
            take_all(holder)
            waiter = clients.enter_context(raw_client(running.socket))
            waiter.post("attach", enclave="vault", slots=1)
            waiter.ok("ping")
        assert holder.receive() is None
        assert waiter.receive() is None


def test_a_broker_takes_over_the_socket_of_one_that_was_killed(
    broker: Broker, vault_policy: Policy, tmp_path: Path
) -> None:
    first = broker(vault_policy(), folder=tmp_path, expect_errors=True)
    with pytest.raises(AssertionError, match="another broker listens"):
        broker(
            vault_policy(), folder=_other(tmp_path), expect_errors=True, arguments=("--socket", first.socket)
        )
    os.kill(first.pid, signal.SIGKILL)
    wait_for_end([first.pid])
    os.unlink(tmp_path / "notify.sock")
    second = broker(vault_policy(), folder=tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(second.socket)
        wire.send(sock, wire.encode({"id": 1, "op": "hello", "args": {"version": 1}}))
        assert wire.decode(wire.receive(sock).data)["ok"]


def _other(folder: Path) -> Path:
    other = folder / "other"
    other.mkdir()
    return other
