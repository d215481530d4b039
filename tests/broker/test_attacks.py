"""Clients that want to harm the broker: others are served all along, and what it holds stays bounded."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from hostile import Lingering, hanging_file, send_with
from images import Images
from processes import wait_for_stop
from raw_client import TIMEOUT, RawClient
from running_broker import RunningBroker

from teemate import wire

Broker = Callable[..., RunningBroker]
Policy = Callable[..., str]
Connect = Callable[..., RawClient]

ATTACKER = 4242
SHARING = 'insecure_sim_sharing = true\nshare_between_owners = "unfenced"'
PING = wire.encode({"id": 1, "op": "ping"})


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Sockets that connect in the block are the user's, as the kernel tells the broker."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def stats(admin: RawClient) -> dict[str, Any]:
    found: dict[str, Any] = admin.ok("stats")["stats"]
    return found


def used(admin: RawClient, uid: int = ATTACKER) -> dict[str, int]:
    """What the user holds; empty when the broker has nothing of it any more."""
    return next((user["used"] for user in stats(admin)["users"] if user["uid"] == uid), {})


def wait_until(admin: RawClient, condition: Callable[[dict[str, Any]], bool]) -> None:
    """Ask the broker until it is so; the asking is answered by a broker that does not hang."""
    deadline = time.monotonic() + TIMEOUT
    while not condition(now := stats(admin)):
        assert time.monotonic() < deadline, now


@contextmanager
def stopped(running: RunningBroker) -> Iterator[None]:
    """What is sent in the block is all there when the broker looks."""
    os.kill(running.pid, signal.SIGSTOP)
    wait_for_stop(running.pid)
    try:
        yield
    finally:
        os.kill(running.pid, signal.SIGCONT)


def descriptors(running: RunningBroker) -> int:
    return len(os.listdir(f"/proc/{running.pid}/fd"))


@pytest.fixture
def shared(broker: Broker, vault_policy: Policy) -> Callable[[str], RunningBroker]:
    """Start a broker whose vault is for everybody, with lines of [limits]."""
    return lambda limits="", **options: broker(
        vault_policy(SHARING, f"[limits]\n{limits}", attach='uid = "*"'), **options
    )


# ---- descriptors that are not harmless to close -------------------------------------


def in_the_message(client: RawClient, fds: list[int]) -> None:
    send_with(client.sock, PING, fds)


def left_unread(client: RawClient, fds: list[int]) -> None:
    """Behind a message that ends the connection, so that nobody receives it."""
    client.sock.send(b"no message")
    send_with(client.sock, PING, fds)


def behind_empty_packets(client: RawClient, fds: list[int]) -> None:
    """An empty packet looks like the end of the connection."""
    for _ in range(3):
        client.sock.send(b"")
    send_with(client.sock, PING, fds)


def in_the_queue_of_another_socket(client: RawClient, fds: list[int]) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        for fd in fds:
            send_with(one, b"x", [fd])
        send_with(client.sock, PING, [other.fileno()])


@pytest.mark.parametrize(
    "way", [in_the_message, left_unread, behind_empty_packets, in_the_queue_of_another_socket]
)
@pytest.mark.parametrize("count", [1, 20])
def test_sockets_that_linger_for_an_hour_stop_nobody(
    shared: Callable[..., RunningBroker],
    connect: Connect,
    way: Callable[[RawClient, list[int]], None],
    count: int,
) -> None:
    running = shared()
    admin = connect(running)
    before = descriptors(running)
    with ExitStack() as cleanup:
        bombs = [Lingering() for _ in range(count)]
        for bomb in bombs:
            cleanup.callback(bomb.close)
        with acting_as(ATTACKER):
            client = connect(running)
        with stopped(running):
            way(client, [bomb.fileno() for bomb in bombs])
            for bomb in bombs:
                bomb.abandon()
            client.close()
        wait_until(admin, lambda now: now["clients"] == 1 and now["disposal"]["sockets"] == 0)
        assert not any(used(admin).values())
        assert descriptors(running) <= before
        connect(running).ok("attach", enclave="vault")


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """Open a file whose file system answers no more."""
    with ExitStack() as mounted:

        def open_one() -> int:
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
            try:
                return mounted.enter_context(hanging_file(str(folder)))
            except OSError as error:
                pytest.skip(f"FUSE cannot be had: {error}")

        yield open_one


def test_files_whose_file_system_hangs_stop_nobody_and_their_senders_at_a_limit(
    shared: Callable[..., RunningBroker], connect: Connect, hanging: Callable[[], int]
) -> None:
    running = shared("descriptors_received = 6")
    admin = connect(running)
    before = descriptors(running)
    file = hanging()
    for _ in range(3):
        with acting_as(ATTACKER):
            client = connect(running)
        send_with(client.sock, PING, [file] * 2)
        client.breaks_protocol()
    with acting_as(ATTACKER):
        refused = connect(running, hello=False).receive()
    assert refused is not None
    assert refused["error"]["detail"]["setting"] == "[limits] descriptors_received"
    assert used(admin)["descriptors_received"] == 6
    wait_until(admin, lambda _: descriptors(running) <= before + 6)
    connect(running).ok("attach", enclave="vault")
    with acting_as(ATTACKER + 1):
        connect(running).ok("attach", enclave="vault")


def test_images_whose_file_system_hangs_hold_up_their_sender_alone(
    broker: Broker, vault_policy: Policy, images: Images, connect: Connect, hanging: Callable[[], int]
) -> None:
    running = broker(vault_policy(SHARING, '[[create]]\nuid = "*"', attach='uid = "*"'))
    admin = connect(running)
    before = descriptors(running)
    file, sigstruct = hanging(), images.vault.sigstruct.read_bytes()
    with acting_as(ATTACKER):
        client, stuck = connect(running), connect(running)
    for number in range(3):
        stuck.post("create", (file,), name=f"stuck-{number}", sigstruct=sigstruct)
    client.ok("attach", enclave="vault")
    assert {info["name"] for info in admin.ok("enclaves")["enclaves"]} == {"vault"}
    stuck.close()
    wait_until(admin, lambda now: now["clients"] == 2)
    assert descriptors(running) <= before + 3 + 8, "what hangs is still open"
    connect(running).ok("attach", enclave="vault")


def test_images_whose_file_system_hangs_keep_nobody_from_starting_a_warden(
    broker: Broker, vault_policy: Policy, images: Images, connect: Connect, hanging: Callable[[], int]
) -> None:
    """Whoever starts a process closes copies of all its descriptors: the broker does not start any."""
    running = broker(vault_policy(SHARING, '[[create]]\nuid = "*"', attach='uid = "*"'))
    admin = connect(running)
    file, sigstruct = hanging(), images.vault.sigstruct.read_bytes()
    with acting_as(ATTACKER):
        stuck = connect(running)
    for number in range(3):
        stuck.post("create", (file,), name=f"stuck-{number}", sigstruct=sigstruct)
    with images.vault.sgxs.open("rb") as image:
        admin.ok("create", (image.fileno(),), name="another", sigstruct=sigstruct)
    bomb = Lingering()
    try:
        client = connect(running)
        in_the_message(client, [bomb.fileno()])
        bomb.abandon()
        client.close()
        wait_until(admin, lambda now: now["clients"] == 2 and now["disposal"]["sockets"] == 0)
    finally:
        bomb.close()
    admin.ok("attach", enclave="another")


def test_an_image_is_copied_only_as_far_as_it_may_be_built(
    broker: Broker, vault_policy: Policy, connect: Connect, tmp_path: Path
) -> None:
    running = broker(vault_policy("", '[[create]]\nuid = "*"\npages = 1'))
    admin = connect(running)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 30)
    with large.open("rb") as file:
        error = admin.fails("create", "limit-reached", (file.fileno(),), name="large", sigstruct=bytes(1808))
    assert error["detail"] == {"limit": "pages", "maximum": 1, "setting": "[[create]] pages"}


# ---- connections that say nothing ---------------------------------------------------


def test_connections_that_do_not_say_hello_are_few_and_end(
    shared: Callable[..., RunningBroker], connect: Connect
) -> None:
    running = shared("handshakes = 4\nhandshake_seconds = 2")
    admin = connect(running)
    with acting_as(ATTACKER), stopped(running):  # all of them come within the time that the first ones have
        silent = [connect(running, hello=False) for _ in range(9)]
    told = [client.receive() for client in silent]
    settings = [message["error"]["detail"]["setting"] for message in told if message is not None]
    assert sorted(settings) == ["[limits] handshake_seconds"] * 4 + ["[limits] handshakes"] * 5
    assert all(client.receive() is None for client in silent), "and then it is over"
    wait_until(admin, lambda now: now["clients"] == 1)
    with acting_as(ATTACKER):
        slow = connect(running, hello=False)
        slow.sock.setblocking(True)
        slow.ok("hello", version=1)
        slow.ok("ping")
    assert used(admin)["handshakes"] == 0, "who has said hello may be silent"


# ---- descriptors on their way -------------------------------------------------------


def test_replies_with_descriptors_that_nobody_reads_are_bounded(
    shared: Callable[..., RunningBroker], connect: Connect
) -> None:
    running = shared("descriptors_sent = 8")
    admin = connect(running)
    with acting_as(ATTACKER):
        client, second = connect(running), connect(running)
    numbers = [client.post("attach", enclave="vault", slots=0) for _ in range(7)]
    wait_until(admin, lambda now: sum(user["refused"] for user in now["users"]) == 3)
    refusal = second.fails("attach", "limit-reached", enclave="vault", slots=0)
    assert refusal["detail"]["setting"] == "[limits] descriptors_sent"
    replies = [client.reply(number) for number in numbers]
    assert ["ok" in reply for reply in replies] == [True] * 4 + [False] * 3
    second.ok("attach", enclave="vault", slots=0)  # the first has read: it counts no more
    assert used(admin)["grants"] == 5, "what could not be sent was not kept"


def test_too_many_descriptors_in_flight_is_an_error_of_the_attach_alone(
    shared: Callable[..., RunningBroker], connect: Connect
) -> None:
    """Without the capabilities that lift it, the kernel bounds what a user has in flight (ETOOMANYREFS)."""
    running = shared(
        launcher=("setpriv", "--bounding-set=-sys_resource,-sys_admin", "prlimit", "--nofile=128"),
    )
    admin, victim = connect(running), connect(running)
    with acting_as(ATTACKER):
        attackers = [connect(running) for _ in range(2)]
    for client in attackers:
        for _ in range(40):
            client.post("attach", enclave="vault", slots=0)
    # Until there are enough of them on their way the victim is served.
    while "ok" in (reply := victim.call("attach", enclave="vault", slots=0)):
        victim.ok("detach", grant=reply["ok"]["grant"], clean=True)
    before = stats(admin)
    for _ in range(3):
        error = victim.fails("attach", "limit-reached", enclave="vault", slots=2)
        assert error["detail"]["limit"] == "RLIMIT_NOFILE"
    after = stats(admin)
    free = [stats["enclaves"][0]["slots"]["free"] for stats in (before, after)]
    assert free[0] == free[1] > 0, "the slots are free again"
    for client in attackers:
        client.close()
    wait_until(admin, lambda now: now["clients"] == 2)
    victim.ok("attach", enclave="vault", slots=2)


# ---- no descriptors left ------------------------------------------------------------


@contextmanager
def numbers_left(running: RunningBroker, count: int) -> Iterator[None]:
    """Let the broker have `count` more descriptors for a while."""
    taken = {int(name) for name in os.listdir(f"/proc/{running.pid}/fd")}
    free = (number for number in range(1 << 20) if number not in taken)
    limit = next(number for index, number in enumerate(free) if index == count)
    before = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(running.pid, resource.RLIMIT_NOFILE, before)


def test_a_broker_without_descriptors_serves_whom_it_has_and_accepts_again_later(
    shared: Callable[..., RunningBroker], connect: Connect
) -> None:
    running = shared()
    admin, client = connect(running), connect(running)
    with numbers_left(running, 0):
        waiting = connect(running, hello=False)
        waiting.post("hello", version=1)
        client.ok("attach", enclave="vault", slots=2)
        admin.ok("ping")
    assert waiting.receive() == {"id": 1, "ok": ANY}


def test_a_client_that_cannot_be_identified_for_want_of_descriptors_is_told_so(
    shared: Callable[..., RunningBroker], connect: Connect
) -> None:
    running = shared()
    admin = connect(running)
    for left in (1, 2):
        with numbers_left(running, left):
            refused = connect(running, hello=False).receive()
            assert refused is not None
            assert refused["error"]["detail"]["limit"] == "RLIMIT_NOFILE"
        admin.ok("ping")
    connect(running).ok("ping")


def test_a_message_whose_descriptor_cannot_be_received_is_not_taken_for_a_breach(
    shared: Callable[..., RunningBroker], connect: Connect
) -> None:
    running = shared()
    admin, client = connect(running), connect(running)
    with numbers_left(running, 0), open("/dev/null", "rb") as null:
        client.post("create", (null.fileno(),), name="x", sigstruct=bytes(1808))
        told = client.receive()
        assert told is not None
        assert told["error"]["code"] == "limit-reached"
        assert told["error"]["detail"]["limit"] == "RLIMIT_NOFILE"
        admin.ok("ping")


def test_an_administrator_gets_in_when_the_descriptors_are_nearly_used_up(
    shared: Callable[..., RunningBroker], connect: Connect
) -> None:
    running = shared("connections = 1000", launcher=("prlimit", "--nofile=128"))
    with ExitStack() as crowd:
        refused: dict[str, Any] | None = None
        while refused is None:
            with acting_as(ATTACKER):
                client = RawClient(running.socket, hello=False)
            crowd.callback(client.close)
            with suppress(BrokenPipeError):  # refused before it could speak
                client.post("hello", version=1)
            told = client.receive()
            assert told is not None
            refused = told.get("error")
        assert refused["detail"]["limit"] == "RLIMIT_NOFILE"
        admin = connect(running)
        most = max(admin.ok("clients")["clients"], key=lambda info: int(info["client"]))
        assert most["uid"] == 0


# ---- one user's requests ------------------------------------------------------------


def test_a_request_is_answered_before_a_thousand_that_came_earlier(
    shared: Callable[..., RunningBroker], connect: Connect
) -> None:
    """However many connections they came over: users have equal shares, connections have not."""
    running = shared()
    victim = connect(running)
    with acting_as(ATTACKER):
        attackers = [connect(running) for _ in range(50)]
    with stopped(running):
        for attacker in attackers:
            for _ in range(20):
                attacker.post("ping")
        number = victim.post("clients")
    clients = victim.reply(number)["ok"]["clients"]
    answered = sum(client["requests"] - 1 for client in clients if client["uid"] == ATTACKER)
    assert answered < 500, "the victim's is one of the first"
