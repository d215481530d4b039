"""`teemate top`: on the whole screen, in a pipe, and what its numbers are made of."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest
from running_broker import RunningBroker

import teemate
from teemate._looking import Holders, ProcessInfo, SlotInfo, WaitingInfo
from teemate._types import Activity, ClientInfo, GrantInfo
from teemate.top._model import ClientRow, EnclaveRow, Observer, View, select
from teemate.top._text import CLAIMS, lines

StartBroker = Callable[..., RunningBroker]


@pytest.fixture
def subject(broker: StartBroker, policy: str) -> Iterator[teemate.Broker]:
    """A client of a real broker that holds two slots of the vault, and has called."""
    running = broker(policy)
    with ExitStack() as stack:
        client = stack.enter_context(teemate.connect(running.socket, client="subject"))
        enclave = stack.enter_context(client.attach("vault", slots=2))
        with enclave.slot() as slot:
            slot.call("echo", b"x")
        yield client


def run(path: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from teemate.cli.main import main; main()", "top", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "TEEMATE_SOCKET": path, "COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_in_a_pipe_it_prints_once(subject: teemate.Broker) -> None:
    told = run(subject.path, "--interval", "0.5").splitlines()
    assert all(len(line) <= 80 for line in told)
    assert any(line.split()[:2] == ["vault", "ready"] for line in told)
    (row,) = [line.split() for line in told if str(os.getpid()) in line.split()]
    assert row[1] == str(os.geteuid())
    assert "vault" in row
    found = json.loads(run(subject.path, "--interval", "0.5", "--json", "--filter", f"pid {os.getpid()}"))
    (client,) = found["clients"]
    assert (client["name"], client["slots"], client["calls"]) == ("subject", 2, 0.0)
    assert client["held"] > 0
    assert found["enclaves"][0]["calls"] == 0.0


def test_who_is_no_administrator_is_told_so(broker: StartBroker, policy: str) -> None:
    running = broker(policy.replace("[administrators]\nuids", "# uids", 1))
    told = run(running.socket)
    assert "vault" in told
    assert "administrators only" in told


def test_nothing_but_the_full_screen_needs_textual() -> None:
    code = (
        "import sys, teemate.cli.top, teemate.top._model, teemate.top._text; print('textual' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


# ---- on the whole screen ------------------------------------------------------------------------


def on_screen(subject: teemate.Broker, play: Callable[[Any, Any], Awaitable[None]]) -> None:
    """Run the app in 80x24 and let `play` press its keys."""
    app_module = pytest.importorskip("teemate.top._app", reason="textual is not installed")

    async def body() -> None:
        app = app_module.TopApp(subject.path, 0.2)
        async with app.run_test(size=(80, 24)) as pilot:
            await until(pilot, lambda: app.query_one("#clients").row_count)
            await play(app, pilot)

    asyncio.run(body())


async def until(pilot: Any, condition: Callable[[], object]) -> None:
    """Let the app go on until it is so; a test that waits in vain is ended by its runner."""
    while not condition():
        await pilot.pause(0.01)


def column(app: Any, table: str, at: int) -> list[str]:
    found = app.query_one(table)
    return [str(found.get_row_at(row)[at]).strip() for row in range(found.row_count)]


def text(app: Any, widget: str) -> str:
    return str(app.query_one(widget).render())


def test_it_shows_enclaves_and_clients_and_takes_back_what_one_holds_when_asked_twice(
    subject: teemate.Broker,
) -> None:
    async def play(app: Any, pilot: Any) -> None:
        assert sorted(column(app, "#enclaves", 0)) == ["faults", "vault"]
        assert text(app, "#status") == CLAIMS
        # Filter to the one client that holds something, and revoke it: not without a yes.
        await pilot.press("slash", *"vault", "enter")
        await until(pilot, lambda: column(app, "#clients", 2) == [str(os.getpid())])
        await pilot.press("r")
        await until(pilot, lambda: len(app.screen_stack) == 2)
        assert "2 slots of vault" in str(app.screen.query_one("#question").render())
        await pilot.press("n")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert text(app, "#status") == "nothing was done"
        assert subject.enclaves()[0].slots.used == 2
        await pilot.press("r")
        await until(pilot, lambda: len(app.screen_stack) == 2)
        await pilot.press("y")
        await until(pilot, lambda: text(app, "#status").startswith("revoked 1 grants: 2 slots cleared"))

    on_screen(subject, play)


def test_keys_sort_and_drain(subject: teemate.Broker) -> None:
    async def play(app: Any, pilot: Any) -> None:
        assert text(app, "#summary").endswith("clients by calls")
        await pilot.press("s", "s")
        await until(pilot, lambda: text(app, "#summary").endswith("clients by slots"))
        slots = [int(cell) for cell in column(app, "#clients", 5)]
        assert slots == sorted(slots, reverse=True)
        await pilot.press("tab")
        assert app.query_one("#enclaves").has_focus
        chosen = app._chosen("#enclaves")
        await pilot.press("d")
        await until(pilot, lambda: len(app.screen_stack) == 2)
        await pilot.press("escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert chosen in column(app, "#enclaves", 0)
        assert {info.state for info in subject.enclaves()} == {"ready"}

    on_screen(subject, play)


# ---- what the numbers are made of ---------------------------------------------------------------


class FakeBroker:
    """Says what a test wants, so that the clock is the test's."""

    def __init__(self) -> None:
        self.calls, self.inside, self.gate = 0, 0.0, 0
        self.process = ProcessInfo(7, "web", 70, 1000, "/system.slice/web.service")

    def enclaves(self) -> list[Any]:
        slots = SimpleNamespace(total=4, used=2, free=1, withheld=1, quarantined=0, waiting=1)
        vault = SimpleNamespace(
            name="vault", generation=1, state="ready", backend="sim", pages=10, slots=slots, clients=1
        )
        return [vault]

    def clients(self, *, activity: bool) -> list[ClientInfo]:
        assert activity
        grants = (GrantInfo(1, "vault", (2, 3)),)
        told = Activity(12.0, self.calls, self.inside, 1)
        return [ClientInfo(7, "web", 70, 1000, 1000, self.process.cgroup, 1.0, 5, grants, told)]

    def holders(self, name: str, *, calls: bool) -> Holders:
        assert calls
        slot = SlotInfo(2, "assigned", "", 1, self.process, self.gate)
        return Holders((slot,), (WaitingInfo(self.process, 3, 8.5),))


