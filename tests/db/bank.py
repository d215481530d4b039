"""A bank in a database that many processes share, half of them in containers, and killed wherever they are.

Usage: bank.py [--transactions N] [--kills N] [--broker-kills N] [--warden-kills N] [--json] …

Tellers (bank_teller.py) move money between accounts.  What each was about to do and what it was told to be
committed goes through a pipe to this program, which kills tellers after a look at what they are doing,
containers as a whole, the broker under its keeper, and wardens.  In the end every transaction that was
acknowledged has to be in the database once, and nothing else but what somebody was at when it died; every
balance is that of its history.  Then everything ends, and the enclave's next life has to find the same.
The exit status is 1 when anything was lost, repeated or wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "containers"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from backends import BACKEND, PATIENCE, SHARING
from bank_teller import ACCOUNTS, DATABASE, START
from connections import EXECUTE, Connection, database_image, operation
from runc import HOST_UID, Container, Root
from runc import start as start_container
from running_broker import run_broker

import teemate
from teemate import db
from teemate.bench._oci import program_root, python_root, runc_program
from teemate.bench._where import Observer, State
from teemate.demo._memory import children

ENCLAVE = "db"
TESTS = Path(__file__).resolve().parents[1]
STANDSTILL = 120.0 * PATIENCE
"""Seconds without a commit after which it has failed."""
_PROGRESS = 10.0
"""Seconds between two lines of progress."""
_KILL_PAUSE = 0.004
"""Seconds at most between the moment for a kill and the kill: a commit's time."""
_AIMS = (
    frozenset(State),
    frozenset(State) - {State.OUTSIDE, State.OCALL},
    frozenset(State) - {State.OUTSIDE, State.OCALL, State.EXIT},
)
_LOOKS = 100
SCHEMA = (
    "CREATE TABLE account(id INTEGER PRIMARY KEY, balance INTEGER, changes INTEGER);"
    # No key that forbids it twice: that it is there once is what is looked at.
    "CREATE TABLE transfer(teller INTEGER, number INTEGER, source INTEGER, target INTEGER, amount INTEGER,"
    "note TEXT);"
    "CREATE INDEX transfer_source ON transfer(source); CREATE INDEX transfer_target ON transfer(target)"
)


class Plan(NamedTuple):
    """What is asked for: kills are spread over the transactions."""

    transactions: int = 100_000
    kills: int = 2000
    broker_kills: int = 0
    warden_kills: int = 0
    container_kills: int = 0
    tellers: int = 8
    containers: bool = True
    seed: int = 0
    look: bool = True
    """See what they are doing before they are killed; reading where everything is in SQLite takes 5 s."""
    client_io: bool = False
    """Tellers do the I/O themselves."""
    careless: bool = False
    """Tellers say that it is committed before it is: the negative control."""
    image: Path | None = None
    progress: bool = False
    """Say how far it is, to stderr, every so often."""


@dataclass
class Figures:
    """What happened; `good` when nothing was lost."""

    seed: int
    transactions: int = 0
    """That were acknowledged."""
    seconds: float = 0.0
    tellers: int = 0
    """That there were, one after another."""
    in_containers: int = 0
    kills: dict[str, int] = field(default_factory=dict)
    kills_by_state: dict[str, int] = field(default_factory=dict)
    undecided: int = 0
    """Committed, but who did it died before it could say so."""
    lost: int = 0
    repeated: int = 0
    foreign: int = 0
    """Never tried, or not as it was."""
    wrong_balances: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether everything was as it has to be."""
        return not (self.lost or self.repeated or self.foreign or self.wrong_balances or self.errors)


@dataclass
class Told:
    """What one teller has told."""

    pid: int = 0
    base: int = 0
    slot: int = 0
    works: bool = False
    killed: bool = False
    done: int = 0
    tried: list[tuple[int, int, int]] = field(default_factory=list)
    """Source, target and amount; of what is not done yet the last attempt."""


class Branch:
    """A program that starts tellers: of this host, or in a container."""

    def __init__(self, process: subprocess.Popen[str], container: Container | None) -> None:
        self.process = process
        self.container = container
        self.pid = process.pid  # the container's, once it is up
        self.up = False
        self.alive: set[int] = set()
        self.buffer = b""
        assert process.stdout is not None
        self.fd = process.stdout.fileno()

    def tell(self, text: str) -> None:
        """A line for it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            os.write(self.process.stdin.fileno(), text.encode() + b"\n")

    def on_host(self, pid: int) -> int:
        """The host's number of a process of its."""
        if self.container is None:
            return pid
        for child in children(self.pid):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{child}/status").read_text().splitlines():
                    if line.startswith("NSpid:") and int(line.split()[-1]) == pid:
                        return child
        return 0  # it is dead already


