"""Wardens that hang, crash or lie, and what the broker makes of it."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from backends import BACKEND, NUMBER
from elftools.elf.elffile import ELFFile
from images import BuiltImage, Images
from raw_client import RawClient
from running_broker import RunningBroker
from structlog.testing import CapturingLogger

import teemate
from teemate.broker.enclaves.control import ControlKey, ControlOp, SlotKey, SlotWord
from teemate.broker.enclaves.enclave import Built, build_enclave
from teemate.broker.enclaves.storage import Storage
from teemate.broker.wardens.programs import warden_program
from teemate.broker.wardens.protocol import RenewStep
from teemate.broker.wardens.warden import EnclaveBrokenError, Geometry, Warden, WardenError

FAKE = """#!{python} -IS
# A warden that does what plan.json has for its n-th start: a list of answers, one per request.
import json, os, socket, struct, sys
sock = socket.socket(fileno=3)
folder = {folder!r}
with open(folder + "/starts", "a+") as starts:
    starts.write("x")
    number = starts.tell() - 1
plan = json.load(open(folder + "/plan.json"))
answers = plan[min(number, len(plan) - 1)]
for answer in answers:
    data = sock.recv(8192)
    if not data:
        sys.exit(0)
    version, op, request = struct.unpack_from("<IIQ", data)
    if answer == "hang":
        sock.recv(8192)
        sys.exit(0)
    if answer == "crash":
        os.abort()
    if answer == "killed":
        os.kill(os.getpid(), 9)
    if answer == "short":
        sock.send(b"short")
        continue
    if answer == "other id":
        request += 1
    status, entered, step = [*answer, 0][:3] if isinstance(answer, list) else (0, 1, 4 if op == 6 else 0)
    rest = (0, 0, 0, step, bytes(512), b"told by the fake")
    sock.send(struct.pack("<QiIIIII512s128s", request, status, entered, *rest))