def test_rates_are_what_changed_between_two_looks() -> None:
    broker, now = FakeBroker(), [100.0]
    observer = Observer(cast("teemate.Broker", broker), lambda: now[0])
    first = observer.look()
    assert (first.clients[0].calls, first.enclaves[0].calls) == (None, None)
    now[0], broker.calls, broker.inside, broker.gate = 102.0, 500, 1.5, 600
    second = observer.look()
    row = second.clients[0]
    assert (row.calls, row.inside, row.slots, row.held) == (250.0, 0.75, 2, 12.0)
    assert (row.waiting, row.waited, row.where, row.enclaves) == (3, 8.5, "web.service", "vault")
    assert second.enclaves[0].calls == 300.0
    now[0], broker.calls, broker.inside, broker.gate = 104.0, 3, 0.1, 0  # a new page, another generation
    third = observer.look()
    assert (third.clients[0].calls, third.enclaves[0].calls) == (0.0, 0.0)


def client(number: int, **changes: object) -> ClientRow:
    row = ClientRow(number, "name", 1000, 70 + number, "web", "vault", 1, 0, 0.0, 1.0, None, None)
    return row._replace(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("calls", [2, 3, 1]),
        ("inside", [3, 1, 2]),
        ("slots", [3, 1, 2]),
        ("waiting", [1, 2, 3]),
        ("held", [2, 1, 3]),
        ("uid", [3, 1, 2]),
        ("pid", [3, 2, 1]),
    ],
)
def test_clients_are_sorted_by_what_was_asked(sort: str, expected: list[int]) -> None:
    rows = [
        client(1, waiting=2, pid=30),
        client(2, calls=9.0, held=5.0, pid=20),
        client(3, inside=0.5, slots=4, uid=5, pid=10),
    ]
    assert [row.client for row in select(rows, sort)] == expected


def test_a_filter_finds_names_and_numbers() -> None:
    rows = [client(1), client(2, where="docker-0123", uid=1001), client(3, enclaves="other")]
    assert [row.client for row in select(rows, "pid", "docker")] == [2]
    assert [row.client for row in select(rows, "pid", "uid 1000")] == [1, 3]
    assert [row.client for row in select(rows, "pid", "other")] == [3]
    assert select(rows, "pid", "nothing") == []


def test_the_largest_numbers_fit_and_nothing_that_a_client_says_moves_the_cursor() -> None:
    enclave = EnclaveRow("e" * 64, "quarantined", "sgx", 1 << 22, 4096, 4096, 0, 999, 99, 999, 9999, 5e9)
    rude = client(
        99999, uid=65534, pid=4194304, where="", name="\x1b[2J\x07evil" * 5, enclaves="v" * 64,
        slots=4096, waiting=16, waited=86400.0, held=1e9, calls=9e12, inside=16.0,
    )  # fmt: skip
    told = lines(View((enclave,), (rude,), ""), sort="calls", width=80)
    assert all(len(line) <= 80 for line in told), told
    assert all(line.isprintable() for line in told)
    assert "9000G" in "\n".join(told)
