"""Places are counted over all workers of a gateway, and a worker that dies holds none."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import DEADLINE, wait_until
from running_functions import free_slots, run_functions
from running_gateway import RunningGateway, run_gateway
from test_gateway_processes import Asking, alone, hold, let_go

import teemate
from teemate.functions import Functions
from teemate.functions._trio import AsyncFunctions
from teemate.gateway.places import FunctionBusyError, Places, QueueFullError, create
from teemate.gateway.settings import Settings

needs_hypercorn = pytest.mark.skipif(
    importlib.util.find_spec("hypercorn") is None, reason="needs hypercorn: pip install 'teemate[gateway]'"
)
WORKERS, COUNT = 3, 5


@pytest.fixture
def workers() -> Iterator[list[Places]]:
    fd = create(WORKERS, COUNT)
    all_of_them = [
        Places(fd, workers=WORKERS, count=COUNT, own=1, number=number) for number in range(WORKERS)
    ]
    for worker in all_of_them:
        worker.accepts(True)
    yield all_of_them
    os.close(fd)


def test_there_are_so_many_places_whoever_takes_them(workers: list[Places]) -> None:
    taken = [(worker, worker.take("f", COUNT)) for worker in (*workers, *workers[:2])]
    for worker in workers:
        with pytest.raises(QueueFullError):
            worker.take("g", COUNT)
    assert workers[0].taken() == COUNT
    worker, place = taken[1]
    worker.give(place)
    workers[2].take("g", COUNT)
    assert workers[0].taken() == COUNT


def test_one_worker_can_have_all_places(workers: list[Places]) -> None:
    for _ in range(COUNT):
        workers[1].take("f", 2 * COUNT)
    with pytest.raises(QueueFullError):
        workers[1].take("f", 2 * COUNT)


def test_what_waits_for_one_worker_keeps_nobody_from_another_ones_slots(workers: list[Places]) -> None:
    for _ in range(COUNT):
        workers[1].take("f", 2 * COUNT)
    place = workers[0].take("f", 2 * COUNT)
    with pytest.raises(QueueFullError):
        workers[0].take("f", 2 * COUNT)
    workers[0].give(place)
    workers[0].take("f", 2 * COUNT)


def test_a_worker_sees_where_there_is_room(workers: list[Places]) -> None:
    one, other, third = workers
    assert (one.full(), one.others_have_room()) == (False, True)
    one.arrived(1)
    other.take("f", COUNT)
    assert (one.full(), one.others_have_room()) == (True, True)
    third.arrived(1)
    assert (one.full(), one.others_have_room()) == (True, False)
    third.arrived(-1)
    one.arrived(-1)
    assert (one.full(), other.others_have_room()) == (False, True)


def test_a_worker_that_accepts_nothing_has_no_room(workers: list[Places]) -> None:
    one, other, third = workers
    other.accepts(False)
    assert one.others_have_room()
    one.clear(2)  # it has died
    assert not one.others_have_room()
    third.accepts(True)
    assert one.others_have_room()


def test_a_function_has_so_many_over_all_workers(workers: list[Places]) -> None:
    workers[0].take("f", 2)
    place = workers[1].take("f", 2)
    with pytest.raises(FunctionBusyError):
        workers[2].take("f", 2)
    workers[2].take("g", 2)
    workers[1].give(place)
    workers[2].take("f", 2)


def test_what_a_worker_held_that_is_gone_is_free_again(workers: list[Places]) -> None:
    for worker in workers:
        worker.take("f", COUNT)
    workers[0].clear(1)
    assert workers[2].taken() == 2


def _take_and_give(fd: int, number: int, times: int) -> None:
    places = Places(fd, workers=2, count=1, own=0, number=number)
    had = 0
    while had < times:
        try:
            place = places.take("f", 1)
        except (FunctionBusyError, QueueFullError):
            continue
        had += 1
        try:
            # Alone: nobody else has it as long as we do.
            holder = os.pread(fd, 1, 4096)
            assert holder == b"\0", holder
            os.pwrite(fd, bytes([number + 1]), 4096)
            assert os.pread(fd, 1, 4096) == bytes([number + 1])
            os.pwrite(fd, b"\0", 4096)
        finally:  # the other would wait for it for ever
            places.give(place)


def test_two_never_have_the_last_place() -> None:
    fd = create(2, 1)
    os.ftruncate(fd, 8192)
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_take_and_give, args=(fd, number, 500)) for number in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(DEADLINE)
        process.kill()
        process.join()
    os.close(fd)
    assert [process.exitcode for process in both] == [0, 0]


@needs_hypercorn
def test_places_that_a_killed_worker_held_are_taken_by_others(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with run_gateway("--workers", "2", "--slots", "2", "--queue", "0") as gateway:
        victim, other = gateway.workers()
        asked = [hold(gateway, tmp_path, pid) for pid in (victim, victim, other, other)]
        refused = gateway.request("POST", "/fn/echo", b"x")
        assert (refused.status, refused.json()["code"]) == (503, "busy")
        os.kill(victim, signal.SIGKILL)
        (fresh,) = set(gateway.wait_for_workers(2, other_than=victim)) - {other}
        with alone(gateway, fresh):  # the other one's slots are taken: there it would wait
            assert gateway.request("POST", "/fn/echo", b"x").body == b"x"
        with let_go(tmp_path):
            finish(asked)


def finish(asked: list[Asking]) -> None:
    for one in asked:
        one.join()


@needs_hypercorn
def test_slots_that_are_not_needed_go_back_and_come_again() -> None:
    with run_functions() as running, teemate.connect(running.socket) as broker:
        broker.functions.deploy("empty", EMPTY)
        free = free_slots(running)[0]
        with run_gateway("--workers", "1", "--slots", "2", "--idle", "0.2", broker=running.socket) as gateway:
            for _ in range(2):
                assert invoke(gateway) == 200
                wait_until(lambda: free_slots(running)[0] == free, "its slot is free again")


EMPTY = bytes.fromhex(
    "0061736d01000000010401600000030201000503010001071302066d656d6f72790200065f737461727400000a040102000b"
)


def invoke(gateway: RunningGateway) -> int:
    return gateway.request("POST", "/fn/empty").status


def test_a_program_gives_back_what_its_calls_no_longer_need() -> None:
    with run_functions() as running, teemate.connect(running.socket) as broker:
        functions = broker.functions
        functions.deploy("empty", EMPTY)
        before = free_slots(running)[0]
        assert functions.give_back(60.0) == 0  # it was needed a moment ago
        assert functions.give_back(0.0) == 1
        wait_until(lambda: free_slots(running)[0] == before + 1, "its slot is free again")
        assert functions.invoke("empty") == b""
        wait_until(lambda: free_slots(running)[0] == before, "it has one again")


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_call_has_its_result_wherever_the_broker_is(number: int) -> None:
    with run_functions(expect_errors=True) as running, teemate.connect(running.socket) as broker:
        functions = broker.functions
        functions.deploy("empty", EMPTY)
        functions.idle = 0.0  # from now on a call gives its slot back at once
        os.kill(running.pid, number)
        try:
            assert functions.invoke("empty") == b""
        finally:
            if number == signal.SIGSTOP:
                os.kill(running.pid, signal.SIGCONT)
        if number == signal.SIGSTOP:
            wait_until(lambda: free_slots(running)[0] == free_slots(running)[1], "the slot is free again")


def test_calls_give_nothing_back_where_somebody_else_sees_to_it() -> None:
    with run_functions() as running, teemate.connect(running.socket) as broker:
        functions = broker.functions
        functions.deploy("empty", EMPTY)
        with_one = free_slots(running)[0]
        functions.idle = None
        functions.invoke("empty")
        assert free_slots(running)[0] == with_one
        functions.idle = 0.0
        functions.invoke("empty")
        wait_until(lambda: free_slots(running)[0] == with_one + 1, "its slot is free again")


@needs_hypercorn
async def test_a_gateways_calls_leave_that_to_its_timer() -> None:
    from teemate.gateway.worker import open_functions

    with run_functions() as running:
        async with open_functions(Settings(broker=running.socket, idle=100.0)) as (functions, _):
            assert isinstance(functions, AsyncFunctions)
            assert functions.sync.idle is None


def test_slots_that_somebody_attached_stay_his() -> None:
    with (
        run_functions() as running,
        teemate.connect(running.socket) as broker,
        broker.attach("functions", slots=2) as mine,
    ):
        functions = Functions.of(mine)
        functions.list()
        assert functions.give_back(0.0) == 0
        assert mine.statistics().slots == 2


@needs_hypercorn
@pytest.mark.parametrize("head_start", ["600", "0"])
def test_who_has_no_slot_free_leaves_a_connection_to_who_has(
    tmp_path: Path, head_start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is where it does not: a request waits there beside a worker that does nothing."""
    monkeypatch.setenv("HEAD_START", head_start)
    os.mkfifo(tmp_path / "fifo")
    with run_gateway("--workers", "2", "--slots", "1", "--queue", "1") as gateway:
        full, free = gateway.workers()
        held = hold(gateway, tmp_path, full)
        with alone(gateway, full):
            asked = Asking(gateway, f"/fn/hold?arg={tmp_path}")
            if head_start == "0":
                wait_until(lambda: gateway.request("GET", "/healthz").json()["waiting"], "it waits there")
        if head_start != "0":
            wait_until(lambda: len(runs_at(tmp_path)) == 2, "it runs")
            assert set(runs_at(tmp_path)) == {full, free}
        with let_go(tmp_path):
            finish([held, asked])
        assert asked.reply == str(full if head_start == "0" else free).encode()