"""


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[Callable[[list[list[object]]], Warden]]:
    """Make a :class:`Warden` whose program follows a plan, see FAKE."""
    wardens: list[Warden] = []

    def make(plan: list[list[object]]) -> Warden:
        program = tmp_path / "fake-warden"
        program.write_text(FAKE.format(python=sys.executable, folder=str(tmp_path)))
        program.chmod(0o755)
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        geometry = Geometry(backend=NUMBER, base=0, size=0, segments=())
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        warden = Warden(
            program, geometry, ControlKey(), (null, null), CapturingLogger(), deadline=20.0, failures=3
        )
        wardens.append(warden)
        return warden

    yield make
    for warden in wardens:
        await warden.close()
        os.close(warden._fds[0])


Fake = Callable[[list[list[object]]], Warden]


async def test_requests_go_one_at_a_time_to_one_warden(fake: Fake) -> None:
    warden = fake([["ok"] * 10])
    async with trio.open_nursery() as nursery:
        for slot in range(2, 8):
            nursery.start_soon(warden.probe, slot)
    assert warden.statistics().started == 1
    assert warden.statistics().requests == 7


async def test_a_warden_for_which_there_is_no_socket_is_a_failure_to_start_and_leaks_nothing(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warden = fake([["ok"] * 5])
    warden._storage = Storage.of(tmp_path, "vault", 1 << 20)

    def refuse(*_: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    gc.collect()  # what tests before this one have left goes now
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socketpair", refuse)
        with pytest.raises(EnclaveBrokenError, match="no socket can be had for it: Too many open files"):
            await warden.start()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_warden_that_cannot_be_watched_at_once_is_kept_all_the_same(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    warden = fake([["ok"] * 5])
    await warden.start()
    pid = warden.statistics().pid
    assert pid is not None
    watched, pidfd_open, refusals = trio.Event(), os.pidfd_open, [errno.EMFILE, errno.ENFILE]

    def refuse_twice(number: int) -> int:
        if refusals:
            code = refusals.pop()
            raise OSError(code, os.strerror(code))
        watched.set()
        return pidfd_open(number)

    monkeypatch.setattr(os, "pidfd_open", refuse_twice)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(warden.keep)
        await watched.wait()
        os.kill(pid, signal.SIGKILL)
    assert warden.statistics().started == 2


async def test_a_warden_is_ended_and_waited_for_when_there_is_no_descriptor_left(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    warden = fake([["ok", "short"], ["ok"] * 5])
    await warden.start()
    pid = warden.statistics().pid
    assert pid is not None

    def refuse(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert (await warden.probe(2)).entered
    assert warden.statistics().killed == 1
    with pytest.raises(ProcessLookupError):  # no zombie either
        os.kill(pid, 0)


@pytest.mark.parametrize("failure", ["crash", "short", "other id"])
async def test_a_warden_that_fails_is_replaced_and_the_request_made_again(fake: Fake, failure: str) -> None:
    warden = fake([["ok", failure], ["ok"] * 5])
    assert (await warden.probe(2)).entered
    statistics = warden.statistics()
    assert (statistics.started, statistics.killed) == (2, 1)


async def test_a_warden_that_hangs_is_killed_at_the_deadline(fake: Fake) -> None:
    warden = fake([["ok", "hang"], ["ok"] * 5])
    assert (await warden.control(ControlOp.CLEAR, 2, generation=1, deadline=1.0)).entered
    assert warden.statistics().killed == 1


async def test_a_request_that_fails_twice_fails_for_its_caller_only(fake: Fake) -> None:
    warden = fake([["ok", "crash"], ["ok", "crash"], ["ok"] * 5])
    with pytest.raises(WardenError, match="failed twice"):
        await warden.probe(2)
    assert (await warden.probe(3)).entered


async def test_wardens_that_others_kill_say_nothing_about_the_request(fake: Fake) -> None:
    warden = fake([["ok", "killed"], ["ok", "killed"], ["ok", "crash"], ["ok", "killed"], ["ok"] * 5])
    assert (await warden.probe(2)).entered
    assert warden.statistics().killed == 4


async def test_who_goes_on_killing_wardens_makes_the_request_fail(fake: Fake) -> None:
    warden = fake([*[["ok", "killed"]] * 8, ["ok"] * 5])
    with pytest.raises(WardenError, match="somebody killed 8 wardens"):
        await warden.probe(2)
    assert (await warden.probe(3)).entered


async def test_an_entry_that_faults_twice_fails_for_its_caller_only(fake: Fake) -> None:
    warden = fake([["ok", [-14, 0], [-14, 0], "ok"]])
    with pytest.raises(WardenError, match="told by the fake"):
        await warden.control(ControlOp.RESET, 2)
    assert (await warden.control(ControlOp.RESET, 3)).entered
    assert warden.statistics().started == 1


KEY = SlotKey(2, b"k" * 16)


async def test_a_renewal_that_a_warden_does_not_survive_is_made_again(fake: Fake) -> None:
    warden = fake([["ok", "crash"], ["ok"] * 5])
    assert (await warden.renew(2, 1, KEY, holder_dead=False)).step is RenewStep.ARM
    assert warden.statistics().killed == 1


async def test_a_renewal_that_two_wardens_do_not_survive_fails_for_its_caller_only(fake: Fake) -> None:
    warden = fake([["ok", "crash"], ["ok", "crash"], ["ok"] * 5])
    with pytest.raises(WardenError, match="RENEW failed twice"):
        await warden.renew(2, 1, KEY, holder_dead=False)
    assert (await warden.renew(3, 1, KEY, holder_dead=False)).step is RenewStep.ARM


@pytest.mark.parametrize("step", [RenewStep.CLEAR, RenewStep.RESET, RenewStep.ARM])
async def test_a_step_of_a_renewal_that_faults_is_tried_twice_and_told(fake: Fake, step: RenewStep) -> None:
    warden = fake([["ok", [-14, 0, step], [-14, 0, step], [-14, 0, step], "ok"]])
    with pytest.raises(WardenError, match=f"{step.name} of slot 2: told by the fake"):
        await warden.renew(2, 1, KEY, holder_dead=False)
    assert (await warden.renew(2, 1, KEY, holder_dead=False)).step is RenewStep.ARM
    assert warden.statistics().started == 1


@pytest.mark.parametrize(
    "answer", [[-16, 0, RenewStep.REPAIR], [0, 1, RenewStep.REPAIR], [-5, 1, RenewStep.RESET]]
)
async def test_what_a_renewal_has_to_tell_is_told_at_once(fake: Fake, answer: list[object]) -> None:
    warden = fake([["ok", answer]])
    reply = await warden.renew(2, 1, KEY, holder_dead=True)
    assert [reply.status, reply.entered, reply.step] == answer
    assert warden.statistics().requests == 2


async def test_a_renewal_that_came_to_no_step_is_told_by_its_own_name(fake: Fake) -> None:
    warden = fake([["ok", [-14, 0, 0], [-14, 0, 0]]])
    with pytest.raises(WardenError, match="RENEW of slot 2: told by the fake"):
        await warden.renew(2, 1, KEY, holder_dead=False)


async def test_whether_there_is_a_hurry_is_asked_for_each_attempt_when_it_is_its_turn(fake: Fake) -> None:
    warden = fake([["ok", "crash"], ["ok"] * 5])
    await warden.start()
    asked = 0

    def hurry() -> bool:
        nonlocal asked
        asked += 1
        return False

    async def renew() -> None:
        await warden.renew(2, 1, KEY, holder_dead=False, hurry=hurry)

    async with trio.open_nursery() as nursery:
        async with warden._lock:
            nursery.start_soon(renew)
            await trio.testing.wait_all_tasks_blocked()
            assert not asked
    assert asked == 2
    await warden.control(ControlOp.ARM, 2, generation=2, key=KEY.key, argument=hurry)
    assert asked == 3


@pytest.mark.parametrize("step", [0, 9])
async def test_a_renewal_that_ends_with_no_step_of_its_own_is_nonsense(fake: Fake, step: int) -> None:
    warden = fake([["ok", [0, 1, step]], ["ok", [0, 1, step]]])
    with pytest.raises(WardenError, match="RENEW failed twice"):
        await warden.renew(2, 1, KEY, holder_dead=False)


async def test_an_enclave_without_a_warden_that_starts_is_broken_after_so_many_failures(fake: Fake) -> None:
    warden = fake([["crash"]])
    with pytest.raises(EnclaveBrokenError, match="3 times in a row"):
        await warden.start()
    assert warden.statistics().killed == 3


async def test_a_start_that_works_forgives_those_that_did_not(fake: Fake) -> None:
    warden = fake([["crash"], ["crash"], ["ok", "crash"], ["crash"], ["crash"], ["ok", "ok"]])
    assert (await warden.probe(2)).entered
    assert warden.statistics().started == 6


async def test_a_closed_warden_answers_nobody(fake: Fake) -> None:
    warden = fake([["ok"] * 5])
    await warden.probe(2)
    pid = warden.statistics().pid
    await warden.close()
    with pytest.raises(WardenError, match="destroyed"):
        await warden.probe(2)
    with pytest.raises(ChildProcessError):
        os.waitpid(pid or 0, 0)  # noqa: ASYNC222 - there is nothing to wait for


async def test_a_program_that_is_not_there_is_a_failure_to_start(fake: Fake, tmp_path: Path) -> None:
    warden = fake([])
    (tmp_path / "fake-warden").unlink()
    with pytest.raises(EnclaveBrokenError, match="No such file"):
        await warden.start()


# ---- the real one ------------------------------------------------------------------------


TM_E_OWNERDEAD = -9


class Faulty:
    """The faults enclave with a real warden."""

    def __init__(self, image: BuiltImage) -> None:
        with image.sgxs.open("rb") as file:
            self.built: Built = build_enclave(
                file.fileno(), image.sigstruct.read_bytes(), backend=BACKEND, base=0, debug=False
            )
        self.log = CapturingLogger()
        geometry = Geometry(
            backend=NUMBER, base=self.built.base, size=self.built.size, segments=self.built.segments
        )
        self.key = ControlKey()
        self.warden = Warden(
            warden_program(), geometry, self.key, (self.built.fd, self.built.arena), self.log,
            deadline=20.0, failures=3,
        )  # fmt: skip

    async def lock(self) -> int:
        """Take and leave the lock that some control ECALLs die with."""
        reply = await self.warden.control(ControlOp.AUTHOR, data=b"lock".ljust(64, b"\0"))
        return reply.status

    async def author(self, name: str, data: bytes = b"", deadline: float | None = None) -> bytes:
        """A control ECALL of the image's author."""
        reply = await self.warden.control(
            ControlOp.AUTHOR, data=name.encode().ljust(64, b"\0") + data, deadline=deadline
        )
        assert reply.status == 0, reply
        return reply.result.data[: reply.result.length]


