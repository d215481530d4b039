"""What a broker says without being asked: the C library does its part, whatever the program does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from backends import PATIENCE
from c_programs import Program, Refused
from fake_broker import FakeBroker, Upstream, running
from losing import lose_epc
from processes import wait_until
from recorder import Recorder
from running_broker import RunningBroker

import teemate
from teemate._types import Activity
from teemate.wire import close_all, receive, send

StartBroker = Callable[..., RunningBroker]
StartProgram = Callable[[], Program]


# -- revoked -----------------------------------------------------------------------------------


def test_a_revoked_grant_is_unmapped_and_acknowledged_by_a_program_that_does_nothing(
    shared: RunningBroker, program: StartProgram
) -> None:
    user = program()
    user.connect(shared.socket)
    grant = user.attach("vault", slots=3)
    held = user.take(grant)
    user.call(held, "empty")
    with teemate.connect(shared.socket) as admin:
        told = admin.revoke(enclave="vault", grace=20.0)
        assert (told.grants, told.cleared, told.leaked) == (1, 3, 0)
    assert user.do("event", 20000)[::3] == ["1", "3"]
    with pytest.raises(Refused) as caught:
        user.call(held, "empty")
    assert caught.value.code == "revoked"
    with pytest.raises(Refused) as caught:
        user.take(grant, 0)
    assert caught.value.code == "revoked"
    user.do("give", held)
    user.do("detach", grant)
    assert user.number("mapped") == 0
    user.call(user.take(user.attach("vault")), "empty")


@pytest.mark.parametrize("first", [True, False], ids=["its first", "a later one"])
def test_a_call_inside_a_revoked_grant_is_abandoned_and_the_slot_acknowledged(
    shared: RunningBroker, program: StartProgram, first: bool
) -> None:
    user = program()
    user.connect(shared.socket)
    grant = user.attach("faults", slots=2)
    lease = user.take(grant)
    if not first:
        user.call(lease, "empty")
    user.do("start", 0, "call", lease, "loop", "-", -1, 0)
    with teemate.connect(shared.socket) as admin:
        told = admin.revoke(enclave="faults", grace=6.0 * PATIENCE)  # half of it the call has for itself
        assert told.cleared == 2
    with pytest.raises(Refused) as caught:
        user.do("join", 0)
    assert caught.value.code == "revoked"
    user.do("give", lease)
    user.do("disconnect")
    assert user.number("mapped") == 0


def test_a_thread_in_an_ocall_handler_acknowledges_when_it_comes_back(
    shared: RunningBroker, program: StartProgram
) -> None:
    user = program()
    user.connect(shared.socket)
    grant = user.attach("faults", slots=1)
    lease = user.take(grant)
    user.call(lease, "empty")
    user.do("start", 0, "ocall", lease, "ocall", "00", "wait")
    while user.number("handlers") == 0:
        pass
    with pytest.raises(Refused, match="still in a call") as caught:
        user.do("detach", grant)
    assert caught.value.code == "busy"
    with teemate.connect(shared.socket) as admin:
        told = admin.revoke(enclave="faults", grace=0.2)
        assert told.leaked == 1
        user.do("stopped")
        with pytest.raises(Refused):
            user.do("join", 0)
        wait_until(lambda: not withheld(admin, "faults"), "the slot is not acknowledged")
    user.do("give", lease)
    user.do("detach", grant)
    assert user.number("mapped") == 0


def withheld(admin: teemate.Broker, name: str) -> int:
    (slots,) = [info.slots for info in admin.enclaves() if info.name == name]
    return slots.withheld


# -- lost ----------------------------------------------------------------------------------------


def test_a_lost_enclave_is_lost_for_every_later_call_and_the_next_generation_can_be_had(
    broker: StartBroker, policy: str, program: StartProgram
) -> None:
    running = broker(policy)
    user = program()
    user.connect(running.socket)
    grant = user.attach("vault", slots=2)
    lease, other = user.take(grant), user.take(grant)
    user.call(lease, "empty")
    with teemate.connect(running.socket) as connection, connection.attach("vault") as enclave:
        lose_epc(enclave)
        with pytest.raises(Refused) as caught:
            user.do("calls", lease, 10)
        assert caught.value.code == "enclave-lost"
        with pytest.raises(Refused) as caught:
            user.call(other, "empty")
        assert caught.value.code == "enclave-lost"
        user.do("give", lease)  # its report makes the warden look
        assert user.do("event", 30000)[0] == "2"
        user.do("give", other)
        user.do("detach", grant)
        assert user.number("mapped") == 0
        wait_until(lambda: ready(connection, "vault"), "it is not rebuilt")
    again = user.attach("vault")
    assert user.call(user.take(again), "echo", b"next") == b"next"


def ready(connection: teemate.Broker, name: str) -> bool:
    (info,) = [info for info in connection.enclaves() if info.name == name]
    return info.state == "ready" and info.generation == 2


# -- the broker goes -------------------------------------------------------------------------------


def test_calls_go_on_without_a_broker_and_requests_are_lost(
    broker: StartBroker, policy: str, program: StartProgram
) -> None:
    user = program()
    with ExitStack() as life:
        from running_broker import run_broker

        running = life.enter_context(run_broker(policy))
        user.connect(running.socket)
        grant = user.attach("vault")
        lease = user.take(grant)
        user.call(lease, "empty")
    with pytest.raises(Refused) as caught:
        user.do("event", 20000)  # it comes by itself
    assert caught.value.code == "connection-lost"
    with pytest.raises(Refused) as caught:
        user.do("ping")
    assert caught.value.code == "connection-lost"
    user.do("give", lease)
    user.do("detach", grant)
    user.do("disconnect")
    assert user.number("mapped") == 0


@pytest.fixture
def front(broker: StartBroker, policy: str, tmp_path: Path) -> Iterator[FakeBroker]:
    """A broker that keeps its sessions when it dies; the real one behind it grants."""
    upstream = Upstream(broker(policy).socket)
    with upstream.sock, running(FakeBroker(str(tmp_path / "front"), upstream)) as fake:
        yield fake


def die(front: FakeBroker) -> None:
    lives = front.lives
    front.kill()
    wait_until(lambda: front.lives > lives, "it does not die")


def test_a_program_resumes_with_a_broker_that_was_restarted(front: FakeBroker, program: StartProgram) -> None:
    user = program()
    user.connect(front.path, "resumer")
    grant = user.attach("vault")
    lease = user.take(grant)
    user.call(lease, "empty")
    for life in range(3):
        die(front)
        assert user.do("event", 20000)[0] == "5"
        assert user.do("event", 20000)[0] == "6"  # by itself: no request was made
        assert len(front.hellos) == life + 2
        assert "resume" in front.hellos[-1]
        assert user.call(lease, "echo", b"on") == b"on"
        user.do("ping")
    assert front.hellos[0]["client"] == "resumer"
    user.do("give", lease)
    user.do("disconnect")
    assert front.performed["attach"] == 1
    assert front.performed["detach"] == 1


@pytest.mark.parametrize("point", ["received", "done"])
@pytest.mark.parametrize("op", ["attach", "slots.acquire", "slots.release", "detach"])
def test_a_request_that_a_broker_took_with_it_is_done_once(
    front: FakeBroker, program: StartProgram, op: str, point: str
) -> None:
    left = [1]

    def once(at: str, of: str) -> bool:
        if (at, of) == (point, op) and left[0]:
            left[0] -= 1
            return True
        return False

    front.die = once
    user = program()
    user.connect(front.path)
    grant = user.attach("vault", slots=2)
    user.do("acquire", grant, 1, 1000)
    user.do("release", grant, 1)
    assert user.call(user.take(grant), "echo", b"here") == b"here"
    user.do("detach", grant)
    user.do("disconnect")
    assert front.lives == 2
    for name in ("attach", "slots.acquire", "slots.release", "detach"):
        assert front.performed[name] == 1, name


def test_a_broker_that_lost_its_state_leaves_a_lost_grant(front: FakeBroker, program: StartProgram) -> None:
    user = program()
    user.connect(front.path)
    grant = user.attach("vault", slots=2)
    lease = user.take(grant)
    user.call(lease, "empty")
    front.remember = False
    die(front)
    assert user.do("event", 20000)[0] == "5"
    assert user.do("event", 20000)[0] == "7"
    with pytest.raises(Refused, match="no broker knows this grant") as caught:
        user.call(lease, "empty")
    assert caught.value.code == "enclave-lost"
    assert user.number("mapped") == 0
    with pytest.raises(Refused) as caught:
        user.do("acquire", grant, 1, 0)
    assert caught.value.code == "enclave-lost"
    user.do("give", lease)
    user.do("detach", grant)
    again = user.attach("vault")
    user.call(user.take(again), "empty")
    user.do("disconnect")


def test_a_broker_that_does_not_come_back_is_given_up_after_its_grace(
    front: FakeBroker, program: StartProgram
) -> None:
    front.grace = 0.3
    user = program()
    user.connect(front.path)
    lease = user.take(user.attach("vault"))
    user.call(lease, "empty")
    front.listening = False
    die(front)
    with pytest.raises(Refused, match=r"did not come back within resume_grace = 0\.3 s") as caught:
        user.do("ping")
    assert caught.value.code == "connection-lost"
    with pytest.raises(Refused) as caught:
        user.call(lease, "empty")
    assert caught.value.code == "enclave-lost"
    user.do("give", lease)
    user.do("disconnect")
    assert user.number("mapped") == 0


def test_a_broker_without_room_says_which_limit(front: FakeBroker, program: StartProgram) -> None:
    detail = {"limit": "connections", "setting": "[limits] connections"}
    front.refusal = {"code": "limit-reached", "message": "too many of you", "detail": detail}
    user = program()
    user.connect(front.path)
    with pytest.raises(Refused, match="too many of you") as caught:
        user.attach("vault")
    assert caught.value.code == "limit-reached"
    assert (caught.value.limit, caught.value.setting) == ("connections", "[limits] connections")


# -- what is said is what the schema has ----------------------------------------------------------------


@contextmanager
def recorded(path: str, front: Path) -> Iterator[Recorder]:
    """Stand between a program and its broker, and validate what passes."""
    recorder = Recorder()
    failures: list[BaseException] = []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(front))
    listener.listen()

    def pass_on(source: socket.socket, target: socket.socket, note: Callable[[int, bytes], None]) -> None:
        try:
            while True:
                packet = receive(source)
                if not packet.data:
                    break
                note(1, packet.data)
                send(target, packet.data, packet.fds)
                close_all(packet.fds)
        except BaseException as error:
            failures.append(error)
        finally:
            target.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        accepted, _ = listener.accept()
        upstream = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        upstream.connect(path)
        with accepted, upstream:
            back = threading.Thread(target=pass_on, args=(upstream, accepted, recorder.received))
            back.start()
            pass_on(accepted, upstream, recorder.sent)
            back.join()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield recorder
    finally:
        thread.join(60)
        listener.close()
    assert not thread.is_alive()
    assert not failures, f"messages that client/protocol.cddl does not allow: {failures}"


def test_what_the_library_says_is_valid(shared: RunningBroker, program: StartProgram, tmp_path: Path) -> None:
    with recorded(shared.socket, tmp_path / "front") as recorder:
        user = program()
        user.connect(f"{tmp_path}/front", "n" * 64)
        user.do("ping")
        user.do("list")
        grant = user.attach("faults", slots=2, wait=1500)
        user.do("acquire", grant, 2, 250)
        leases = [user.take(grant) for _ in range(2)]
        user.call(leases[0], "empty")
        with pytest.raises(Refused):
            user.call(leases[0], "illegal")
        user.do("give", leases[0])
        user.do("release", grant, 1)
        with pytest.raises(Refused):
            user.attach("nobody", wait=0)
        with teemate.connect(shared.socket) as admin:
            admin.revoke(enclave="faults", grace=10.0)
        user.do("event", 20000)
        user.do("give", leases[1])
        user.do("detach", grant)
        again = user.attach("faults")
        user.do("detach", again)
        user.do("disconnect")
    said = {"hello", "ping", "enclaves", "attach", "slots.acquire", "slots.release", "detach"}
    assert said <= set(recorder.seen)
    assert recorder.seen["event revoked"] == 1


# -- looked at ---------------------------------------------------------------------------------


def test_calls_are_counted_once_an_administrator_looks(shared: RunningBroker, program: StartProgram) -> None:
    user = program()
    user.connect(shared.socket, "counted")
    lease = user.take(user.attach("vault", slots=2))
    user.call(lease, "empty")

    def activity(admin: teemate.Broker) -> Activity:
        (found,) = [client for client in admin.clients(activity=True) if client.name == "counted"]
        assert found.activity is not None
        return found.activity

    with teemate.connect(shared.socket) as admin:
        assert activity(admin).calls is None, "nobody has looked before"
        while not activity(admin).calls:  # the listener has the page a moment later
            user.call(lease, "empty")
        before = activity(admin)
        assert before.calls is not None
        for _ in range(5):
            user.call(lease, "empty")
        later = user.take(user.attach("faults"))  # an enclave that comes after the page
        for _ in range(3):
            user.call(later, "empty")
        after = activity(admin)
        assert (after.calls, after.running) == (before.calls + 8, 0)
        assert after.inside is not None
        assert before.inside is not None
        assert after.inside > before.inside
