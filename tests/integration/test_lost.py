"""An enclave whose EPC is gone: all hear of it, nobody tries for ever, and no client is to blame."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any

import pytest
from backends import sgx_only
from images import Images
from losing import break_epc, lose_epc
from policies import enclave_policy
from processes import wait_until
from running_broker import RunningBroker

import teemate

StartBroker = Callable[..., RunningBroker]


@pytest.fixture
def lost_policy(images: Images) -> str:
    """The vault, which wants to be told the time, and an image that loops on request; neither is rebuilt."""
    return make_policy(images, "rebuild_limit = 0")


@pytest.fixture
def rebuilding_policy(images: Images) -> str:
    """The same, rebuilt as often as a policy without a word about it allows."""
    return make_policy(images, "")


def make_policy(images: Images, settings: str) -> str:
    return "\n".join(
        [
            f"[administrators]\nuids = [{os.geteuid()}]",
            f"[[create]]\nuid = {os.geteuid()}\nrequire_sdk = true",
            enclave_policy("vault", images.vault, settings),
            enclave_policy("faults", images.faults, settings),
        ]
    )


def info_of(connection: teemate.Broker, name: str) -> teemate.EnclaveInfo:
    (info,) = [info for info in connection.enclaves() if info.name == name]
    return info


def statistics_of(connection: teemate.Broker, name: str) -> dict[str, Any]:
    (found,) = [enclave for enclave in connection.stats()["enclaves"] if enclave["name"] == name]
    return dict(found)


@pytest.mark.parametrize("name", ["vault", "faults"])
def test_a_lost_enclave_is_lost_for_every_later_call_and_for_the_broker(
    broker: StartBroker, lost_policy: str, name: str
) -> None:
    running = broker(lost_policy)
    with teemate.connect(running.socket) as admin, teemate.connect(running.socket) as connection:
        with connection.attach(name, slots=2) as enclave:
            with enclave.slot() as slot, enclave.slot() as second:
                assert slot.call("echo", b"before") == b"before"
                second.call("empty")
                before = statistics_of(admin, name)["warden"]
                lose_epc(enclave)
                with pytest.raises(teemate.EnclaveLost):
                    slot.call("echo", b"after")
                for _ in range(3):  # refused here: nobody enters any more
                    with pytest.raises(teemate.EnclaveLost):
                        second.call("empty")
                with pytest.raises(teemate.EnclaveLost), enclave.slot():
                    pass
        wait_until(lambda: info_of(admin, name).state != "ready", "the broker knows of the loss")
        info = info_of(admin, name)
        assert info.state == "lost"
        assert "EPC" in str(info.reason)
        assert "rebuild_limit" in str(info.reason)
        with pytest.raises(teemate.EnclaveLost, match="EPC"):
            admin.attach(name)
        after = statistics_of(admin, name)["warden"]
        assert (after["started"], after["killed"]) == (before["started"], before["killed"])
        assert after["requests"] - before["requests"] < 10
    (record,) = [r for r in running.log() if r["event"] == "enclave lost" and r["enclave"] == name]
    assert record["level"] == "warning"
    assert (record["first_seen_by_pid"], record["first_seen_by_uid"]) == (os.getpid(), os.geteuid())
    assert not [r for r in running.log() if r["event"] in ("slot quarantined", "enclave quarantined")]


def test_a_call_that_is_inside_when_the_enclave_is_lost_ends_as_lost(
    broker: StartBroker, lost_policy: str
) -> None:
    running = broker(lost_policy)
    with teemate.connect(running.socket) as connection, connection.attach("faults") as enclave:
        lost: list[int] = []

        def lose_it(data: bytes) -> bytes:
            lose_epc(enclave)
            lost.append(1)
            return data

        with enclave.slot() as slot, pytest.raises(teemate.EnclaveLost):
            slot.call("ocall", b"x", ocalls={"echo": lose_it})
        assert lost


def test_a_neighbour_hears_of_the_loss_without_entering(broker: StartBroker, lost_policy: str) -> None:
    running = broker(lost_policy)
    with teemate.connect(running.socket) as one, teemate.connect(running.socket) as two:
        with one.attach("faults", slots=1) as mine:
            # The same process cannot map it twice: this one holds the grant alone.
            reply = two._connection.request("attach", {"enclave": "faults", "slots": 1})
            for fd in reply.fds:
                os.close(fd)
            with mine.slot() as slot:
                lose_epc(mine)
                with pytest.raises(teemate.EnclaveLost):
                    slot.call("empty")
        events: list[Any] = []
        two._connection.on_event = events.append
        wait_until(lambda: two.ping() or events, "the other holder is told")
        assert (events[0]["event"], events[0]["grant"]) == ("lost", reply.ok["grant"])


def test_a_fault_of_the_enclaves_own_is_not_taken_for_a_loss(broker: StartBroker, lost_policy: str) -> None:
    running = broker(lost_policy)
    with teemate.connect(running.socket) as connection:
        with connection.attach("faults", slots=4) as enclave:
            own_tcs = enclave._unopened[0].tcs + enclave.base
            for name, payload in [
                ("fault_line", b""),
                ("overflow_stack", b""),
                ("poke", struct.pack("<QQ", own_tcs, 1)),  # the page of a TCS is nobody's to write
            ]:
                with pytest.raises(teemate.EnclaveFault, match="#PF"), enclave.slot() as slot:
                    slot.call(name, payload)
            with enclave.slot() as slot:
                assert slot.call("echo", b"here") == b"here"
        assert info_of(connection, "faults").state == "ready"


def test_a_lost_enclave_is_destroyed_and_made_again(
    broker: StartBroker, lost_policy: str, images: Images
) -> None:
    running = broker(lost_policy)
    with teemate.connect(running.socket) as connection:
        with connection.attach("faults") as enclave, enclave.slot() as slot:
            lose_epc(enclave)
            with pytest.raises(teemate.EnclaveLost):
                slot.call("empty")
        connection.destroy("faults", force=True)
        connection.create("faults", images.faults.sgxs, images.faults.sigstruct)
        with connection.attach("faults") as enclave, enclave.slot() as slot:
            assert slot.call("echo", b"again") == b"again"


def lose_one(connection: teemate.Broker, name: str) -> None:
    """Attach, lose the memory, and have the broker hear of it."""
    with connection.attach(name) as enclave, enclave.slot() as slot:
        slot.call("empty")
        lose_epc(enclave)
        with pytest.raises(teemate.EnclaveLost):
            slot.call("empty")


def test_a_lost_enclave_is_built_again_and_clients_attach_to_its_next_generation(
    broker: StartBroker, rebuilding_policy: str
) -> None:
    running = broker(rebuilding_policy)
    with teemate.connect(running.socket) as admin, teemate.connect(running.socket) as connection:
        old = info_of(admin, "faults")
        with connection.attach("faults") as enclave:
            with enclave.slot() as slot:
                lose_epc(enclave)
                with pytest.raises(teemate.EnclaveLost, match="next generation"):
                    slot.call("empty")
            wait_until(lambda: info_of(admin, "faults").generation == 2, "it is built again")
            # The old grant is there still: nothing is in the way of the new one.
            with connection.attach("faults") as again, again.slot() as slot:
                assert slot.call("echo", b"again") == b"again"
            with pytest.raises(teemate.EnclaveLost), enclave.slot():
                pass
        new = info_of(admin, "faults")
        assert (new.state, new.generation, new.mrenclave) == ("ready", 2, old.mrenclave)
        assert new.slots.total == old.slots.total
        # The old one is held by nobody: its address and its warden are free.
        wait_until(lambda: admin.stats()["generations"]["retired"] == 0, "the old one is gone")
        stats = admin.stats()
        assert stats["generations"]["rebuilt"] == 1
        assert stats["addresses"]["ranges"] == 2
    (record,) = [r for r in running.log() if r["event"] == "next generation"]
    assert (record["generation"], record["mrenclave"]) == (2, old.mrenclave.hex())


def test_an_attach_that_meets_a_lost_enclave_waits_for_the_next_generation(
    broker: StartBroker, images: Images
) -> None:
    running = broker(make_policy(images, "rebuild_pause = 0.2"))
    with teemate.connect(running.socket) as connection:
        for before in range(3):  # the second and third rebuild come after a pause
            lose_one(connection, "faults")
            wait_until(
                lambda before=before: (
                    info_of(connection, "faults").state == "lost" or rebuilt(running) > before
                ),
                "the broker knows of the loss",
            )
            with connection.attach("faults") as enclave, enclave.slot() as slot:
                assert slot.call("echo", b"here") == b"here"
        assert info_of(connection, "faults").generation == 4


def rebuilt(running: RunningBroker) -> int:
    return len([record for record in running.log() if record["event"] == "next generation"])


def test_an_enclave_that_is_lost_too_often_is_not_built_again_and_the_log_names_the_setting(
    broker: StartBroker, images: Images
) -> None:
    running = broker(make_policy(images, "rebuild_limit = 2\nrebuild_pause = 0.0"))
    with teemate.connect(running.socket) as connection:
        for generation in (2, 3):
            lose_one(connection, "faults")
            wait_until(
                lambda generation=generation: info_of(connection, "faults").generation == generation,
                "it is built again",
            )
        lose_one(connection, "faults")
        wait_until(lambda: info_of(connection, "faults").state == "lost", "it is given up")
        with pytest.raises(teemate.EnclaveLost, match="rebuild_limit"):
            connection.attach("faults")
        assert connection.stats()["generations"]["given_up"] == 1
    (record,) = [r for r in running.log() if r["event"] == "enclave not rebuilt"]
    assert (record["limit"], record["window"]) == (2, 3600.0)


def test_an_enclave_made_by_request_is_built_again_from_the_image_that_came(
    broker: StartBroker, rebuilding_policy: str, images: Images
) -> None:
    running = broker(rebuilding_policy)
    image = running.folder / "image"
    image.write_bytes(images.faults.sgxs.read_bytes())
    with teemate.connect(running.socket) as connection:
        made = connection.create("mine", image, images.faults.sigstruct)
        image.unlink()
        pages = connection.stats()["users"][0]["used"]["pages"]
        lose_one(connection, "mine")
        wait_until(lambda: info_of(connection, "mine").generation == 2, "it is built again")
        assert info_of(connection, "mine").mrenclave == made.mrenclave
        assert connection.stats()["users"][0]["used"]["pages"] == pages, "charged once, as before"
        with connection.attach("mine") as enclave, enclave.slot() as slot:
            assert slot.call("echo", b"again") == b"again"
        connection.destroy("mine")
        assert connection.stats()["users"][0]["used"]["pages"] == 0


def test_a_lost_enclave_that_is_drained_stays_drained_in_its_next_generation(
    broker: StartBroker, rebuilding_policy: str
) -> None:
    running = broker(rebuilding_policy)
    with teemate.connect(running.socket) as connection:
        with connection.attach("faults") as enclave, enclave.slot() as slot:
            slot.call("empty")
            (drained,) = connection.drain("faults", deadline=0)
            assert (drained.held, drained.left) == (1, 1)
            lose_epc(enclave)
            with pytest.raises(teemate.EnclaveLost):
                slot.call("empty")
        wait_until(lambda: info_of(connection, "faults").generation == 2, "it is built again")
        with pytest.raises(teemate.Draining):
            connection.attach("faults")
        assert connection.undrain("faults").enclaves == ("faults",)
        connection.attach("faults").detach()


def test_an_enclave_whose_slots_are_all_in_quarantine_is_replaced(
    broker: StartBroker, images: Images
) -> None:
    running = broker(
        f"[administrators]\nuids = [{os.geteuid()}]\n"
        + enclave_policy("bare", images.bare, "require_sdk = false\nslots_per_client = 64")
    )
    with teemate.connect(running.socket) as connection:
        old = info_of(connection, "bare")
        connection.attach("bare", slots=old.slots.total).detach()  # nothing can scrub them
        wait_until(lambda: info_of(connection, "bare").generation == 2, "it is built again")
        with connection.attach("bare") as enclave, enclave.slot() as slot:
            slot.enter()
        wait_until(lambda: connection.stats()["generations"]["retired"] == 0, "the old one is gone")
    (record,) = [r for r in running.log() if r["event"] == "next generation"]
    assert "quarantine" in str(record["reason"])


@sgx_only("the sim's pages are ordinary memory: an error there ends the process")
def test_a_memory_error_in_a_slot_loses_the_enclave_for_all_and_ends_no_process(
    broker: StartBroker, lost_policy: str
) -> None:
    running = broker(lost_policy)
    with teemate.connect(running.socket) as admin, teemate.connect(running.socket) as connection:
        with connection.attach("faults", slots=2) as enclave:
            tcs = enclave.base + enclave._unopened[0].tcs
            with enclave.slot() as slot, enclave.slot() as second:
                slot.call("empty")
                second.call("empty")
                break_epc("poison", hex(tcs))
                with pytest.raises(teemate.EnclaveLost):
                    slot.call("empty")
                with pytest.raises(teemate.EnclaveLost):
                    second.call("empty")
        wait_until(lambda: info_of(admin, "faults").state == "lost", "the broker knows of the loss")
        assert info_of(admin, "vault").state == "ready"
        with admin.attach("vault") as other, other.slot() as slot:
            assert slot.call("echo", b"unharmed") == b"unharmed"