class Bank:
    """All of it; a context manager that ends everything."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self.figures = Figures(plan.seed)
        self.told: list[Told] = []
        self._dice = random.Random(plan.seed)
        self._stack = contextlib.ExitStack()
        self._branches: list[Branch] = []
        self._homes: dict[int, Branch] = {}
        self._ended: Counter[int] = Counter()
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        image = folder / "db.sgxs"
        for suffix in (".sgxs", ".sig", ".elf"):  # the next life's too, whatever is installed meanwhile
            shutil.copy((plan.image or database_image()).with_suffix(suffix), image.with_suffix(suffix))
        self.image = image
        self._observer = Observer(image, image.with_suffix(".elf")) if plan.look else None
        self._root = self._find_root() if plan.containers else None

    def policy(self) -> str:
        """Two users: ours, and that of the containers."""
        return f"""
[broker]
state_directory = "{self.folder / "state"}"
warden_deadline = {30.0 * PATIENCE}
warden_failures = 1000
resume_grace = {120.0 * PATIENCE}
[administrators]
uids = [{os.geteuid()}]
[limits]
requests_per_second = 1000000
[[enclave]]
name = "{ENCLAVE}"
image = "{self.image}"
owner = {os.geteuid()}
storage = true
storage_limit = {4 << 30}
{'io = "client"' if self.plan.client_io else ""}
revoke_kill = {str(self.plan.client_io).lower()}
clients_per_uid = 64
{SHARING}
[[enclave.attach]]
uid = {os.geteuid()}
[[enclave.attach]]
uid = {HOST_UID}
"""

    def _find_root(self) -> Root | None:
        """What containers have for a root; None where there are none to be had."""
        roots = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="teemate-roots-")))
        roots.chmod(0o755)
        try:
            runc_program()
        except teemate.Unsupported:
            return None
        true = program_root(roots / "true", Path("/usr/bin/true"))
        with start_container(true, ["/program"], str(roots / "socket")) as container:
            container.output.read()
            if container.process.wait():
                return None
        return python_root(roots / "python", TESTS)

    # -- tellers ------------------------------------------------------------------------------

    def _open_branch(self, *, contained: bool) -> None:
        words = [
            str(TESTS / "db" / "bank_teller.py"),
            ENCLAVE,
            *(["--careless"] if self.plan.careless else []),
        ]
        if contained:
            assert self._root is not None
            container = self._programs.enter_context(
                start_container(self._root, ["python", "-B", *words], self.broker.socket)
            )
            branch = Branch(container.process, container)
        else:
            process = self._programs.enter_context(
                subprocess.Popen(
                    [sys.executable, *words],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "TEEMATE_SOCKET": self.broker.socket},
                )
            )
            branch = Branch(process, None)
        self._branches.append(branch)
        self._selector.register(branch.fd, selectors.EVENT_READ, branch)

    def _start_teller(self, branch: Branch) -> None:
        number = len(self.told)
        self.told.append(Told())
        self._homes[number] = branch
        branch.alive.add(number)
        branch.tell(f"start {number} {self.plan.seed}")

    def _fill(self) -> None:
        """Have everybody at work that is to be: those of the host in one program, each container has one."""
        for branch in self._branches:
            wanted = 1 if branch.container else self.plan.tellers - self.figures.in_containers
            while branch.up and not self._stopping and len(branch.alive) < wanted:
                self._start_teller(branch)

    def _hear(self, patience: float) -> None:
        """Take in what was said."""
        for key, _ in self._selector.select(patience):
            branch: Branch = key.data
            data = os.read(branch.fd, 65536)
            if not data:
                self._closed(branch)
                continue
            *lines, branch.buffer = (branch.buffer + data).split(b"\n")
            for line in lines:
                self._heard(branch, line.decode())
        self._fill()

    def _closed(self, branch: Branch) -> None:
        """A container that was killed is started again."""
        self._selector.unregister(branch.fd)
        self._branches.remove(branch)
        if branch.alive and not all(self.told[number].killed for number in branch.alive):
            self.figures.errors.append(f"a program ended with tellers {sorted(branch.alive)}")
        if branch.container and not self._stopping:
            self._open_branch(contained=True)

    def _heard(self, branch: Branch, line: str) -> None:
        match line.split(maxsplit=5):
            case ["up"]:
                branch.up = True
                if branch.container:
                    branch.pid = branch.container.init()
            case ["started", number, pid]:
                self.told[int(number)].pid = branch.on_host(int(pid))
            case ["works", number, base, slot]:
                teller = self.told[int(number)]
                teller.base, teller.slot, teller.works = int(base), int(slot), True
            case ["try", number, transaction, source, target, amount]:
                teller = self.told[int(number)]
                del teller.tried[int(transaction) :]
                teller.tried.append((int(source), int(target), int(amount)))
            case ["done", number, transaction]:
                assert self.told[int(number)].done == int(transaction)
                self.told[int(number)].done += 1
                self.figures.transactions += 1
            case ["ended", number, status]:
                teller = self.told[int(number)]
                branch.alive.discard(int(number))
                teller.works = False
                if int(status) and not teller.killed:
                    self.figures.errors.append(f"teller {number} ended with {status}")
            case _:
                self.figures.errors.append(line)

    def _wait(self, what: str, condition: str) -> None:
        """Listen until everybody of whom it is asked does so."""
        end = time.monotonic() + STANDSTILL
        while True:
            self._hear(0.01)
            if condition == "work":
                alive = [self.told[number] for branch in self._branches for number in branch.alive]
                if sum(teller.works for teller in alive) == self.plan.tellers:
                    return
            elif not self._branches:
                return
            if self.figures.errors or time.monotonic() > end:
                self.figures.errors.append(what)
                return

    # -- kills ------------------------------------------------------------------------------------

    def _kill_teller(self) -> None:
        working = [number for branch in self._branches for number in branch.alive if self._at_work(number)]
        if len(working) < (self.plan.tellers + 1) // 2:
            return
        teller = self.told[self._dice.choice(working)]
        teller.killed = True
        if self._observer is None:
            os.kill(teller.pid, signal.SIGKILL)
            self._count("teller")
            return
        # Mostly they wait for their files: two of three may run on, for a while, to where they are inside.
        aim = _AIMS[self.figures.kills["teller"] % len(_AIMS)]
        state = self._observer.kill(teller.pid, teller.base, teller.slot, aim=aim, looks=_LOOKS)
        if state is not None:
            teller.works = False
            self.figures.kills_by_state[state.value] += 1
            self._count("teller")

    def _at_work(self, number: int) -> bool:
        teller = self.told[number]
        return teller.works and not teller.killed and bool(teller.pid)

    def _kill_container(self) -> None:
        """As `docker kill` does; its tellers end with it."""
        branches = [branch for branch in self._branches if branch.container and branch.up and branch.alive]
        if branches:
            branch = self._dice.choice(branches)
            assert branch.container is not None
            for number in branch.alive:
                self.told[number].killed = True
            branch.up = False
            branch.container.kill()
            self._count("container")

    def _kill_broker(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # the one before is dead, and the next not started
            self.broker.kill_worker()
            self._count("broker")

    def _kill_warden(self) -> None:
        for pid in children(self.broker.pid):
            with contextlib.suppress(OSError):
                if b"teemate-warden" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    self._count("warden")

    def _count(self, kind: str) -> None:
        self.figures.kills[kind] += 1

    def _moments(self) -> list[tuple[int, str]]:
        """After how many transactions what is killed."""
        plan = self.plan
        wanted = {"teller": plan.kills, "broker": plan.broker_kills, "warden": plan.warden_kills}
        wanted["container"] = plan.container_kills if self._root else 0
        span = range(plan.transactions // 20, plan.transactions - plan.transactions // 20 + 1)
        return sorted((self._dice.choice(span), kind) for kind in wanted for _ in range(wanted[kind]))

    # -- the whole ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Have a broker and accounts, and everybody work, be killed, and end."""
        figures = self.figures
        figures.kills = dict.fromkeys(("teller", "container", "broker", "warden"), 0)
        figures.kills_by_state = {state.value: 0 for state in State}
        figures.in_containers = self.plan.tellers // 2 if self._root else 0
        with self._stack, run_broker(self.policy(), keeper=True) as self.broker:
            with self.inside() as bank:
                bank.script(SCHEMA)
                rows = [(account, START, 0) for account in range(ACCOUNTS)]
                bank.run(operation(EXECUTE, "INSERT INTO account VALUES (?, ?, ?)", rows))
            if figures.in_containers:
                with teemate.connect(self.broker.socket) as broker, broker.attach(ENCLAVE) as enclave:
                    with contextlib.closing(db.connect(enclave, DATABASE)) as owned:
                        owned.grant(uid=HOST_UID, readonly=False)
            with contextlib.ExitStack() as self._programs:
                for number in range(1 + figures.in_containers):
                    self._open_branch(contained=number > 0)
                self._wait("tellers did not get in", "work")
                started = time.monotonic()
                self._work()
                figures.seconds = round(time.monotonic() - started, 3)
                self._stop()
            figures.tellers = len(self.told)
            yield

    def run(self) -> Figures:
        """Do all of it, and look again in the enclave's next life."""
        with self.opened(), self.inside() as bank:
            self.check(bank)
        with run_broker(self.policy()) as self.broker, self.inside() as bank:
            self.check(bank)
        return self.figures

    def _work(self) -> None:
        """Until so many transactions were acknowledged; kills come when it is their time."""
        moments, done, since = self._moments(), 0, time.monotonic()
        began = said = since
        kills = {
            "teller": self._kill_teller,
            "container": self._kill_container,
            "broker": self._kill_broker,
            "warden": self._kill_warden,
        }
        while (done < self.plan.transactions or moments) and not self.figures.errors:
            self._hear(0.01)
            if self.figures.transactions > done:
                done, since = self.figures.transactions, time.monotonic()
            elif time.monotonic() > since + STANDSTILL:
                self.figures.errors.append(f"nothing was committed for {STANDSTILL:g} s")
            if self.plan.progress and time.monotonic() > said + _PROGRESS:
                said = time.monotonic()
                kills_so_far = ", ".join(f"{count} {kind}" for kind, count in self.figures.kills.items())
                print(f"{said - began:.0f} s: {done} acknowledged; killed {kills_so_far}", file=sys.stderr)
            if moments and done >= moments[0][0]:
                self._hear(self._dice.uniform(0, _KILL_PAUSE))
                kind = moments[0][1]
                before = self.figures.kills[kind]
                kills[kind]()
                if self.figures.kills[kind] > before:
                    del moments[0]

    def _stop(self) -> None:
        self._wait("those who were killed did not come back", "work")
        self._stopping = True
        for branch in self._branches:
            branch.tell("stop")
        self._wait("tellers did not end", "gone")

    @contextlib.contextmanager
    def inside(self) -> Iterator[Connection]:
        """A connection of this process."""
        with (
            teemate.connect(self.broker.socket) as connection,
            connection.attach(ENCLAVE, wait=120.0) as enclave,
            enclave.slot() as slot,
        ):
            yield Connection(slot, DATABASE, busy_ms=60_000)

    def check(self, bank: Connection) -> None:
        """Compare what is there with what was told."""
        figures = self.figures
        if (found := bank.sql("PRAGMA integrity_check")) != [("ok",)]:
            figures.errors.append(f"integrity_check: {found[:3]}")
        balances, changes = [START] * ACCOUNTS, [0] * ACCOUNTS
        rows: Counter[tuple[int, int]] = Counter()
        figures.undecided = figures.lost = figures.repeated = figures.foreign = 0
        for row in bank.sql("SELECT teller, number, source, target, amount FROM transfer"):
            teller, number, source, target, amount = (int(value) for value in row)  # type: ignore[arg-type]
            rows[teller, number] += 1
            balances[source] -= amount
            balances[target] += amount
            changes[source] += 1
            changes[target] += 1
            told = self.told[teller] if 0 <= teller < len(self.told) else Told()
            if not 0 <= number < len(told.tried) or told.tried[number] != (source, target, amount):
                figures.foreign += 1
            elif number >= told.done:
                figures.undecided += 1
        figures.repeated = sum(count - 1 for count in rows.values())
        acknowledged = {(who, number) for who, told in enumerate(self.told) for number in range(told.done)}
        figures.lost = len(acknowledged - rows.keys())
        expected = list(zip(range(ACCOUNTS), balances, changes, strict=True))
        accounts = bank.sql("SELECT id, balance, changes FROM account ORDER BY id")
        figures.wrong_balances = len(set(accounts) ^ set(expected))
        if bank.sql("SELECT sum(balance) FROM account") != [(ACCOUNTS * START,)]:
            figures.errors.append("money was made, or went")


def run_bank(plan: Plan) -> Figures:
    """Run it in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="teemate-bank-") as folder:
        return Bank(plan, Path(folder)).run()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bank.py", description=str(__doc__).partition("\n")[0])
    names = "transactions kills broker-kills warden-kills container-kills tellers seed"
    for name in names.split():
        default = getattr(Plan(), name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--no-containers", dest="containers", action="store_false")
    parser.add_argument("--no-look", dest="look", action="store_false", help="kill wherever they are")
    parser.add_argument("--client-io", action="store_true", help='io = "client" in the policy')
    parser.add_argument("--careless", action="store_true", help="acknowledge before committing: must fail")
    parser.add_argument("--progress", action="store_true", help="say on stderr how far it is")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    figures = run_bank(Plan(**options))
    told = {**figures.__dict__, "backend": BACKEND, "good": figures.good}
    if as_json:
        print(json.dumps(told))
    else:
        for name, value in told.items():
            print(f"{name:16} {value}")
    sys.exit(0 if figures.good else 1)


if __name__ == "__main__":
    main()
