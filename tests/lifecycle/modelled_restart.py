"""A world whose broker is killed and started again, and clients that come back as the library does.

What is kept is real: the snapshot's memfd, and descriptors as the service manager keeps them.  A kill is at
any point where something of the broker can be seen outside: a record that is written, a request that a
warden has done, a message that is sent.  What a broker does after that point leaves no trace; then it
is taken down, and the next one reads what was kept.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import structlog
import trio
import trio.testing
from modelled_enclave import ModelledWarden
from modelled_process import ModelledProcess, Reply
from modelled_world import ENCLAVE, World, _close_at_once, _enclave_policy, _policy

from teemate import wire
from teemate.broker._door import ffi, lib
from teemate.broker.connections.outbox import Outbox
from teemate.broker.enclaves.administration import Administration
from teemate.broker.enclaves.enclave import Enclave, EnclaveState
from teemate.broker.enclaves.source import ImageSource
from teemate.broker.policy.limits import Charge
from teemate.broker.restart.restoration import read_found
from teemate.broker.restart.service_manager import Inherited
from teemate.broker.restart.snapshot import Snapshot
from teemate.broker.server import Server
from teemate.broker.service import Service

__all__ = ["GRACE", "MortalWorld", "ResumingProcess"]

GRACE = 30.0
"""[broker] resume_grace, as it is unless told."""
_MANY = 1 << 30


def _forget(_charge: Charge) -> None:
    """A broker that is killed gives nothing back."""


@dataclass(eq=False, repr=False)
class ResumingProcess(ModelledProcess):
    """Keeps its token and its unanswered requests over deaths of the broker (client/_resume.py)."""

    shown: bytes | None = None
    """What it says to be known by: its session at first, then the newest token that it has read."""
    back: bool = False
    """Whether it has resumed this session: what it had shown before is good for nothing after a request."""
    known: list[bytes] = field(default_factory=list)
    """What it was known by in this session and may be still, the newest last."""
    again: dict[int, Reply] = field(default_factory=dict)
    stale: list[bytes] = field(default_factory=list)
    """What it was known by, and must not be any more."""

    def greet(self) -> None:
        shown = self.shown
        if shown is None:
            self.shown = self.number.to_bytes(4) + os.urandom(28)
            self.known.append(self.shown)
            self.say(0, "hello", {"version": 1, "session": self.shown})
        else:
            self.say(0, "hello", {"version": 1, "resume": shown})
        self.waiting.pop(0, None)  # one that no broker answered
        self.waiting = {0: Reply("hello", {"resume": shown}), **self.waiting}

    def hear(self) -> list[Reply]:
        heard = super().hear()
        for reply in heard:
            if reply.op != "hello":
                if self.back:
                    self.stale += self.known[:-1]
                    del self.known[:-1]
            elif reply.ok is not None:
                self._greeted(reply.ok, resumes=reply.args["resume"] is not None)
        return heard

    def _greeted(self, ok: dict[str, Any], *, resumes: bool) -> None:
        self.shown = ok["token"]
        assert self.shown is not None
        self.known.append(self.shown)
        self.back = resumes
        if resumes and "resumed" not in ok:
            # Another session: what was asked of the last one is not asked of this.
            self.stale += self.known[:-1]
            del self.known[:-1]
            self.waiting.clear()
            self.revocations.clear()
        self.again = dict(self.waiting) if resumes else {}

    def ask_again(self) -> None:
        """Send the requests that were not answered, as soon as it is known again."""
        again, self.again = self.again, {}
        for number, request in again.items():
            if self.sock is not None:
                self.say(number, request.op, request.args)

    def forget(self) -> None:
        """Give the session up: who closes the connection while the broker lives has nothing to resume."""
        self.stale += self.known
        self.known.clear()
        self.shown, self.back = None, False


class _ModelledStore:
    """What the service manager keeps; a broker that is dead changes nothing of it."""

    capacity = 100

    def __init__(self, world: MortalWorld) -> None:
        self._world = world

    def __len__(self) -> int:
        return len(self._world.kept)

    def __contains__(self, name: str) -> bool:
        return name in self._world.kept

    def names(self) -> list[str]:
        return sorted(self._world.kept)

    def require_room(self, count: int) -> None:
        assert len(self) + count <= self.capacity

    async def put(self, name: str, fd: int) -> None:
        await trio.lowlevel.checkpoint()
        if self._world.alive():
            self._world.kept[name] = os.dup(fd)

    async def remove(self, name: str) -> None:
        await trio.lowlevel.checkpoint()
        if self._world.alive():
            os.close(self._world.kept.pop(name))

    async def confirm(self) -> None:
        await trio.lowlevel.checkpoint()


class _MortalWarden(ModelledWarden):
    """Ends with the broker; all of them work on one enclave, and have one trouble at a time."""

    world: MortalWorld

    async def control(self, *args: Any, **named: Any) -> Any:
        reply = await super().control(*args, **named)
        self.world.alive()
        return reply

    async def repair(self, *args: Any, **named: Any) -> Any:
        reply = await super().repair(*args, **named)
        self.world.alive()
        return reply

    async def _step_done(self) -> None:
        if not self.world.alive():  # a warden ends with its broker, in the middle of a renewal too
            await trio.sleep_forever()

    async def _turn(self, slot: int) -> Any:
        found = await super()._turn(slot)
        if self.world.dead:
            await trio.sleep_forever()
        return found


class MortalWorld(World):
    """As World; its processes are of the kind above."""

    process_type = ResumingProcess

    def __init__(self, slots: int, *, kill: bool) -> None:
        self.kept: dict[str, int] = {}
        self.dead = False
        self.lives = 0
        self.died_at = 0.0
        self.next_hang = 0.0
        """Seconds that the first request to the next broker's warden takes."""
        self._points = _MANY
        self._over = False
        self._attendant_lives = ffi.callback("int(void)", self.alive)
        super().__init__(slots, kill=kill)

    def _new_warden(self, *_: object, **__: object) -> _MortalWarden:
        warden = _MortalWarden(self.enclave)
        warden.world = self
        warden.troubled, warden.gone = self.warden.troubled, self.warden.gone
        warden.hang, self.next_hang = self.next_hang, 0.0
        self.warden = warden
        return warden

    # -- the moment of death --------------------------------------------------------------

    def alive(self) -> bool:
        """Something can be seen outside now: false from the moment of the kill on."""
        if not self.dead:
            self._points -= 1
            self.dead = self._points < 0
        return not self.dead

    def die_after(self, points: int) -> None:
        """Let the broker be killed when so many things have been seen of it."""
        self._points = points

    def _model_the_host(self, enter: Callable[[Any], object]) -> None:
        super()._model_the_host(enter)
        transmit, store = Outbox._transmit, Snapshot._store

        def transmit_if_alive(outbox: Outbox, data: bytes, fds: tuple[int, ...] = ()) -> None:
            if self.alive():
                transmit(outbox, data, fds)

        def store_if_alive(snapshot: Snapshot, offset: int, data: bytes) -> None:
            if self.alive():
                store(snapshot, offset, data)

        enter(mock.patch.object(Outbox, "_transmit", transmit_if_alive))
        enter(mock.patch.object(Snapshot, "_store", store_if_alive))
        enter(mock.patch.object(Charge, "__del__", _forget))
        self._cleanup.callback(gc.collect)
        enter(mock.patch("teemate.broker.restart.restoration.reopen_process", self._reopen))
        for module in ("state", "resumption"):
            enter(mock.patch(f"teemate.broker.restart.{module}.start_time", self._start_time))
        clock = SimpleNamespace(monotonic=lambda: self.clock.current_time())
        for module in ("enclaves.draining", "enclaves.upgrade", "slots.revocation"):
            enter(mock.patch(f"teemate.broker.{module}.time", clock))

    def _start_time(self, pid: int, pidfd: int) -> int | None:
        """A process's number is its start time: it is never another's, as a pid can be."""
        inode = os.fstat(pidfd).st_ino
        for process in self.living():
            if self.pid(process) == pid and os.fstat(process.pidfd).st_ino == inode:
                return process.number
        return None

    def _reopen(self, pid: int, started: int) -> int | None:
        for process in self.living():
            if (self.pid(process), process.number) == (pid, started):
                return os.dup(process.pidfd)
        return None

    # -- one broker after another ------------------------------------------------------------

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as listener:
            listener.bind(self._address)
            listener.listen(64)
            try:
                while not self._over:
                    await self._live(listener)
            finally:
                for fd in self.kept.values():
                    os.close(fd)

    async def _live(self, listener: socket.socket) -> None:
        self.dead, self._points = False, _MANY
        found = read_found([Inherited(name, os.dup(fd)) for name, fd in self.kept.items()])
        log = structlog.wrap_logger(None, processors=[self._record])
        store: Any = _ModelledStore(self)
        with mock.patch.object(Administration, "new_warden", self._new_warden):
            self.service = service = Service(_policy(), log, store, found)
        service.disposal._drop_sockets = _close_at_once  # type: ignore[method-assign]
        await service.state.begin()
        async with trio.open_nursery() as keeping:
            self._stop = keeping.cancel_scope
            keeping.start_soon(service.run)
            await service.running.wait()
            lib.attendant_mortal(service.attendant.native, self._attendant_lives)
            self._model_the_attendants_host()
            if not self.lives:
                await self._add_enclave()
            if ENCLAVE in service.enclaves:
                self.broker_enclave = service.enclaves[ENCLAVE]
            else:  # it was destroyed: this broker holds nothing of it
                self.broker_enclave.grants.clear()
                self.broker_enclave.clients_by_uid.clear()
            self.lives += 1
            keeping.start_soon(Server(service).run, [listener])
            await trio.testing.wait_all_tasks_blocked()
            self._started.set()

    async def _add_enclave(self) -> None:
        """What Administration does after building; nothing here is built, or built again."""
        service = self.service
        policy = replace(_enclave_policy(kill=self._kill), rebuild_limit=0)
        enclave = Enclave(policy, "sim", self.enclave.built(), None)
        enclave.requested = True
        enclave.warden = self._new_warden()  # type: ignore[assignment]
        for index in enclave.slots.slots:
            await service.reclaimer.arm(enclave, index)
        source = ImageSource(os.memfd_create("no image"), b"", "a model")
        await service.state.keep_enclave(enclave, source)
        source.close()
        enclave.state = EnclaveState.READY
        service.state.write_enclaves()
        service.enclaves[ENCLAVE] = self.broker_enclave = enclave

    def restart(self) -> None:
        """Kill the broker, unless it is dead already, and start the next."""
        self.step(self._die)
        self._started.wait()

    def _die(self) -> None:
        self.dead = True
        self.died_at = self.clock.current_time()
        self.service.leaving = True
        self._started.clear()
        self._stop.cancel()

    def _record(self, logger: object, method: str, event: dict[str, Any]) -> Any:
        if self.dead:  # nobody hears it
            raise structlog.DropEvent
        return super()._record(logger, method, event)

    def come_back(self, process: ModelledProcess) -> list[Reply]:
        """Connect again, and ask for what was not answered; returns what is answered at once."""
        assert isinstance(process, ResumingProcess)
        self.reconnect(process)
        heard = process.hear()
        self.step(process.ask_again)
        return heard + process.hear()

    def resumes(self, process: ModelledProcess, token: bytes) -> bool:
        """Whether a further connection of `process` that shows the token is known by it; closes it again."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.bind(f"{self._address}-{process.number}")
            hello = {"id": 0, "op": "hello", "args": {"version": 1, "resume": token}}
            self.step(lambda: (sock.connect(self._address), wire.send(sock, wire.encode(hello))))
            reply = wire.decode(wire.receive(sock).data)
            self.step(sock.close)
        return "resumed" in reply["ok"]

    def close(self) -> None:
        self._over = True
        super().close()
