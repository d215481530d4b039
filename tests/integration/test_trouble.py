"""Clients that misbehave, fault, hang or lose their grant: nothing is lost for anybody else."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from backends import BACKEND, PATIENCE
from images import Images
from other_client import OtherClient
from policies import enclave_policy
from processes import wait_until
from running_broker import DEADLINE, RunningBroker

import teemate
from teemate import GrantedEnclave, Slot
from teemate._connection import Connection
from teemate._types import SlotGrant

StartBroker = Callable[..., RunningBroker]


@contextmanager
def attached(running: RunningBroker, name: str, slots: int = 1) -> Iterator[GrantedEnclave]:
    with teemate.connect(running.socket) as connection, connection.attach(name, slots=slots) as enclave:
        yield enclave


def give_other_key(enclave: GrantedEnclave, **changes: object) -> Slot:
    """Open the grant's first slot with something else than the broker gave."""
    grant = enclave._unopened.popleft()
    return Slot(enclave, grant._replace(**changes))  # type: ignore[arg-type]


def out_of_use(running: RunningBroker, name: str) -> int:
    """Slots that are quarantined once the warden has looked at all that came back."""
    with teemate.connect(running.socket) as connection:
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            slots = next(info.slots for info in connection.enclaves() if info.name == name)
            if not slots.used and not slots.withheld:
                return slots.quarantined
    raise AssertionError(f"slots are still on their way back: {slots}")


