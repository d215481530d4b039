"""Lead programs, broker and wardens through a storm, and check that nothing was lost.

Programs work in one shared vault and are killed at random moments, each after a look at what it is
doing; so are, if asked for, the broker under its keeper, and wardens.  Programs keep a journal
(_journal.py), so that for every key and for the shared counter the values that are right are known
exactly, also for those who were killed in the middle of a call.  The seed decides who is killed and about
when; the scheduler has the last word, so no two storms are the same.
"""

from __future__ import annotations

import os
import random
import select
import signal
import statistics
import tempfile
import time
from collections import Counter as Tally
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

from teemate._backend import choose_backend
from teemate._broker import connect
from teemate.bench._broker import BenchBroker
from teemate.bench._figures import StormFigures
from teemate.bench._journal import Field
from teemate.bench._programs import LOST_STATUS, Programs
from teemate.bench._where import INSIDE, MET, Observer, State
from teemate.bench.worker import COUNTER, Counter, Work
from teemate.demo._prepare import ENCLAVE, DemoImage, prepare_image
from teemate.errors import CallTimeout, Error
from teemate.image import shipped
from teemate.vault import Vault

__all__ = ["Listener", "Plan", "run_storm"]

HEAP = 16 << 20
_READY_LIMIT = 120.0
_RESUME_LIMIT = 60.0
_SHOW_LIMIT = 60.0 + _RESUME_LIMIT
"""A program shows that it resumed after the step that it is at, which on a busy host waits long for locks of
the dead.  It has lost nothing by that: who has not resumed when the grace (60 s) is over is revoked, and
ends saying so.  So only who has done neither a while after that is counted here."""
_END_LIMIT = 60.0
_PAUSE = 0.008
"""Seconds between two kills of clients on average."""
_AIM_LIMIT = 0.5
"""Seconds that a program may take until it is where it is wanted."""
_CLIENTS_PER_KILL = 20
"""Clients killed for each other kill, when their number is not given."""
_PROGRAMS_OF_A_KEEPER = 8


class Plan(NamedTuple):
    """What is asked for; a number of kills ends the storm when all are done, else time does."""

    seed: int = 0
    seconds: float = 30.0
    clients: int = 8
    backend: str = "auto"
    client_kills: int | None = None
    """None: as many as there is time for."""
    each_state: int = 0
    """So many of them at least in each state that programs can be met in (_where.MET): moments are chosen."""
    broker_kills: int = 0
    warden_kills: int = 0
    keeper_kills: int = 0
    command: tuple[str, ...] = ()
    """Starts another broker than ours, for tests."""
    elf: Path | None = None
    """Another vault than that which is shipped, for tests."""
    patience: float = 30.0
    """Seconds until slots of the dead have to be free."""


class Listener(Protocol):
    """Hears how far a storm is."""

    def phase(self, text: str, total: int = 0) -> None:
        """A phase begins."""

    def progress(self, done: int) -> None:
        """So much of its total is done."""


class _Silence:
    def phase(self, text: str, total: int = 0) -> None:
        """Say nothing."""

    def progress(self, done: int) -> None:
        """Say nothing."""


