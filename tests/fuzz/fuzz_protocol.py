#!/usr/bin/env python3
"""Feed the broker messages that are nearly right, and see that nothing breaks, hangs or grows.

    tests/fuzz/fuzz_protocol.py --seed 1 --messages 5000000 --socket-seconds 60

Two ways.  *In process*: the broker's own service with a real vault and its warden, and messages go
straight to what takes them from the socket (wire.decode, parse_request, the handlers, the replies), at
a high rate.  *Over the socket*: a real broker, connections of two users, packets split and in any order,
descriptors at random, clients that do not read; a witness is served all along.

It fails when the broker logs an internal error, does not answer, ends, keeps a charge or a
descriptor, charges for a slot that nobody has (looked at all along), or grows.  The message that did it
is written to ``crash-message`` where that is known.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio

for folder in ("", "broker"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))

from charged_slots import charged_slots, owned_slots  # noqa: E402
from images import Images  # noqa: E402
from protocol_mutations import Mutator, record  # noqa: E402
from raw_client import RawClient  # noqa: E402
from running_broker import RunningBroker, run_broker  # noqa: E402

from teemate import errors, wire  # noqa: E402
from teemate.broker.connections.clients import Client  # noqa: E402
from teemate.broker.connections.connection import Connection  # noqa: E402
from teemate.broker.connections.identity import Identity, Peer  # noqa: E402
from teemate.broker.policy.rules import load_policy  # noqa: E402
from teemate.broker.service import Service  # noqa: E402
from teemate.broker.slots.grants import Grant, Waiter  # noqa: E402
from teemate.broker.wardens.protocol import REPLY_SIZE, WardenReply  # noqa: E402

SETTLING = 10.0
"""Seconds for descriptors that are on their way out when the last message was handled."""
HANG = 60
"""Seconds in which a batch, or an answer to the witness, has to be there."""
BATCH = 2000
GROWTH = 24 << 20
"""Bytes that a broker may have grown by from the end of its warm-up on."""
ATTACKER = 4242

POLICY = """
[administrators]
uids = [0]
[limits]
requests_per_second = 1000000000.0
burst = 1000000000
connections = 256
handshake_seconds = 1.0
[[enclave]]
name = "vault"
image = "{image}"
sigstruct = "{sigstruct}"
insecure_sim_sharing = true
wait = 0.02
revoke_grace = 0.01
[[enclave.attach]]
uid = "*"
[[create]]
uid = 0
pages = 100000
"""


class FuzzingError(Exception):
    """The broker did what it must not do."""


@dataclass
class Outcome:
    """What a campaign did; `replies` counts by error code, ok being one of them."""

    way: str
    seed: int
    messages: int
    seconds: float
    replies: dict[str, int]
    breaches: int
    witness_served: int
    rss_after_warm_up: int
    rss_at_end: int
    descriptors_before: int
    descriptors_after: int


def rss(pid: int | str = "self") -> int:
    """Bytes of memory that the process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def descriptors(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def require_flat(outcome: Outcome) -> None:
    """Memory and descriptors are what they were."""
    grown = outcome.rss_at_end - outcome.rss_after_warm_up
    if grown > GROWTH:
        raise FuzzingError(f"{outcome.way}: the broker grew by {grown >> 20} MiB after its warm-up")
    if outcome.descriptors_after > outcome.descriptors_before:
        raise FuzzingError(
            f"{outcome.way}: {outcome.descriptors_after} descriptors are open,"
            f" not {outcome.descriptors_before}"
        )


# ---- in process -----------------------------------------------------------------------


class Complaints:
    """The broker's log: an error in it is a finding."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def info(self, event: str, **about: object) -> None:
        pass

    warning = debug = info

    def bind(self, **_about: object) -> Complaints:
        return self

    def error(self, event: str, **about: Any) -> None:
        failure = about.get("exc_info")
        if isinstance(failure, BaseException):
            import traceback

            about["exc_info"] = "".join(traceback.format_exception(failure))
        self.errors.append(f"{event} {about}")

    exception = critical = error


class Target:
    """A client whose messages are handed to its connection; its process is one that sleeps."""

    def __init__(self, service: Service, around: trio.Nursery) -> None:
        self._service = service
        self._around = around
        self._over = trio.Event()
        self.breaches = 0
        self.replies: Counter[str] = Counter()

    @classmethod
    async def start(cls, service: Service, around: trio.Nursery) -> Target:
        target = cls(service, around)
        await target._start()
        return target

    async def _tasks(self, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        """Its requests that wait: they end with it, before the broker looks at what it leaves behind."""
        async with trio.open_nursery() as nursery:
            task_status.started(nursery)
            await trio.sleep_forever()
        self._over.set()

    async def _start(self) -> None:
        self._over = trio.Event()
        self._nursery = await self._around.start(self._tasks)
        self._open()

    def _open(self) -> None:
        self._process = subprocess.Popen(["sleep", "infinity"])
        identity = Identity(
            pid=self._process.pid, uid=0, gid=0, groups=frozenset({0}), label="", cgroup="/fuzz"
        )
        peer = Peer(identity=identity, pidfd=os.pidfd_open(self._process.pid))
        service = self._service
        self.client = Client(service, service.next_client(), peer, service.ledger.account(0))
        service.clients[self.client.number] = self.client
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._theirs.setblocking(False)
        self._connect()

    def _connect(self) -> None:
        self._connection = Connection(self.client, self._theirs)
        self._connection._nursery = self._nursery
        self._connection.greeted = True

    def feed(self, data: bytes, fds: tuple[int, ...]) -> None:
        """One message; `fds` are the target's."""
        try:
            self._connection._handle(wire.Packet(data, fds))
        except errors.ProtocolError:
            self.breaches += 1
            self._connection.outbox.closed = True
        if self._connection.closing:
            self._end()
            self._connect()

    def _end(self) -> None:
        """What serve() does at its end."""
        self._connection.outbox.discard()

    def drain(self) -> None:
        """Read the replies."""
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = wire.receive(self._ours)
                wire.close_all(packet.fds)
                message = wire.decode_trusted(packet.data)
                error = message.get("error")
                self.replies[error["code"] if isinstance(error, dict) else "ok"] += 1

    async def leave(self) -> None:
        """The connection and the process end; what they held comes back."""
        self.drain()
        self._end()
        self._nursery.cancel_scope.cancel()
        await self._over.wait()
        del self._service.clients[self.client.number]
        self._service.client_left(self.client, "fuzzed")
        self._process.kill()
        self._process.wait()
        self._ours.close()
        self._theirs.close()

    async def again(self) -> None:
        """Another process."""
        await self.leave()
        await self._start()


async def in_process(policy: Path, corpus: list[dict[str, Any]], images: Images, options: Any) -> Outcome:
    """Hand messages to the broker's own code."""
    log: Any = Complaints()
    service = Service(load_policy(policy, default_owner=0), log)
    mutator = Mutator(options.seed, corpus)
    mutator.image = os.open(images.vault.sgxs, os.O_RDONLY)
    warm = 0
    started = time.monotonic()
    done = 0
    async with trio.open_nursery() as running:
        await running.start(service.run)
        before = descriptors()
        async with trio.open_nursery() as nursery:
            target = await Target.start(service, nursery)
            while done < options.messages and (
                not options.seconds or time.monotonic() - started < options.seconds
            ):
                faulthandler.dump_traceback_later(HANG, exit=True, file=sys.__stderr__)
                mutator.grants = list(service.grants)[-8:] or [1]
                for index in range(BATCH):
                    data = mutator.data()
                    fds = tuple(map(os.dup, mutator.descriptors()))
                    target.feed(data, fds)
                    if log.errors:
                        _keep(data)
                        raise FuzzingError(f"message {done + index} of seed {options.seed}: {log.errors[0]}")
                    if index % 64 == 0:
                        target.drain()
                        await trio.lowlevel.checkpoint()
                target.drain()
                done += BATCH
                if charged_slots(service) != owned_slots(service):
                    raise FuzzingError(
                        f"until message {done} of seed {options.seed}: {charged_slots(service)} slots are"
                        f" charged, {owned_slots(service)} of them for somebody: {_held()}"
                    )
                if done % (10 * BATCH) == 0:
                    with contextlib.suppress(ValueError):  # of a step that there is not
                        WardenReply.parse(os.urandom(REPLY_SIZE))
                    await target.again()
                    await _rebuild(service, target, corpus, images)
                elapsed = time.monotonic() - started
                if not warm and (done >= options.messages // 4 or 0 < options.seconds / 4 < elapsed):
                    gc.collect()
                    warm = rss()
                    if options.verbose:
                        print(f"warm after {done}: {warm >> 20} MiB", file=sys.stderr)
            await target.leave()
        warm = warm or rss()
        while service.disposal.statistics().files or service.disposal.statistics().sockets:  # noqa: ASYNC110
            await trio.sleep(0.01)
        await _calm(service)
        used = {resource.value: count for resource, count in service.ledger.account(0).used.items() if count}
        used.pop("pages", None)  # enclaves that were created live on
        held = _held() if used else []
        gc.collect()
        end = rss()
        for enclave in [name for name in service.enclaves if name != "vault"]:
            last = await Target.start(service, running)
            last.feed(
                wire.encode({"id": 1, "op": "destroy", "args": {"enclave": enclave, "force": True}}), ()
            )
            while enclave in service.enclaves:  # noqa: ASYNC110
                await trio.sleep(0.01)
            await last.leave()
        await _calm(service)
        # A warden that is just being replaced has some for two; what leaked stays.
        with trio.move_on_after(SETTLING):
            while descriptors() > before:  # noqa: ASYNC110
                await trio.sleep(0.01)
        after = descriptors()
        faulthandler.cancel_dump_traceback_later()
        running.cancel_scope.cancel()
    os.close(mutator.image)
    mutator.close()
    if log.errors:  # first: it may be why something is left
        raise FuzzingError(log.errors[0])
    if used:
        raise FuzzingError(f"in process: {used} are still charged, for {held}")
    return Outcome(
        "in process", options.seed, done, time.monotonic() - started, dict(target.replies), target.breaches,
        0, warm, end, before, after,
    )  # fmt: skip


def _held() -> list[str]:
    """The grants that have slots, and who waits for some: what a charge that is left belongs to."""
    found = []
    for thing in gc.get_objects():
        if isinstance(thing, Grant) and thing.charges:
            enclave, client = thing.enclave, thing.client
            slots = {index: enclave.slots.slots[index].state.value for index in thing.charges}
            found.append(
                f"grant {thing.number} (over {thing.over}, revoked {thing.revoked}) of client {client.number}"
                f" (left {client.left}) on {enclave.name} generation {enclave.generation},"
                f" {enclave.state.value}: {slots}"
            )
        elif isinstance(thing, Waiter):
            found.append(f"a request that waits for {len(thing.charges)} slots: {thing.error!r}")
    return found


def _keep(data: bytes) -> None:
    Path("crash-message").write_bytes(data)


async def _calm(service: Service) -> None:
    """Wait until what the clients left is back."""
    while service.reclaimer.left_behind or any(  # noqa: ASYNC110 - no event tells of all of it
        enclave.slots.statistics().arming or enclave.slots.statistics().withheld
        for enclave in service.enclaves.values()
    ):
        await trio.sleep(0.01)


async def _rebuild(service: Service, target: Target, corpus: list[dict[str, Any]], images: Images) -> None:
    """Have a vault again when the messages took it down."""
    for _ in range(1000):
        vault = service.enclaves.get("vault")
        if vault is not None and vault.state.value == "ready":
            return
        target.feed(wire.encode({"id": 1, "op": "undrain", "args": {"all": True}}), ())
        if vault is not None or "vault" in service.administration.building:
            target.feed(
                wire.encode({"id": 2, "op": "destroy", "args": {"enclave": "vault", "force": True}}), ()
            )
        else:
            sigstruct = next(message["args"]["sigstruct"] for message in corpus if message["op"] == "create")
            fd = os.open(images.vault.sgxs, os.O_RDONLY)
            target.feed(
                wire.encode({"id": 3, "op": "create", "args": {"name": "vault", "sigstruct": sigstruct}}),
                (fd,),
            )
        target.drain()
        await trio.sleep(0.05)
    state = vault.info() if vault is not None else "there is none"
    raise FuzzingError(f"no vault can be had any more: {state}, {dict(target.replies)}")


# ---- over the socket --------------------------------------------------------------------


class Witness(threading.Thread):
    """A client that has to be served all along."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self._client = RawClient(path, name="witness")
        self._client.sock.settimeout(HANG)
        self.over = threading.Event()
        self.served = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.over.is_set():
                self._client.ok("ping")
                reply = self._client.call("attach", enclave="vault", slots=1, wait=0)
                wire.close_all(self._client.fds)
                self._client.fds = []
                if "ok" in reply:
                    self._client.call("detach", grant=reply["ok"]["grant"], clean=True)
                self.served += 1
        except BaseException as failure:
            self.failure = failure
        finally:
            self._client.close()


class Attacker:
    """One connection, again and again."""

    def __init__(self, path: str, uid: int, mutator: Mutator) -> None:
        self._path = path
        self._uid = uid
        self._mutator = mutator
        self._sock: socket.socket | None = None
        self.sent = 0
        self.ended = 0
        self.replies: Counter[str] = Counter()

    def turn(self, count: int) -> None:
        """Send so many messages, read what is there."""
        mutator = self._mutator
        try:
            if self._sock is None:
                self._sock = self._connect()
            for _ in range(count):
                data, fds = mutator.data(), mutator.descriptors()
                if mutator.chance(0.02):
                    half = len(data) // 2
                    wire.send(self._sock, data[:half])
                    data = data[half:]
                wire.send(self._sock, data, fds)
                self.sent += 1
            if mutator.chance(0.9):
                self._read()
        except BlockingIOError:
            if mutator.chance(0.5):
                self._read_or_end()
        except OSError:
            self._end()

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        os.seteuid(self._uid)
        try:
            sock.connect(self._path)
        finally:
            os.seteuid(0)
        sock.setblocking(False)
        if self._mutator.chance(0.95):
            wire.send(sock, wire.encode({"id": 1, "op": "hello", "args": {"version": 1}}))
        return sock

    def _read(self) -> None:
        assert self._sock is not None
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = wire.receive(self._sock)
                wire.close_all(packet.fds)
                if not packet.data:
                    self._end()
                    return
                message = wire.decode_trusted(packet.data)
                error = message.get("error")
                ok = message.get("ok")
                self.replies[error["code"] if isinstance(error, dict) else "ok"] += 1
                if isinstance(ok, dict) and isinstance(ok.get("grant"), int):
                    self._mutator.grants = [*self._mutator.grants[-7:], ok["grant"]]

    def _read_or_end(self) -> None:
        try:
            self._read()
        except OSError:
            self._end()

    def _end(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            self.ended += 1

    def close(self) -> None:
        self._end()


def over_the_socket(running: RunningBroker, corpus: list[dict[str, Any]], options: Any) -> Outcome:
    """Attack a real broker from several connections of two users."""
    mutator = Mutator(options.seed + 1, corpus)
    admin = RawClient(running.socket, name="fuzzer")
    witness = Witness(running.socket)
    before = descriptors(running.pid)
    attackers = [Attacker(running.socket, uid, mutator) for uid in (0, ATTACKER, ATTACKER, ATTACKER + 1)]
    started = time.monotonic()
    warm = 0
    witness.start()
    try:
        while (elapsed := time.monotonic() - started) < options.socket_seconds and witness.failure is None:
            for attacker in attackers:
                attacker.turn(3)
            if not warm and elapsed > options.socket_seconds / 4:
                warm = rss(running.pid)
        warm = warm or rss(running.pid)
    finally:
        for attacker in attackers:
            attacker.close()
        witness.over.set()
        witness.join(2 * HANG)
    if witness.failure is not None:
        raise FuzzingError(f"the witness was not served: {witness.failure!r}")
    if witness.is_alive():
        raise FuzzingError("the witness was not served")
    deadline = time.monotonic() + HANG
    while True:
        stats = admin.ok("stats")["stats"]
        # Slots may be withheld, since the process that had them lives.
        left = [
            user for user in stats["users"]
            if user["uid"] != 0 and any(count for key, count in user["used"].items() if key != "slots")
        ]  # fmt: skip
        if (
            stats["clients"] == 1
            and not left
            and not any(stats["disposal"][key] for key in ("sockets", "files"))
        ):
            break
        if time.monotonic() > deadline:
            raise FuzzingError(
                f"something is still held: {stats['clients']} clients, {left}, {stats['disposal']}"
            )
    # Enclaves that were created have descriptors of their own, and left slots are watched by pidfd.
    extra = 3 * max(0, len(stats["enclaves"]) - 1) + stats["processes"]["watched"]
    outcome = Outcome(
        "over the socket", options.seed + 1, sum(attacker.sent for attacker in attackers),
        time.monotonic() - started, dict(sum((attacker.replies for attacker in attackers), Counter())),
        sum(attacker.ended for attacker in attackers), witness.served, warm, rss(running.pid),
        before, descriptors(running.pid) - extra,
    )  # fmt: skip
    admin.close()
    mutator.close()
    return outcome


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--messages", type=int, default=200_000, help="in process")
    parser.add_argument("--seconds", type=float, default=0.0, help="in process, at most; 0: no bound")
    parser.add_argument("--socket-seconds", type=float, default=20.0, help="over the socket; 0: not at all")
    parser.add_argument("--json", action="store_true", help="print the outcomes for programs")
    parser.add_argument("--verbose", action="store_true")
    return parser


def main(words: list[str] | None = None) -> list[Outcome]:
    """Run both campaigns; raises FuzzingError at the first finding."""
    options = arguments().parse_args(words)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        images = Images(Path(folder))
        policy = POLICY.format(image=images.vault.sgxs, sigstruct=images.vault.sigstruct)
        file = Path(folder) / "policy.toml"
        file.write_text(policy)
        with run_broker(policy) as running:
            corpus = record(running.socket, str(images.vault.sgxs), images.vault.sigstruct.read_bytes())
            if options.socket_seconds:
                outcomes.append(over_the_socket(running, corpus, options))
        if options.messages:
            try:
                outcomes.append(trio.run(in_process, file, corpus, images, options))
            except BaseExceptionGroup as group:  # whatever it is, the broker would not have survived it
                failure: BaseException = group
                while isinstance(failure, BaseExceptionGroup):
                    failure = failure.exceptions[0]
                raise FuzzingError(f"in process: {failure!r}") from group
    for outcome in outcomes:
        if options.json:
            print(json.dumps(asdict(outcome)))
        else:
            print(
                f"{outcome.way}: {outcome.messages} messages in {outcome.seconds:.0f} s, seed {outcome.seed},"
                f" {outcome.breaches} connections ended, replies {outcome.replies},"
                f" witness served {outcome.witness_served} times,"
                f" RSS {outcome.rss_after_warm_up >> 20} -> {outcome.rss_at_end >> 20} MiB,"
                f" descriptors {outcome.descriptors_before} -> {outcome.descriptors_after}"
            )
        require_flat(outcome)
    return outcomes


if __name__ == "__main__":
    try:
        main()
    except FuzzingError as finding:
        sys.exit(f"FOUND: {finding}")
