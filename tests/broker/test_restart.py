"""What outlives the broker: grants, slots, keys and the outcome of requests, as clients see it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from images import Images
from processes import descriptors, wait_until
from raw_client import RawClient, raw_client
from running_broker import RunningBroker

Broker = Callable[..., RunningBroker]
Policy = Callable[..., str]
Connect = Callable[..., RawClient]
Holder = Callable[[RunningBroker], tuple[subprocess.Popen[str], bytes]]

HOLDER = """
import os, sys
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
from raw_client import RawClient
client = RawClient(sys.argv[2], name="holder")
client.ok("attach", enclave="vault", slots=3)
print(client.token.hex(), flush=True)
sys.stdin.read()
"""


def counts(client: RawClient) -> dict[str, int]:
    """The slots when the warden works on none; a restarted broker has it look at all of them."""
    while any(enclave["slots"]["arming"] for enclave in client.ok("stats")["stats"]["enclaves"]):
        client.ok("ping")
    (info,) = client.ok("enclaves")["enclaves"]
    slots: dict[str, int] = info["slots"]
    return slots


def take_all(client: RawClient, count: int = 12) -> dict[str, Any]:
    """Attach for every slot of the vault: succeeds only when all of them are back and armed."""
    return client.ok("attach", enclave="vault", slots=count, wait=20)


@pytest.fixture
def holder() -> Iterator[Holder]:
    """Start another process with three slots: it and its token."""
    with contextlib.ExitStack() as processes:

        def start(broker: RunningBroker) -> tuple[subprocess.Popen[str], bytes]:
            process = subprocess.Popen(
                [sys.executable, "-c", HOLDER, str(Path(__file__).parent), broker.socket],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            processes.enter_context(process)
            processes.callback(process.kill)
            assert process.stdout is not None
            return process, bytes.fromhex(process.stdout.readline())

        yield start


OWN = 3
"""Descriptors that the store has of the broker itself: its socket, the snapshot, what was given ahead."""


def stored(client: RawClient) -> int:
    number: int = client.ok("stats")["stats"]["state"]["stored"]
    return number


def await_log(broker: RunningBroker, event: str, count: int = 1) -> list[dict[str, object]]:
    while len(found := [record for record in broker.log() if record["event"] == event]) < count:
        time.sleep(0.01)  # the log has no other news of it
    return found


@pytest.fixture
def kept(broker: Broker, vault_policy: Policy) -> RunningBroker:
    """A broker with a keeper, and the vault."""
    return broker(vault_policy(), keeper=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_client_that_resumes_has_its_grant_with_number_slots_generations_and_keys(
    kept: RunningBroker, connect: Connect, number: int
) -> None:
    client = connect(kept)
    before = client.ok("attach", enclave="vault", slots=2)
    request = client._number
    kept.kill_worker(number)
    assert client.receive() is None
    ok = client.reconnect()
    assert ok["resumed"] == [before["grant"]]
    client.send({"id": request, "op": "attach", "args": {"enclave": "vault", "slots": 2}})
    again = client.reply(request)["ok"]
    assert again["slots"] == before["slots"]
    assert again["grant"] == before["grant"]
    assert again["enclave"]["base"] == before["enclave"]["base"]
    assert len(client.fds) == 4
    assert os.fstat(client.fds[0]).st_ino == os.fstat(client.fds[2]).st_ino
    assert counts(client)["used"] == 2
    client.ok("detach", grant=before["grant"], clean=True)
    take_all(client)


def test_slots_that_nobody_held_get_keys_with_larger_generations_and_are_all_there(
    kept: RunningBroker, connect: Connect
) -> None:
    client = connect(kept)
    before = take_all(client)
    client.ok("detach", grant=before["grant"], clean=True)
    kept.kill_worker()
    client.reconnect()
    after = take_all(client)
    old = {slot["slot"]: slot for slot in before["slots"]}
    for slot in after["slots"]:
        assert slot["generation"] > old[slot["slot"]]["generation"]
        assert slot["key"] != old[slot["slot"]]["key"]


def test_grants_live_through_restart_after_restart(kept: RunningBroker, connect: Connect) -> None:
    client = connect(kept)
    grants = [client.ok("attach", enclave="vault")["grant"] for _ in range(3)]
    for _ in range(3):
        kept.kill_worker()
        assert client.reconnect()["resumed"] == grants
    more = client.ok("attach", enclave="vault")["grant"]
    assert more > grants[-1]
    kept.kill_worker()
    assert client.reconnect()["resumed"] == [*grants, more]


def test_an_unknown_token_is_no_error_and_resumes_nothing(kept: RunningBroker, connect: Connect) -> None:
    client = connect(kept)
    client.ok("attach", enclave="vault")
    kept.kill_worker()
    client.token = bytes(32)
    ok = client.reconnect()
    assert "resumed" not in ok
    assert len(ok["token"]) == 32


def test_a_token_is_of_use_only_to_the_process_that_got_it(
    kept: RunningBroker, connect: Connect, holder: Holder
) -> None:
    process, token = holder(kept)
    kept.kill_worker()
    thief = connect(kept, hello=False)
    assert "resumed" not in thief.hello(resume=token)
    assert counts(thief)["used"] == 3
    (record,) = [record for record in kept.log() if record["event"] == "client not resumed"]
    assert record["pid"] == os.getpid()
    process.kill()
    process.wait()
    take_all(thief)


def test_the_token_before_is_valid_until_the_first_request(kept: RunningBroker, connect: Connect) -> None:
    client = connect(kept)
    grant = client.ok("attach", enclave="vault")["grant"]
    first = client.token
    for _ in range(3):  # the reply that brings the new one may be lost with the broker
        kept.kill_worker()
        client.token = first
        assert client.reconnect()["resumed"] == [grant]
    client.ok("ping")
    kept.kill_worker()
    client.token = first
    assert "resumed" not in client.reconnect()


def test_a_client_that_never_read_a_greeting_resumes_with_the_token_that_it_brought(
    kept: RunningBroker, connect: Connect
) -> None:
    client = connect(kept, hello=False)
    client.token = os.urandom(32)
    client.send({"id": 0, "op": "hello", "args": {"version": 1, "session": client.token}})
    client.send({"id": 1, "op": "attach", "args": {"enclave": "vault"}})
    with raw_client(kept.socket) as other:
        while counts(other)["used"] != 1:
            pass
    for _ in range(2):
        kept.kill_worker()
        (grant,) = client.reconnect()["resumed"]
    client.send({"id": 1, "op": "attach", "args": {"enclave": "vault"}})
    client._number = 1
    assert client.reply(1)["ok"]["grant"] == grant
    own = client.token
    kept.kill_worker()
    assert client.reconnect()["resumed"] == [grant]
    client.ok("ping")
    kept.kill_worker()
    client.token = own
    assert "resumed" not in client.reconnect()


def test_while_a_broker_lives_the_end_of_a_connection_ends_its_grants(
    kept: RunningBroker, connect: Connect
) -> None:
    client = connect(kept)
    client.ok("attach", enclave="vault")
    client.sock.close()
    assert "resumed" not in client.reconnect()


def test_without_a_store_there_is_no_token_and_nothing_to_resume(
    vault_broker: RunningBroker, connect: Connect
) -> None:
    client = connect(vault_broker, hello=False)
    ok = client.hello(resume=bytes(32))
    assert "resumed" not in ok
    assert "token" not in ok
    client.ok("attach", enclave="vault")
    assert client.ok("stats")["stats"]["state"] == {"snapshot": None, "stored": 0, "starts": 1}


def test_a_process_that_ended_while_no_broker_ran_gives_its_slots_back(
    kept: RunningBroker, connect: Connect, holder: Holder
) -> None:
    process, _ = holder(kept)
    worker = kept.worker()
    os.kill(worker, signal.SIGSTOP)  # it does not see the client's end
    process.kill()
    process.wait()
    os.kill(worker, signal.SIGKILL)
    take_all(connect(kept))


def test_a_process_that_ends_while_it_is_suspended_gives_its_slots_back(
    kept: RunningBroker, connect: Connect, holder: Holder
) -> None:
    process, _ = holder(kept)
    kept.kill_worker()
    client = connect(kept)
    assert counts(client)["used"] == 3
    process.kill()
    process.wait()
    take_all(client)
    assert client.ok("stats")["stats"]["resumption"]["ended"] == 1


END_EARLY = """
import os, select, signal, trio
from teemate.broker.restart.restoration import Restoration
place, recover = Restoration.place, Restoration.recover
def end_all(self):
    place(self)
    for client in self._service.clients.values():
        os.kill(client.identity.pid, signal.SIGKILL)
        select.select([client.pidfd], [], [])
