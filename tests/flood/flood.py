#!/usr/bin/env python3
"""Flood a broker as other users, and measure what that costs a victim.

    tests/flood/flood.py [--attack NAME ...] [--seconds S] [--attackers N] [--json]

For root.  Per attack: the victim attaches and detaches over fresh connections while attackers under
other uids do their worst, then again while they burn as much CPU time without the broker (the control
run), and once more while they burn also what the attack made the broker burn (`all`): what is left of the
ratio there is not the processors' being busy, but the order in which the broker serves.  All take
turns, a second each, so that what else goes on on the machine is in each.
Printed are how often the victim attached and failed to, the p99s and their ratios, the attackers' CPU
time in both, the broker's in the attack, for how long per attach the victim and the broker's serving
thread waited for a processor (attack / control), and what the broker grew by.  A p99 of fewer than 100
attaches is their maximum.  Attackers are few, end by themselves, and are killed when they do not.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

for _folder in ("", "broker"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / _folder))

import attack_figures  # noqa: E402
from hostile import Lingering, send_with  # noqa: E402
from images import Images  # noqa: E402
from other_users import burner, child, cpu_time, p99, together  # noqa: E402
from raw_client import RawClient  # noqa: E402
from running_broker import RunningBroker, run_broker  # noqa: E402

from teemate import wire  # noqa: E402

VICTIM = 5000
FIRST_ATTACKER = 6000
POLICY = """
[administrators]
uids = [0]
[limits]
connections = 64
handshakes = 16
handshake_seconds = 1.0
requests = 32
grants = 32
slots = 4
descriptors_sent = 64
requests_per_second = 500.0
burst = 1000
[[enclave]]
name = "vault"
image = "{image}"
sigstruct = "{sigstruct}"
insecure_sim_sharing = true
slots_per_client = 4
wait = 5.0
[[enclave.attach]]
uid = "*"
"""
SLICE = 1.0
"""Seconds of attack before as many of its control run."""
PING = wire.encode({"id": 1, "op": "ping"})
HELLO = wire.encode({"id": 0, "op": "hello", "args": {"version": 1}})

Attack = Callable[[str, Callable[[], bool], Counter[str]], None]


@dataclass
class Figures:
    """One attack; times in seconds, memory in bytes."""

    attack: str
    attaches: int
    control_attaches: int
    victim_failures: int
    p99: float
    control_p99: float
    ratio: float
    all_p99: float
    all_ratio: float
    """Against burners of the broker's time too."""
    attackers_cpu: float
    control_cpu: float
    broker_cpu: float
    """In the attack."""
    victim_waits: tuple[float, float]
    """For a processor, per attach: under attack, in the control run."""
    broker_waits: tuple[float, float]
    """The same of the thread that serves."""
    refusals: dict[str, int]
    rss_growth: int
    descriptors_left: int


# ---- what attackers do --------------------------------------------------------------


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(1.0)
        sock.connect(path)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _note(sock: socket.socket, seen: Counter[str], most: int = 64) -> None:
    """Count the limits that the broker names."""
    with contextlib.suppress(OSError):
        for _ in range(most):
            packet = wire.receive(sock)
            wire.close_all(packet.fds)
            if not packet.data:
                return
            error = wire.decode_trusted(packet.data).get("error")
            if isinstance(error, dict):
                detail = error.get("detail") or {}
                seen[str(detail.get("setting") or detail.get("limit") or error["code"])] += 1


def connections(path: str, go_on: Callable[[], bool], seen: Counter[str]) -> None:
    """Connect, say hello, keep it open."""
    held: list[socket.socket] = []
    while go_on():
        with contextlib.suppress(OSError):
            sock = _connect(path)
            held.append(sock)
            wire.send(sock, HELLO)
            _note(sock, seen)
        if len(held) > 100:
            _note(held[0], seen)
            held.pop(0).close()


def silence(path: str, go_on: Callable[[], bool], seen: Counter[str]) -> None:
    """Connect and say nothing."""
    held: list[socket.socket] = []
    while go_on():
        with contextlib.suppress(OSError):
            held.append(_connect(path))
        if len(held) > 50:
            _note(held[0], seen)
            held.pop(0).close()


def requests(path: str, go_on: Callable[[], bool], seen: Counter[str]) -> None:
    """Ask as fast as can be, and read what comes."""
    sock = _connect(path)
    wire.send(sock, HELLO)
    while go_on():
        with contextlib.suppress(BlockingIOError):
            wire.send(sock, PING)
        _note(sock, seen)


