"""The broker's real parts around a modelled enclave and modelled processes, one step at a time.

Server, connections, service, slot table, reclaimer and revocation are the real ones, and run in trio's
loop in a thread of its own.  A step runs in that loop until nothing is left to do; the clock moves only
when the model says so.  What the kernel would tell of a process (SO_PEERCRED, its pidfd) and what a
warden would do is modelled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from unittest import mock

import structlog
import trio
import trio.testing
from modelled_enclave import ModelledEnclave, ModelledWarden
from modelled_process import Held, ModelledProcess

from teemate import wire
from teemate.broker._door import ffi, lib
from teemate.broker.connections.attendant import Attendant
from teemate.broker.connections.door import Caller, Door
from teemate.broker.connections.identity import Identity, Peer, groups_in, label_in
from teemate.broker.enclaves.enclave import Enclave, EnclaveState
from teemate.broker.policy.limits import Charge
from teemate.broker.policy.rules import Administrators, BrokerSettings, EnclavePolicy, Policy, Rule
from teemate.broker.server import Server
from teemate.broker.service import Service
from teemate.errors import ConnectionLost

__all__ = ["ENCLAVE", "World"]

ENCLAVE = "modelled"
ADMINISTRATOR = 0
T = TypeVar("T")


def _policy() -> Policy:
    return Policy(
        source="the model's",
        broker=BrokerSettings(backend="sim"),
        administrators=Administrators(uids=frozenset({ADMINISTRATOR})),
    )


def _enclave_policy(*, kill: bool) -> EnclavePolicy:
    return EnclavePolicy(
        name=ENCLAVE,
        owner=1000,
        attach=(Rule(any_uid=True),),
        share_sim=True,
        slots_per_client=4,
        wait=20.0,
        revoke_grace=2.0,
        revoke_kill=kill,
    )


def _close_at_once(sockets: list[int], charge: Charge | None) -> None:
    """What the broker has another process do, whose time no step waits for; ours linger for nothing."""
    wire.close_all(sockets)
    if charge is not None:
        charge.release()


class World:
    """One broker, its enclave, and every process that there is or was."""

    process_type: type[ModelledProcess] = ModelledProcess

    def __init__(self, slots: int, *, kill: bool) -> None:
        """`kill`: the policy's revoke_kill."""
        self.enclave = ModelledEnclave(slots)
        self._kill = kill
        self.warden = ModelledWarden(self.enclave)
        self.processes: dict[int, ModelledProcess] = {}
        self.records: list[dict[str, Any]] = []
        self.revoking: dict[int, set[Held]] = {}
        """What revocations that were asked for take back, by the tag of the request."""
        self.given = self.greeted = 0
        """Most attaches that one broker answered without Python, and most clients that it greeted so."""
        self._tell_peer = ffi.callback("int(int, struct attendant_peer *)", self._identify_caller)
        self.clock = trio.testing.MockClock()
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._address = f"\0teemate model {os.getpid()} {id(self)}"
        self._cleanup = contextlib.ExitStack()
        self._model_the_host(self._cleanup.enter_context)
        # Else trio runs tasks in another order each time, and hypothesis cannot find a failure again.
        run_module = trio._core._run
        self._cleanup.enter_context(mock.patch.object(run_module, "_ALLOW_DETERMINISTIC_SCHEDULING", True))
        run_module._r.seed(0)
        # A turn is so much of the processor's time, which is never the same.
        self._cleanup.enter_context(mock.patch("teemate.broker.connections.turns.SHARE", 3600.0))
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure
        self.administrator = self.start_process(ADMINISTRATOR)

    def _model_the_host(self, enter: Callable[[Any], object]) -> None:
        """Put what is modelled in the place of what the kernel would do, until :meth:`close`."""
        enter(mock.patch("teemate.broker.server.identify", self._identify))
        enter(mock.patch("teemate.broker.connections.guests.peer_bytes", self._peer_bytes))
        enter(mock.patch("teemate.broker.connections.guests.cgroup_of", return_value="/"))
        enter(mock.patch.object(Attendant, "threaded", False))
        take = Door.take

        def take_modelled(door: Door, now: float) -> Caller | None:
            caller = take(door, now)
            return None if caller is None else Caller(caller.sock, self.process_at(caller.sock).uid)

        enter(mock.patch.object(Door, "take", take_modelled))
        enter(mock.patch.object(signal, "pidfd_send_signal", self._send_signal))

    def _model_the_attendants_host(self) -> None:
        lib.attendant_model(self.service.attendant.native, self._tell_peer)

    # -- the loop ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            trio.run(self._main, clock=self.clock)
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()

    async def _main(self) -> None:
        log = structlog.wrap_logger(None, processors=[self._record])
        self.service = Service(_policy(), log)
        self.service.disposal._drop_sockets = _close_at_once  # type: ignore[method-assign]
        self._token = trio.lowlevel.current_trio_token()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as listener:
            listener.bind(self._address)
            listener.listen(64)
            async with trio.open_nursery() as keeping:
                await keeping.start(self.service.run)
                self._model_the_attendants_host()
                await self._add_enclave()
                async with trio.open_nursery() as serving:
                    self._stop = serving.cancel_scope
                    serving.start_soon(Server(self.service).run, [listener])
                    await trio.testing.wait_all_tasks_blocked()
                    self._started.set()
                keeping.cancel_scope.cancel()

    async def _add_enclave(self) -> None:
        """What Administration does after building; nothing here is built."""
        self.broker_enclave = Enclave(_enclave_policy(kill=self._kill), "sim", self.enclave.built(), None)
        self.broker_enclave.warden = self.warden  # type: ignore[assignment]
        for index in self.broker_enclave.slots.slots:
            await self.service.reclaimer.arm(self.broker_enclave, index)
        self.broker_enclave.state = EnclaveState.READY
        self.service.enclaves[ENCLAVE] = self.broker_enclave

    def step(self, function: Callable[[], T]) -> T:
        """Do something between two turns of the broker, then let it work until it waits."""

        async def run() -> T:
            result = function()
            await trio.testing.wait_all_tasks_blocked()
            while self.service.attendant.step():  # its thread, in a step of its own
                await trio.testing.wait_all_tasks_blocked()
            statistics = self.service.attendant.statistics()
            self.given = max(self.given, statistics.given)
            self.greeted = max(self.greeted, statistics.greeted)
            return result

        try:
            return trio.from_thread.run(run, trio_token=self._token)
        except trio.RunFinishedError:
            assert self._failure is not None
            raise self._failure from None

    def shuffle(self, seed: int) -> None:
        """Have the broker's tasks take turns in another order from here on."""
        self.step(lambda: trio._core._run._r.seed(seed))

    def pass_time(self, seconds: float) -> None:
        """Move the clock, in steps that no deadline is jumped over by more than."""
        left = seconds
        while left > 0:
            part = min(left, 0.5)
            left -= part
            self.step(lambda part=part: self.clock.jump(part))  # type: ignore[misc]

    def close(self) -> None:
        """End the broker and free everything."""
        try:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._stop.cancel)
            self._thread.join()
        finally:
            self._cleanup.close()
            for process in self.processes.values():
                process.close()
        if self._failure is not None:
            raise self._failure

    # -- what the kernel would do ----------------------------------------------------------

    def new_process(self, uid: int) -> ModelledProcess:
        """A process that has not connected yet."""
        process = self.process_type(len(self.processes), uid, self.enclave)
        self.processes[process.number] = process
        return process

    def start_process(self, uid: int) -> ModelledProcess:
        """Start a process that connects."""
        process = self.new_process(uid)
        self.step(lambda: process.connect(self._address))
        return process

    def come(self, process: ModelledProcess) -> None:
        """Let it connect and say at once what it wants, as our clients do."""
        process.connect(self._address)
        process.post("attach", enclave=ENCLAVE, slots=1)

    def reconnect(self, process: ModelledProcess) -> None:
        """Another connection of a process that closed its last."""
        self.step(lambda: process.connect(self._address))

    def process_at(self, sock: socket.socket) -> ModelledProcess:
        """Whose connection it is."""
        name = sock.getpeername()
        return self.processes[int((name.decode() if isinstance(name, bytes) else name).rpartition("-")[2])]

    @staticmethod
    def pid(process: ModelledProcess) -> int:
        """As the broker knows the process."""
        return 10_000 + process.number

    def _identify(self, sock: socket.socket, _tree: object, *, trust_pid: bool = False) -> Peer:
        process = self.process_at(sock)
        if process.ended:
            raise ConnectionLost("the process ended before it was identified")
        identity = Identity(
            pid=self.pid(process),
            uid=process.uid,
            gid=process.uid,
            groups=groups_in(process.groups),
            label=label_in(process.label),
            cgroup="/",
        )
        return Peer(identity=identity, pidfd=os.dup(process.pidfd))

    def _identify_caller(self, fd: int, peer: Any) -> int:
        """The same for the attendant, which has not asked Python."""
        with socket.socket(fileno=os.dup(fd)) as sock:
            process = self.process_at(sock)
        if process.ended:
            return -1
        peer.pid, peer.uid, peer.gid = self.pid(process), process.uid, process.uid
        peer.pidfd, peer.started = os.dup(process.pidfd), process.number
        peer.groups_size = len(process.groups)
        ffi.memmove(peer.groups, process.groups, len(process.groups))
        peer.label_size = len(process.label)
        ffi.memmove(peer.label, process.label, len(process.label))
        return 0

    def _peer_bytes(self, sock: socket.socket) -> tuple[bytes, bytes]:
        process = self.process_at(sock)
        return process.groups, process.label

    def _send_signal(self, pidfd: int, number: int, *_: object) -> None:
        assert number == signal.SIGKILL
        inode = os.fstat(pidfd).st_ino
        for process in self.living():
            if os.fstat(process.pidfd).st_ino == inode:
                process.end()
                return
        raise ProcessLookupError

    def living(self) -> Iterator[ModelledProcess]:
        """Processes that have not ended."""
        return (process for process in self.processes.values() if not process.ended)

    # -- what is said ------------------------------------------------------------------------

    def _record(self, _logger: object, method: str, event: dict[str, Any]) -> Any:
        self.records.append({"level": method, **event})
        raise structlog.DropEvent

    def errors(self) -> list[dict[str, Any]]:
        """What the broker itself calls a bug."""
        return [record for record in self.records if record["level"] in ("error", "exception", "critical")]