def run_storm(plan: Plan, listener: Listener | None = None) -> StormFigures:
    """Run a storm; a broker on a temporary socket, programs and all end with it.

    Raises
    ------
    Unsupported
        The backend is not to be had, or processes may not be traced.
    InternalError, CallTimeout
        The broker, or the programs, did not get ready.

    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="teemate-storm-")))
        return _Storm(plan, listener or _Silence(), folder).run(stack)


class _Storm:
    def __init__(self, plan: Plan, listener: Listener, folder: Path) -> None:
        self._plan = plan
        self._listener = listener
        self._folder = folder
        self._backend = choose_backend(plan.backend).backend
        self._chance = random.Random(plan.seed)  # noqa: S311 - chance, not secrets
        self._states: Tally[State] = Tally()
        self._done: Tally[str] = Tally()
        self._resumes_ms: list[float] = []
        self._failed = 0
        self._lost = 0
        self._repeated = 0
        self._errors: list[str] = []

    def run(self, stack: ExitStack) -> StormFigures:
        plan, started = self._plan, time.monotonic()
        self._start(stack)
        self._storm()
        figures = self._finish(started)
        if plan.keeper_kills:
            self._broker.__exit__()
            self._kill_keepers()
            figures = figures._replace(
                seconds=round(time.monotonic() - started, 3),
                keeper_kills=self._done["keeper"],
                failed_calls=figures.failed_calls + self._failed,
                errors=(*figures.errors, *self._errors)[:10],
            )
        return figures

    def _start(self, stack: ExitStack) -> None:
        """Have all programs at work."""
        plan = self._plan
        # Two slots for each program now and then, one more for what was killed and is being repaired.
        elf = plan.elf or shipped(ENCLAVE).elf
        self._image = prepare_image(self._folder, heap=HEAP, clients=3 * plan.clients + 4, elf=plan.elf)
        self._observer = Observer(self._image.sgxs, elf)
        self._broker = stack.enter_context(self._start_broker(self._image, plan.clients))
        self._programs = programs = stack.enter_context(self._start_programs("storm", plan.clients))
        self._listener.phase(f"{plan.clients} programs start")
        if not programs.wait_for(lambda: len(programs.ready()) == plan.clients, _READY_LIMIT):
            raise CallTimeout(f"the programs did not get ready: {programs.said()[-5:]}")

    def _start_broker(self, image: DemoImage, programs: int) -> BenchBroker:
        plan = self._plan
        return BenchBroker(
            self._folder, image, backend=self._backend, programs=programs, command=plan.command
        )

    def _start_programs(self, name: str, count: int) -> Programs:
        seed = self._plan.seed
        return Programs(
            self._folder, name, socket=self._broker.socket, enclave=ENCLAVE, count=count, seed=seed
        )

    # -- the storm ---------------------------------------------------------------------------

    def _storm(self) -> None:
        plan = self._plan
        wanted = {"client": plan.client_kills, "broker": plan.broker_kills, "warden": plan.warden_kills}
        end = time.monotonic() + plan.seconds
        counted = sum(count for count in wanted.values() if count is not None)
        self._listener.phase("kills", counted if plan.client_kills is not None else 0)
        while time.monotonic() < end:
            kinds, weights = self._left(wanted)
            if not kinds and self._missing():
                kinds, weights = ["client"], [1.0]
            if not kinds or (plan.client_kills is None and kinds == ["client"] and counted):
                break
            {"client": self._kill_client, "broker": self._kill_broker, "warden": self._kill_warden}[
                self._chance.choices(kinds, weights)[0]
            ]()
            self._listener.progress(self._done.total())

    def _left(self, wanted: dict[str, int | None]) -> tuple[list[str], list[float]]:
        """The kinds of kills that are still to be done, and how many of each."""
        left: dict[str, float] = {
            kind: count - self._done[kind] for kind, count in wanted.items() if count is not None
        }
        if wanted["client"] is None:
            left["client"] = max(1.0, _CLIENTS_PER_KILL * sum(left.values()))
        left = {kind: count for kind, count in left.items() if count > 0}
        return list(left), list(left.values())

    def _missing(self) -> frozenset[State]:
        """The states in which not enough programs were killed yet."""
        met = MET[self._backend]
        return frozenset(state for state in met if self._states[state] < self._plan.each_state)

    def _kill_client(self) -> None:
        """Not more of them than start again: a storm over programs that never work would show nothing.

        While states are missing, one that works is let go on until it is in one of them.
        """
        programs, chance = self._programs, self._chance
        time.sleep(chance.uniform(0, 2 * _PAUSE))
        programs.hear()
        enough = (self._plan.clients + 1) // 2
        if not programs.wait_for(lambda: len(programs.ready()) >= enough, _READY_LIMIT):
            raise CallTimeout(f"the programs did not come back: {programs.said()[-5:]}")
        missing = self._missing()
        program = chance.choice(sorted((missing and programs.ready()) or programs.running))
        pid, record = programs.running[program], programs.journal.records[program]
        if pid in programs.killed:
            return
        programs.killed.add(pid)
        where = (pid, record.read(Field.BASE), record.read(Field.SLOT))
        if missing:
            wanted = chance.choice(sorted(missing))
            state = self._observer.kill_at(*where, wanted, patience=_AIM_LIMIT)
        else:
            state = self._observer.kill(*where)
        if state is None:
            programs.killed.discard(pid)
            return
        self._states[state] += 1
        self._done["client"] += 1

    def _kill_broker(self) -> None:
        """And see how long a new attach takes then, and that every program resumes."""
        programs, chance = self._programs, self._chance
        time.sleep(chance.uniform(0, 0.1))
        programs.hear()
        before = {
            program: (programs.running[program], programs.journal.records[program].read(Field.RESUMES))
            for program in programs.ready()
        }
        for pid in self._broker.workers():
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        if self._plan.client_kills != 0 and chance.random() < 0.5:
            self._kill_client()
        try:
            with connect(self._broker.socket, client="storm") as broker:
                with broker.attach(ENCLAVE, slots=0, wait=_RESUME_LIMIT):
                    self._resumes_ms.append((time.monotonic() - killed) * 1000)
                for client in broker.clients():
                    if len(client.grants) > 1 or any(len(grant.slots) > 2 for grant in client.grants):
                        self._repeated += 1
                        self._errors.append(f"client {client.name!r} holds {client.grants}")
        except Error as error:
            self._failed += 1
            self._errors.append(f"an attach after the broker was killed: {error.code}: {error.message}")
        self._done["broker"] += 1
        if chance.random() < 0.7:  # else the next kill may come while they are at it
            self._wait_resumed(before)

    def _wait_resumed(self, before: dict[int, tuple[int, int]]) -> None:
        programs = self._programs

        def waiting() -> list[int]:
            return [
                program
                for program, (pid, resumes) in before.items()
                if programs.running.get(program) == pid
                and programs.journal.records[program].read(Field.RESUMES) <= resumes
            ]

        if not programs.wait_for(lambda: not waiting(), _SHOW_LIMIT):
            self._lost += len(waiting())
            with connect(self._broker.socket, client="storm") as broker:
                resumption = broker.stats()["resumption"]
            self._errors.append(
                f"programs {waiting()} neither showed that they resumed nor ended within {_SHOW_LIMIT:g} s;"
                f" the broker says {resumption}"
            )

    def _kill_warden(self) -> None:
        time.sleep(self._chance.uniform(0, 0.05))
        for pid in self._broker.wardens():
            os.kill(pid, signal.SIGKILL)
            self._done["warden"] += 1

    # -- the reckoning -------------------------------------------------------------------------

    def _finish(self, started: float) -> StormFigures:
        plan, programs = self._plan, self._programs
        self._listener.phase("programs end, and everything is compared")
        hanging = programs.finish(_END_LIMIT)
        if hanging:
            self._errors.append(f"{hanging} programs did not end within {_END_LIMIT:g} s")
        with connect(self._broker.socket, client="storm") as broker:
            with broker.attach(ENCLAVE, wait=_RESUME_LIMIT) as enclave, enclave.slot() as slot:
                vault = Vault(slot)
                for program, record in enumerate(programs.journal.records):
                    Work(vault, record, program, plan.clients).settle()
                counter = Counter(vault.get(COUNTER), plan.clients)
            end = time.monotonic() + plan.patience
            while True:
                [info] = broker.enclaves()
                lost = info.slots.total - info.slots.free - info.slots.quarantined
                if not lost or time.monotonic() > end:
                    break
                time.sleep(0.05)
        seconds = time.monotonic() - started
        if info.generation != 1:
            self._errors.append(f"the enclave is generation {info.generation}: {info.reason}")
            self._failed += 1
        repaired, reasons, bugs = self._read_log()
        self._errors += bugs
        figures = StormFigures(
            seed=plan.seed,
            seconds=round(seconds, 3),
            client_kills=self._done["client"],
            client_kills_inside=sum(count for state, count in self._states.items() if state in INSIDE),
            kills_by_state={state.value: self._states[state] for state in State},
            slots_repaired=repaired,
            slots_lost=lost,
            slots_quarantined=info.slots.quarantined,
            quarantined_with_reason=min(reasons, info.slots.quarantined),
            wrong_values=programs.total(Field.WRONG),
            counter_expected=programs.total(Field.COUNTED),
            counter=counter.total,
            broker_kills=self._done["broker"],
            failed_calls=programs.total(Field.FAILED) + self._failed + hanging + len(bugs),
            repeated_calls=programs.total(Field.REPEATED) + self._repeated,
            lost_grants=programs.total(Field.LOST) + self._lost,
            resume_ms_p50=round(statistics.median(self._resumes_ms), 3) if self._resumes_ms else None,
            warden_kills=self._done["warden"],
            errors=(*self._errors, *programs.said())[:10],
        )
        self._failed, self._errors = 0, []
        return figures

    def _read_log(self) -> tuple[int, int, list[str]]:
        """How many slots were repaired, how many quarantined with a reason, and what was a bug."""
        repaired = reasons = 0
        bugs: list[str] = []
        for record in self._broker.records():
            if record["event"] == "slot repaired":
                repaired += 1
            elif record["event"] == "slot quarantined" and record.get("reason"):
                reasons += 1
                self._errors.append(f"slot {record.get('slot')} quarantined: {record['reason']}")
            elif record["event"] == "internal error":
                bugs.append(f"the broker met a bug: {record.get('exception', record)}"[:2000])
        return repaired, reasons, bugs

    # -- keepers ---------------------------------------------------------------------------------

    def _kill_keepers(self) -> None:
        """Each time: everybody hears that it is over, nothing hangs, and a new start works."""
        count = min(self._plan.clients, _PROGRAMS_OF_A_KEEPER)
        self._listener.phase("kills of the keeper", self._plan.keeper_kills)
        broker = self._start_broker(self._image, count)
        broker.__enter__()
        try:
            for kill in range(self._plan.keeper_kills):
                with self._start_programs(f"keeper-{kill}", count) as programs:
                    if not programs.wait_for(lambda p=programs: len(p.ready()) == count, _READY_LIMIT):  # type: ignore[misc]
                        raise CallTimeout(f"the programs did not get ready: {programs.said()[-5:]}")
                    programs.again = False
                    time.sleep(self._chance.uniform(0, 0.2))
                    self._kill_one_keeper(broker, programs)
                self._done["keeper"] += 1
                self._listener.progress(self._done["keeper"])
        finally:
            broker.__exit__()

    def _kill_one_keeper(self, broker: BenchBroker, programs: Programs) -> None:
        left = [os.pidfd_open(pid) for pid in broker.workers()]
        broker.kill_keeper()
        for pidfd in left:
            if not select.select([pidfd], [], [], _END_LIMIT)[0]:
                self._failed += 1
                self._errors.append("a broker did not end though its keeper had")
            os.close(pidfd)
        broker.__enter__()
        if not programs.wait_for(lambda: not programs.running, _END_LIMIT):
            self._failed += len(programs.running)
            self._errors.append(f"programs {sorted(programs.running)} heard nothing of the keeper's end")
        others = [status for status in programs.statuses if status != LOST_STATUS]
        if others:
            self._failed += len(others)
            self._errors += programs.said()[:5]