def deafness(path: str, go_on: Callable[[], bool], seen: Counter[str]) -> None:
    """Attach without reading a reply."""
    held: list[socket.socket] = []
    number = 0
    while go_on():
        if len(held) < 8:
            held.append(_connect(path))
            wire.send(held[-1], HELLO)
        for sock in held:
            number += 1
            attach = wire.encode({"id": number, "op": "attach", "args": {"enclave": "vault", "slots": 0}})
            with contextlib.suppress(OSError):
                wire.send(sock, attach)
    for sock in held:
        _note(sock, seen, 4096)


def hogging(path: str, go_on: Callable[[], bool], seen: Counter[str]) -> None:
    """Ask for many slots, wait long, and leave what comes withheld."""
    held: list[socket.socket] = []
    while go_on():
        with contextlib.suppress(OSError):
            sock = _connect(path)
            wire.send(sock, HELLO)
            wire.send(
                sock,
                wire.encode({"id": 1, "op": "attach", "args": {"enclave": "vault", "slots": 4, "wait": 5.0}}),
            )
            held.append(sock)
        for sock in held[:-8]:
            _note(sock, seen)
            sock.close()
        del held[:-8]


def lingering(path: str, go_on: Callable[[], bool], seen: Counter[str]) -> None:
    """Send sockets whose close takes an hour."""
    while go_on():
        bomb = Lingering()
        with contextlib.suppress(OSError):
            sock = _connect(path)
            wire.send(sock, HELLO)
            send_with(sock, PING, [bomb.fileno()])
            bomb.abandon()
            _note(sock, seen)
            sock.close()
        bomb.close()


def nonsense(path: str, go_on: Callable[[], bool], seen: Counter[str]) -> None:
    """Break the protocol, again and again."""
    while go_on():
        with contextlib.suppress(OSError):
            sock = _connect(path)
            wire.send(sock, b"\xff" * 60000)
            _note(sock, seen)
            sock.close()


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (connections, silence, requests, deafness, hogging, lingering, nonsense)
}

# ---- running them -------------------------------------------------------------------


def _attacker(attack: Attack, path: str, seconds: float) -> dict[str, Any]:
    signal.alarm(int(seconds) + 20)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    end = time.monotonic() + seconds
    seen: Counter[str] = Counter()
    before = cpu_time()
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            attack(path, lambda: time.monotonic() < end, seen)
    return {"cpu": cpu_time() - before, "seen": seen}


def _waited(pid: int) -> float:
    """How long the process's first thread has waited for a processor."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9


def _cpu_of(pid: int) -> float:
    """The CPU time of a process, by its clock (clock_getcpuclockid)."""
    return time.clock_gettime(~pid << 3 | 2)


def _victim(path: str, seconds: float) -> dict[str, Any]:
    signal.alarm(int(seconds) + 60)
    before = _waited(os.getpid())
    end = time.monotonic() + seconds
    times: list[float] = []
    failures: list[str] = []
    while time.monotonic() < end:
        started = time.perf_counter()
        try:
            client = RawClient(path, name="victim", patient=True)
            reply = client.call("attach", enclave="vault", slots=1)
            times.append(time.perf_counter() - started)
            if "ok" in reply:
                client.ok("detach", grant=reply["ok"]["grant"], clean=True)
            else:
                failures.append(str(reply["error"]["message"]))
            client.close()
        except (OSError, AssertionError) as failure:
            failures.append(repr(failure))
        time.sleep(0.01)
    return {"times": times, "failures": failures, "waited": _waited(os.getpid()) - before}


def _together(running: list[tuple[int, int]]) -> list[dict[str, Any]]:
    ended: dict[str, Any] = {"cpu": 0.0, "seen": {}, "times": [], "failures": ["ended"], "waited": 0.0}
    return [result or ended for result in together(running)]


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def settled(admin: RawClient) -> None:
    """Wait until what the attackers left is gone, or for half a minute."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        stats = admin.ok("stats")["stats"]
        door = stats["server"]["door"]
        if stats["clients"] == 1 and not (
            stats["disposal"]["sockets"]
            or stats["processes"]["watched"]
            or door["waiting"]
            or door["watched"]
        ):
            return