async def after_that(self):
    while self._service.clients:
        await trio.lowlevel.checkpoint()
    await recover(self)
Restoration.place, Restoration.recover = end_all, after_that
"""
"""A broker that finds clients from before sees them end before it has looked at slots that nobody held."""


def test_a_process_that_ends_while_the_next_broker_starts_gives_each_slot_back_once(
    broker: Broker, vault_policy: Policy, connect: Connect, holder: Holder, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(END_EARLY)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    kept = broker(vault_policy(), keeper=True, environment={"PYTHONPATH": path})
    process, _ = holder(kept)
    kept.kill_worker()
    process.wait()
    client = connect(kept)
    take_all(client)
    assert client.ok("stats")["stats"]["resumption"]["ended"] == 1


def test_who_does_not_resume_in_time_is_revoked_and_its_slots_are_withheld_until_it_ends(
    broker: Broker, vault_policy: Policy, connect: Connect, holder: Holder
) -> None:
    kept = broker("[broker]\nresume_grace = 1.0\n" + vault_policy(), keeper=True)
    process, _ = holder(kept)
    kept.kill_worker()
    await_log(kept, "slots withheld")
    client = connect(kept)
    assert counts(client)["withheld"] == 3
    (record,) = kept.audit("revocation")
    assert "resume_grace" in str(record["why"])
    kept.kill_worker()  # what is withheld stays so across a restart
    client.reconnect()
    assert counts(client)["withheld"] == 3
    process.kill()
    process.wait()
    take_all(client)


def test_a_release_that_was_done_and_not_answered_is_answered_and_not_done_again(
    kept: RunningBroker, connect: Connect
) -> None:
    client = connect(kept)
    ok = client.ok("attach", enclave="vault", slots=3)
    slots = [slot["slot"] for slot in ok["slots"]]
    number = client.post("slots.release", grant=ok["grant"], slots=slots[:2], clean=True)
    assert client.reply(number)["ok"] == {"released": 2}
    kept.kill_worker()
    client.reconnect()
    take = connect(kept).ok("attach", enclave="vault", slots=11, wait=20)
    assert set(slots[:2]) <= {slot["slot"] for slot in take["slots"]}
    request = {"id": number, "op": "slots.release"}
    client.send({**request, "args": {"grant": ok["grant"], "slots": slots[:2], "clean": True}})
    assert client.reply(number)["ok"] == {"released": 2}
    assert counts(client)["used"] == 12


def test_an_enclave_that_was_made_and_not_answered_is_answered_and_not_made_again(
    broker: Broker, images: Images, connect: Connect
) -> None:
    kept = broker(f"[administrators]\nuids = [0]\n[[create]]\nuid = {os.geteuid()}\n", keeper=True)
    client = connect(kept)
    args = {"name": "mine", "sigstruct": images.vault.sigstruct.read_bytes()}
    with images.vault.sgxs.open("rb") as image:
        number = client.post("create", (image.fileno(),), **args)
        made = client.reply(number)["ok"]
        kept.kill_worker()
        client.reconnect()
        client.send({"id": number, "op": "create", "args": args}, (image.fileno(),))
        assert client.reply(number)["ok"]["base"] == made["base"]
        # The same when only the enclave's own record was written.
        other = connect(kept)
        other.fails("create", "busy", (image.fileno(),), **args)
    assert len(client.ok("enclaves")["enclaves"]) == 1
    assert stored(client) == OWN + 3


def test_an_enclave_that_a_client_had_made_keeps_its_policy_and_can_be_built_again(
    broker: Broker, images: Images, connect: Connect
) -> None:
    kept = broker(f"[administrators]\nuids = [0]\n[[create]]\nuid = {os.geteuid()}\n", keeper=True)
    client = connect(kept)
    args = {"name": "mine", "sigstruct": images.vault.sigstruct.read_bytes()}
    with images.vault.sgxs.open("rb") as image:
        made = client.ok("create", (image.fileno(),), **args)
    kept.kill_worker()
    client.reconnect()
    (info,) = client.ok("enclaves")["enclaves"]
    assert {key: info[key] for key in ("base", "debug", "owner", "mrenclave", "generation")} == {
        key: made[key] for key in ("base", "debug", "owner", "mrenclave", "generation")
    }
    (users,) = client.ok("stats")["stats"]["users"]
    assert users["used"]["pages"] == made["pages"]
    client.ok("destroy", enclave="mine")
    assert stored(client) == OWN
    (users,) = client.ok("stats")["stats"]["users"]
    assert users["used"]["pages"] == 0


def test_what_the_policy_s_file_says_after_the_restart_holds(
    kept: RunningBroker, connect: Connect, vault_policy: Policy
) -> None:
    client = connect(kept)
    client.ok("attach", enclave="vault", slots=2)
    (kept.folder / "broker.toml").write_text(vault_policy("slots_per_client = 3"))
    os.kill(kept.pid, signal.SIGHUP)
    assert client.receive() is None
    client.reconnect()
    assert client.fails("attach", "busy", enclave="vault", slots=2)["detail"]["maximum"] == 3
    client.ok("attach", enclave="vault", slots=1)


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.02, 0.05, 0.1])
def test_a_broker_killed_while_it_makes_or_destroys_neither_leaks_nor_loses_an_enclave(
    broker: Broker, images: Images, connect: Connect, delay: float
) -> None:
    kept = broker(f"[administrators]\nuids = [0]\n[[create]]\nuid = {os.geteuid()}\n", keeper=True)
    client = connect(kept)
    args = {"name": "mine", "sigstruct": images.vault.sigstruct.read_bytes()}

    def repeat(op: str, fds: tuple[int, ...], **args: Any) -> dict[str, Any]:
        """Ask, have the broker killed meanwhile, and ask again as a client library does."""
        number = client.post(op, fds, **args)
        time.sleep(delay)  # any moment will do
        kept.kill_worker()
        client.sock.settimeout(30)
        client.reconnect()
        client.send({"id": number, "op": op, "args": args}, fds)
        reply = client.reply(number)
        assert "ok" in reply, reply
        ok: dict[str, Any] = reply["ok"]
        return ok

    with images.vault.sgxs.open("rb") as image:
        for _ in range(2):
            repeat("create", (image.fileno(),), **args)
            assert stored(client) == OWN + 3
            assert repeat("destroy", (), enclave="mine") == {"revoked": 0}
            assert client.ok("enclaves")["enclaves"] == []
            assert stored(client) == OWN

    def nothing_is_left() -> bool:
        names = [name for name in descriptors(kept.pid).values() if "memfd" in name]
        own = ("memfd:teemate-state", "memfd:teemate-ahead")
        return all(sum(kind in name for name in names) == 1 for kind in own) and len(names) == len(own)

    # The broker has asked the keeper to give them up, which may not have looked at that yet.
    wait_until(nothing_is_left, "the keeper has the snapshot, what is given ahead, and nothing else")


def test_a_revocation_that_the_broker_did_not_finish_is_finished_by_the_next(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    kept = broker(vault_policy("revoke_grace = 25.0"), keeper=True)
    client, administrator = connect(kept), connect(kept)
    ok = client.ok("attach", enclave="vault", slots=2)
    number = administrator.post("revoke", grant=ok["grant"], grace=60)
    assert client.event()["event"] == "revoked"
    kept.kill_worker()
    assert client.reconnect()["resumed"] == [ok["grant"]]
    assert client.event() == {
        "event": "revoked", "grant": ok["grant"], "slots": [s["slot"] for s in ok["slots"]], "deadline": 25.0
    }  # fmt: skip
    client.fails("slots.acquire", "revoked", grant=ok["grant"])
    client.ok("detach", grant=ok["grant"], clean=True)
    administrator.reconnect()
    administrator.send({"id": number, "op": "revoke", "args": {"grant": ok["grant"], "grace": 60}})
    assert administrator.reply(number)["ok"]["grants"] == 1
    take_all(client)


def state_of(kept: RunningBroker) -> Path:
    """The snapshot, as the keeper has it open."""
    for path, name in descriptors(kept.pid).items():
        if "memfd:teemate-state" in name:
            return path
    raise AssertionError("the keeper has no snapshot")


@pytest.mark.parametrize(("offset", "reason"), [(8, "damaged header"), (4096, "damaged at byte 4096")])
def test_a_state_that_the_broker_does_not_understand_is_refused_and_kept_until_it_is_discarded(
    broker: Broker, vault_policy: Policy, connect: Connect, offset: int, reason: str
) -> None:
    kept = broker(vault_policy(), keeper=True, expect_errors=True)
    client = connect(kept)
    client.ok("attach", enclave="vault")
    os.kill(kept.worker(), signal.SIGSTOP)
    with state_of(kept).open("r+b") as state:
        state.seek(offset)
        byte = state.read(1)
        state.seek(offset)
        state.write(bytes([byte[0] ^ 1]))
    kept.kill_worker()
    (refused,) = await_log(kept, "state refused")
    assert reason in str(refused["reason"])
    assert "--discard-state" in str(refused["advice"])
    (held,) = await_log(kept, "keeper: no worker runs")
    assert held["kept"] == OWN + 3
    assert f"kill -USR1 {kept.pid}" in str(held["advice"])
    os.kill(kept.pid, signal.SIGHUP)  # a restart alone changes nothing
    await_log(kept, "keeper: no worker runs", 2)
    os.kill(kept.pid, signal.SIGUSR1)
    await_log(kept, "ready", 2)
    assert "resumed" not in client.reconnect()
    assert counts(client) == {
        "total": 12, "free": 12, "used": 0, "withheld": 0, "quarantined": 0, "waiting": 0
    }  # fmt: skip
    assert stored(client) == OWN + 3


def test_two_clients_never_have_one_slot_after_restarts_under_load(
    kept: RunningBroker, connect: Connect
) -> None:
    clients = [connect(kept) for _ in range(4)]
    for round_number in range(3):
        for client in clients:
            for grant in client.resumed:
                client.ok("detach", grant=grant, clean=True)
        posted = [(client, client.post("attach", enclave="vault", slots=2, wait=20)) for client in clients]
        kept.kill_worker()
        holders: dict[int, int] = {}
        for client, number in posted:
            client.reconnect()
            client.send({"id": number, "op": "attach", "args": {"enclave": "vault", "slots": 2, "wait": 20}})
        for client, number in posted:
            ok = client.reply(number)["ok"]
            client.resumed = [ok["grant"]]
            for slot in ok["slots"]:
                assert slot["slot"] not in holders, f"round {round_number}"
                holders[slot["slot"]] = ok["grant"]
        assert len(holders) == 8
    with raw_client(kept.socket) as other:
        assert counts(other)["used"] == 8


def test_a_host_that_was_emptied_stays_empty_and_its_enclaves_come_back_when_asked_for(
    broker: Broker, vault_policy: Policy, images: Images, connect: Connect
) -> None:
    kept = broker(vault_policy(more=f"[[create]]\nuid = {os.geteuid()}\n"), keeper=True)
    client = connect(kept)
    with images.vault.sgxs.open("rb") as image:
        sigstruct = images.vault.sigstruct.read_bytes()
        made = client.ok("create", (image.fileno(),), name="mine", sigstruct=sigstruct)
    assert stored(client) == OWN + 2 * 3
    told = client.ok("drain", all=True)["enclaves"]
    assert [enclave["emptied"] for enclave in told] == [True, True]
    assert stored(client) == OWN + 2  # what they are built from
    for _ in range(2):
        kept.kill_worker()
        client.reconnect()
        await_log(kept, "ready")
        assert client.ok("enclaves")["enclaves"] == []
        client.fails("attach", "draining", enclave="vault")
        assert stored(client) == OWN + 2
    assert sorted(client.ok("undrain", all=True)["enclaves"]) == ["mine", "vault"]
    client.ok("attach", enclave="vault")
    assert stored(client) == OWN + 2 * 3
    kept.kill_worker()
    client.reconnect()
    infos = {info["name"]: info for info in client.ok("enclaves")["enclaves"]}
    assert infos["mine"]["generation"] == infos["vault"]["generation"] == 2
    assert infos["mine"]["mrenclave"] == made["mrenclave"]
    (users,) = client.ok("stats")["stats"]["users"]
    assert users["used"]["pages"] == made["pages"]


def test_a_drained_enclave_stays_drained(kept: RunningBroker, connect: Connect) -> None:
    client = connect(kept)
    grant = client.ok("attach", enclave="vault")["grant"]
    client.ok("drain", enclave="vault", deadline=0)
    assert client.event()["event"] == "draining"
    kept.kill_worker()
    client.reconnect()
    assert client.event()["event"] == "draining"
    client.fails("attach", "draining", enclave="vault")
    client.ok("undrain", enclave="vault")
    client.ok("detach", grant=grant, clean=True)
    take_all(client)


def test_slots_in_quarantine_stay_there(broker: Broker, images: Images, connect: Connect) -> None:
    policy = (
        f'[administrators]\nuids = [0]\n[[enclave]]\nname = "bare"\nimage = "{images.bare.sgxs}"\n'
        f'sigstruct = "{images.bare.sigstruct}"\nrequire_sdk = false\n'
        f"[[enclave.attach]]\nuid = {os.geteuid()}\n"
    )
    kept = broker(policy, keeper=True)
    client = connect(kept)
    grants = [client.ok("attach", enclave="bare", slots=1)["grant"] for _ in range(2)]
    client.ok("detach", grant=grants[0], clean=True)
    while counts(client)["quarantined"] != 1:
        pass
    kept.kill_worker()
    client.reconnect()
    before = counts(client)
    assert before["quarantined"] == 1
    assert before["used"] == 1
    (slot,) = [s for s in client.ok("holders", enclave="bare")["slots"] if s["state"] == "quarantined"]
    assert slot["former"] == os.geteuid(), "also this broker knows whose it was"
    # The other is given back while nobody sees it: its image has nothing that could scrub it.
    number = client.post("detach", grant=grants[1], clean=True)
    client.reply(number)
    kept.kill_worker()
    client.reconnect()
    assert counts(client)["quarantined"] == 2