def test_a_forged_key_does_not_open_the_gate(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    with OtherClient(running.socket, "vault") as honest, attached(running, "vault") as forger:
        key = forger._unopened[0].key
        for forged in (bytes(16), bytes([key[0] ^ 1]) + key[1:], key[:15] + bytes([key[15] ^ 0x80])):
            slot = Slot(forger, forger._unopened[0]._replace(key=forged))
            with pytest.raises(teemate.Revoked, match="refused the key"):
                slot.call("empty")
            slot._close()
        slot = give_other_key(forger)
        slot.call("empty")
        slot._close()
        assert honest.call("echo", b"fine") == b"fine"


def test_a_forged_identity_is_refused_inside(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    with attached(running, "vault") as forger:
        bind = bytearray(forger._unopened[0].bind)
        bind[8] ^= 1  # the principal
        slot = give_other_key(forger, bind=bytes(bind))
        with pytest.raises(teemate.Denied, match="identity"):
            slot.call("empty")
        slot._close()


def test_a_replayed_key_of_an_earlier_holder_does_not_open_the_gate(
    broker: StartBroker, images: Images
) -> None:
    image = images.build("vault", slots=1, heap="1M")
    running = broker(enclave_policy("vault", image))
    with attached(running, "vault") as first:
        old = first._unopened[0]
        with first.slot() as slot:
            slot.call("empty")
    with attached(running, "vault") as second:
        new = second._unopened[0]
        assert new.slot == old.slot
        assert new.key != old.key
        replay = Slot(second, old)
        with pytest.raises(teemate.Revoked):
            replay.call("empty")
        replay._close()
        with second.slot() as slot:
            slot.call("empty")


def test_the_key_of_another_slot_opens_only_that_slot(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    with attached(running, "vault", slots=2) as enclave:
        one, two = enclave._unopened
        mixed = Slot(enclave, SlotGrant(one.slot, one.tcs, one.generation, two.key, one.bind))
        with pytest.raises(teemate.Revoked):
            mixed.call("empty")
        mixed._close()
        with enclave.slot() as slot:
            slot.call("empty")


@pytest.mark.parametrize("op", ["slots.release", "slots.acquire", "detach"])
def test_grants_and_slots_of_other_clients_cannot_be_named(broker: StartBroker, policy: str, op: str) -> None:
    running = broker(policy)
    with OtherClient(running.socket, "vault") as victim, attached(running, "vault") as attacker:
        theirs, mine = victim.slots[0], attacker._unopened[0].slot
        connection = attacker._connection
        extra = {"slots.release": {"slots": [theirs], "clean": True}, "slots.acquire": {"count": 1}}
        with pytest.raises(teemate.Error) as caught:
            connection.request(op, {"grant": victim.grant, **extra.get(op, {})})
        assert isinstance(caught.value, teemate.NotFound | teemate.NotAttached | teemate.Denied)
        with pytest.raises(teemate.Error):
            connection.request(
                "slots.release", {"grant": attacker.grant, "slots": [mine, theirs], "clean": True}
            )
        assert victim.call("echo", b"here") == b"here"


def test_a_fault_costs_nothing_and_nobody_else_notices(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    with OtherClient(running.socket, "faults") as neighbour:
        with attached(running, "faults") as enclave, enclave.slot() as slot:
            with pytest.raises(teemate.EnclaveFault, match="#PF"):
                slot.call("fault_line")
        assert neighbour.call("echo", b"here") == b"here"
        with attached(running, "faults") as again, again.slot() as slot:
            slot.call("empty")
    assert out_of_use(running, "faults") == 0


def test_the_log_names_the_function_and_line_of_a_fault(broker: StartBroker, policy: str) -> None:
    source = Path(__file__).parents[2] / "native" / "enclaves" / "faults" / "faults.c"
    line = next(n for n, text in enumerate(source.read_text().splitlines(), 1) if "FAULT LINE" in text)
    running = broker(policy)
    with attached(running, "faults") as enclave, enclave.slot() as slot:
        with pytest.raises(teemate.EnclaveFault):
            slot.call("fault_line")
    assert out_of_use(running, "faults") == 0
    (record,) = [record for record in running.log() if record["event"] == "slot repaired"]
    reason = str(record["left"])
    assert "interrupted" in reason
    assert "at fault_at_known_line" in reason
    assert f"faults.c:{line}" in reason


def test_a_call_that_loops_times_out_and_its_slot_is_repaired(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    with attached(running, "faults") as enclave:
        with enclave.slot() as slot, pytest.raises(teemate.CallTimeout):
            slot.call("loop", timeout=0.05)
        enclave.acquire()
        with enclave.slot() as slot:
            slot.call("empty", timeout=60)
    assert out_of_use(running, "faults") == 0


def test_a_revoked_client_gets_revoked_and_its_old_key_never_opens(
    broker: StartBroker, images: Images, policy: str
) -> None:
    running = broker(policy)
    with teemate.connect(running.socket) as admin, attached(running, "vault") as enclave:
        grant = enclave._unopened[0]
        with enclave.slot() as slot:
            slot.call("empty")
        done = admin.revoke(grant=enclave.grant, grace=30.0, reason="test")
        assert (done.grants, done.quarantined, done.leaked) == (1, 0, 0)
        with pytest.raises(teemate.Revoked), enclave.slot() as slot:
            slot.call("empty")
        enclave.detach()
        with attached(running, "vault") as fresh:
            replay = Slot(fresh, grant)
            with pytest.raises(teemate.Revoked):
                replay.call("empty")
            replay._close()
    assert running.audit("revocation")


def looping(enclave: GrantedEnclave, errors: list[BaseException]) -> threading.Thread:
    """Return a thread that is inside, and puts what ends its call into `errors`."""

    def body() -> None:
        try:
            with enclave.slot() as slot:
                slot.call("loop")
        except teemate.Error as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    wait_until(lambda: enclave.statistics().pauses, "it is inside")
    return thread


def test_revoking_reaches_a_call_that_is_inside(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    errors: list[BaseException] = []

    with teemate.connect(running.socket) as admin, attached(running, "faults") as enclave:
        with enclave.slot() as slot:
            slot.call("empty")
        thread = looping(enclave, errors)
        done = admin.revoke(grant=enclave.grant, grace=6.0 * PATIENCE)  # half of it the call has for itself
        thread.join(60)
        assert [type(error) for error in errors] == [teemate.Revoked]
        assert (done.grants, done.cleared, done.leaked) == (1, 1, 0)
    assert out_of_use(running, "faults") == 0


def test_a_program_hears_in_its_first_call_that_it_is_revoked(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    errors: list[BaseException] = []

    with teemate.connect(running.socket) as admin, attached(running, "faults") as enclave:
        thread = looping(enclave, errors)
        words = {"grant": enclave.grant, "grace": 4 * DEADLINE}
        revoking = threading.Thread(target=admin.revoke, kwargs=words, daemon=True)
        revoking.start()
        wait_until(lambda: enclave.gone, "it has heard")
        enclave.patience = time.monotonic()  # it would go on for half of the grace
        thread.join(60)
        assert [type(error) for error in errors] == [teemate.Revoked]
        revoking.join(60)
        assert not revoking.is_alive()
    assert out_of_use(running, "faults") == 0


def test_statistics_of_the_broker_count_what_happened(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    with attached(running, "vault") as enclave, enclave.slot() as slot:
        slot.call("empty")
        with teemate.connect(running.socket, client="admin") as admin:
            names = {client.name for client in admin.clients()}
            assert "admin" in names
            grants = [grant for client in admin.clients() for grant in client.grants]
            assert [(grant.grant, grant.slots) for grant in grants] == [(enclave.grant, (slot.index,))]
            assert admin.stats()


def test_an_unknown_operation_is_unsupported_and_the_connection_lives(
    broker: StartBroker, policy: str
) -> None:
    running = broker(policy)
    connection = Connection(running.socket)
    with pytest.raises(teemate.Unsupported):
        connection.request("no.such.operation", {"x": 1})
    connection.request("ping")
    connection.close()


def test_an_enclave_is_created_used_and_destroyed_over_the_socket(
    broker: StartBroker, images: Images, policy: str
) -> None:
    uid = os.geteuid()
    running = broker(f"{policy}\n[[create]]\nuid = {uid}\n")
    with teemate.connect(running.socket) as admin:
        info = admin.create("mine", images.vault.sgxs, images.vault.sigstruct, backend=BACKEND)
        assert (info.name, info.mrenclave) == ("mine", images.vault.mrenclave)
        try:
            with admin.attach("mine") as enclave, enclave.slot() as slot:
                slot.call("put", struct.pack("<BBHIQQ", 1, 0, 1, 1, 0, 0) + b"kv")
        except teemate.Denied:
            pass  # what `create` makes has no attach rule for its maker in this policy
        assert admin.destroy("mine", force=True) == 0
        assert "mine" not in {info.name for info in admin.enclaves()}
        with pytest.raises(teemate.ImageError):
            admin.create("bad", images.vault.sigstruct, images.vault.sigstruct, backend=BACKEND)