@dataclass
class _Slices:
    """What the slices of one kind have come to."""

    times: list[float] = field(default_factory=list)
    cpu: float = 0.0
    broker_cpu: float = 0.0
    victim_waited: float = 0.0
    broker_waited: float = 0.0

    def run(
        self, broker: int, path: str, length: float, others: list[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """Have the victim attach beside `others`; returns what came of it and of them."""
        cpu, waited = _cpu_of(broker), _waited(broker)
        victim, *results = _together([child(lambda: _victim(path, length), VICTIM), *others])
        self.times += victim["times"]
        self.victim_waited += victim["waited"]
        self.cpu += sum(result["cpu"] for result in results)
        self.broker_cpu += _cpu_of(broker) - cpu
        self.broker_waited += _waited(broker) - waited
        return [victim, *results]

    @property
    def p99(self) -> float:
        return p99(self.times)

    def waits(self) -> tuple[float, float]:
        """Of victim and broker, per attach."""
        count = max(1, len(self.times))
        return self.victim_waited / count, self.broker_waited / count


def measure(running: RunningBroker, name: str, seconds: float, attackers: int) -> Figures:
    """One attack and its control runs, a slice of each after the other."""
    path, broker = running.socket, running.pid
    admin = RawClient(path, name="flood")
    _together([child(lambda: _victim(path, 0.5), VICTIM)])  # warm
    before_rss, before_fds = rss(broker), len(os.listdir(f"/proc/{broker}/fd"))
    slices = max(1, round(seconds / SLICE))
    length = seconds / slices
    attack, control, all_burnt = _Slices(), _Slices(), _Slices()
    failures: list[str] = []
    seen: Counter[str] = Counter()

    def burners(shares: list[float]) -> list[tuple[int, int]]:
        return [
            child(lambda cpu=share: burner(cpu, length), FIRST_ATTACKER + number)  # type: ignore[misc]
            for number, share in enumerate(shares)
        ]

    for done in range(1, slices + 1):
        under = [
            child(lambda: _attacker(ATTACKS[name], path, length), FIRST_ATTACKER + number)
            for number in range(attackers)
        ]
        victim, *results = attack.run(broker, path, length, under)
        failures += victim["failures"]
        for result in results:
            seen.update(result["seen"])
        settled(admin)
        shares = [float(result["cpu"]) for result in results]
        control.run(broker, path, length, burners(shares))
        more = max(0.0, attack.broker_cpu - control.broker_cpu) / done / attackers
        all_burnt.run(broker, path, length, burners([share + more for share in shares]))
    grown, left = rss(broker) - before_rss, len(os.listdir(f"/proc/{broker}/fd")) - before_fds
    admin.close()
    for failure in failures[:3]:
        print(f"{name}: victim: {failure}", file=sys.stderr)
    waits, control_waits = attack.waits(), control.waits()
    return Figures(
        attack=name,
        attaches=len(attack.times),
        control_attaches=len(control.times),
        victim_failures=len(failures),
        p99=attack.p99,
        control_p99=control.p99,
        ratio=attack.p99 / control.p99,
        all_p99=all_burnt.p99,
        all_ratio=attack.p99 / all_burnt.p99,
        attackers_cpu=attack.cpu,
        control_cpu=control.cpu,
        broker_cpu=attack.broker_cpu,
        victim_waits=(waits[0], control_waits[0]),
        broker_waits=(waits[1], control_waits[1]),
        refusals=dict(seen),
        rss_growth=grown,
        descriptors_left=left,
    )


def run(attacks: list[str], seconds: float, attackers: int) -> list[Figures]:
    """A fresh broker for each attack."""
    "".encode("idna")  # what a child imports late it may not be allowed to read
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        images = Images(Path(folder))
        policy = POLICY.format(image=images.vault.sgxs, sigstruct=images.vault.sigstruct)
        for name in attacks:
            with run_broker(policy) as running:
                figures.append(measure(running, name, seconds, attackers))
    return figures


HEADING = (
    "attack      attaches control failed  p99 ms control  ratio    all  ratio  CPU s control broker"
    "  victim waits ms  broker waits ms   MiB  fds  limits met"
)


def row(each: Figures) -> str:
    victim, broker = (
        f"{attack * 1000:7.2f} /{control * 1000:6.2f}"
        for attack, control in (each.victim_waits, each.broker_waits)
    )
    return (
        f"{each.attack:12}{each.attaches:8} {each.control_attaches:7} {each.victim_failures:6}"
        f" {each.p99 * 1000:7.1f} {each.control_p99 * 1000:7.1f} {each.ratio:6.2f}"
        f" {each.all_p99 * 1000:6.1f} {each.all_ratio:6.2f}"
        f" {each.attackers_cpu:6.2f} {each.control_cpu:7.2f} {each.broker_cpu:6.2f}"
        f"  {victim:>15}  {broker:>15}"
        f" {each.rss_growth / (1 << 20):5.1f} {each.descriptors_left:4}  {each.refusals}"
    )


def main(words: list[str] | None = None) -> None:
    attack_figures.main(
        __doc__,
        ATTACKS,
        lambda given: run(given.attack, given.seconds, given.attackers),
        HEADING,
        row,
        seconds=5.0,
        words=words,
    )


if __name__ == "__main__":
    main()