@contextlib.asynccontextmanager
async def faulty(images: Images) -> AsyncIterator[Faulty]:
    enclave = Faulty(images.faults)
    try:
        yield enclave
    finally:
        await enclave.warden.close()
        os.close(enclave.built.fd)
        os.close(enclave.built.arena)


async def test_a_hundred_hanging_control_ecalls_in_a_row_leave_the_enclave_usable(images: Images) -> None:
    async with faulty(images) as enclave:
        for n in range(50):  # each is tried twice
            with pytest.raises(WardenError, match="failed twice"):
                await enclave.author("hang_locked" if n % 2 else "hang", deadline=0.01)
        assert enclave.warden.statistics().killed == 100
        assert (await enclave.author("echo", b"still here")).startswith(b"still here")
        assert await enclave.lock() == TM_E_OWNERDEAD
        assert await enclave.lock() == 0
        reply = await enclave.warden.control(ControlOp.ARM, 2, generation=1, key=b"k" * 16)
        assert reply.status == 0
        assert (await enclave.warden.probe(2)).result.cssa == 0


async def test_a_hundred_crashing_control_ecalls_in_a_row_leave_the_enclave_usable(images: Images) -> None:
    async with faulty(images) as enclave:
        for _ in range(50):
            with pytest.raises(WardenError):
                await enclave.author("crash")
        assert await enclave.lock() == 0
        assert (await enclave.warden.probe(2)).result.cssa == 0