@needs_hypercorn
def test_as_many_as_there_are_slots_run_at_once_whoever_accepts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEAD_START", "600")
    os.mkfifo(tmp_path / "fifo")
    with run_gateway("--workers", "2", "--slots", "2", "--queue", "0") as gateway:
        asked = [Asking(gateway, f"/fn/hold?arg={tmp_path}") for _ in range(4)]
        wait_until(lambda: len(runs_at(tmp_path)) == 4, "all run")
        assert sorted(runs_at(tmp_path)) == sorted(2 * gateway.workers())
        with let_go(tmp_path):
            finish(asked)


@needs_hypercorn
def test_who_has_no_slot_free_leaves_nothing_to_a_worker_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_ready = tmp_path / "not ready"
    monkeypatch.setenv("HEAD_START", "6000")
    monkeypatch.setenv("NOT_READY", str(not_ready))
    held = tmp_path / "held"
    held.mkdir()
    os.mkfifo(held / "fifo")
    with run_gateway("--workers", "2", "--slots", "1", "--queue", "8", "--timeout", "60") as gateway:
        full, victim = gateway.workers()
        asked = hold(gateway, held, full)
        not_ready.touch()
        try:
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: gateway.log("worker ended"), "it has died")
            for _ in range(3):
                assert gateway.request("GET", "/healthz").json()["running"] == 1
        finally:
            not_ready.unlink()
        gateway.wait_for_workers(2, other_than=victim)
        with let_go(held):
            finish([asked])


def runs_at(folder: Path) -> list[int]:
    """The pids of workers at which ``hold`` runs or has run."""
    return [int(path.name.partition(".")[0]) for path in folder.iterdir() if path.name != "fifo"]