async def test_arm_clear_probe_and_reset_bring_a_slot_through_its_life(images: Images) -> None:
    async with faulty(images) as enclave:
        ask = enclave.warden.control
        for generation in (1, 2):
            key = enclave.key.new_slot_key(generation)
            assert (await ask(ControlOp.ARM, 3, generation=generation, key=key.key)).status == 0
            assert SlotWord.of((await enclave.warden.probe(3)).result.word) is SlotWord.ARMED
            assert (await ask(ControlOp.RESET, 3)).status < 0, "an armed slot is not reset"
            assert (await ask(ControlOp.CLEAR, 3, generation=generation + 1)).status < 0
            for _ in range(2):  # again is the same as once
                assert (await ask(ControlOp.CLEAR, 3, generation=generation)).status == 0
                assert (await ask(ControlOp.RESET, 3)).status == 0
            assert (await ask(ControlOp.ARM, 3, generation=generation, key=key.key)).status < 0


async def test_the_holder_of_the_control_key_alone_can_start_a_warden(images: Images) -> None:
    async with faulty(images) as enclave:
        await enclave.warden.start()
        thief = Warden(
            warden_program(), enclave.warden._geometry, ControlKey(), enclave.warden._fds, CapturingLogger(),
            deadline=20.0, failures=1,
        )  # fmt: skip
        with pytest.raises(EnclaveBrokenError):
            await thief.start()
        await thief.close()
        assert await enclave.lock() == 0


def faults_policy(images: Images, deadline: float) -> str:
    return f"""
[broker]
warden_deadline = {deadline}
[administrators]
uids = [0]
[[enclave]]
name = "faults"
image = "{images.faults.sgxs}"
sigstruct = "{images.faults.sigstruct}"
[[enclave.attach]]
uid = 0
"""


def test_a_warden_that_is_killed_is_replaced_when_it_is_needed(
    broker: Callable[..., RunningBroker], images: Images, connect: Callable[..., RawClient]
) -> None:
    running = broker(faults_policy(images, 20))
    client = connect(running)
    ok = client.ok("attach", enclave="faults", slots=2)
    (enclave,) = client.ok("stats")["stats"]["enclaves"]
    os.kill(enclave["warden"]["pid"], 9)
    client.ok("detach", grant=ok["grant"], clean=True)
    total = enclave["slots"]["total"]
    client.ok("attach", enclave="faults", slots=total, wait=20)
    (after,) = client.ok("stats")["stats"]["enclaves"]
    assert after["warden"]["started"] == 2
    assert after["warden"]["pid"] != enclave["warden"]["pid"]
    assert [record["request"] for record in running.log() if record["event"] == "warden killed"]


def address_of(image: BuiltImage, symbol: str) -> int:
    """Offset of a variable of the image from its base."""
    with image.elf.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        (found,) = table.get_symbol_by_name(symbol)
        return int(found["st_value"])


def test_a_reset_that_hangs_costs_its_slot_and_nobody_else_anything(
    broker: Callable[..., RunningBroker], images: Images, connect: Callable[..., RawClient]
) -> None:
    running = broker(faults_policy(images, 0.5))
    admin = connect(running)
    offset = address_of(images.faults, "reset_hangs")
    while admin.ok("stats")["stats"]["enclaves"][0]["slots"]["arming"]:  # they would hang as well
        admin.ok("ping")
    with teemate.connect(running.socket) as mine, mine.attach("faults", slots=1) as enclave:
        with enclave.slot() as slot:
            slot.call("poke", struct.pack("<QQ", enclave.base + offset, 1))
            other = connect(running)
            other.ok("detach", grant=other.ok("attach", enclave="faults")["grant"], clean=True)
            # That slot hangs the warden in its reset, twice.
            while not quarantined(admin):
                admin.ok("ping")
            assert slot.call("echo", b"I noticed nothing") == b"I noticed nothing"
            slot.call("poke", struct.pack("<QQ", enclave.base + offset, 0))
    total = admin.ok("enclaves")["enclaves"][0]["slots"]["total"]
    admin.ok("attach", enclave="faults", slots=total - 1, wait=20)
    assert quarantined(admin) == 1
    reasons = [record["reason"] for record in running.log() if record["event"] == "slot quarantined"]
    assert len(reasons) == 1
    assert "failed twice" in str(reasons[0])


def quarantined(admin: RawClient) -> int:
    count: int = admin.ok("enclaves")["enclaves"][0]["slots"]["quarantined"]
    return count
