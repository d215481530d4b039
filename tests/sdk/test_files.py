"""The mailboxes between slots and the warden's I/O thread, whose part this test plays entry by entry."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from files_image import CREATE, EBADF, EIO, ENOSYS, ESTALE, MOST, build_files_image, order
from gate import (
    ARGUMENT,
    CLEAR,
    ECALL,
    EEXIT,
    EXIT_DONE,
    EXIT_OCALL,
    OCALL_RETURN,
    OK,
    REINIT,
    RESET,
    UNWIND,
    Call,
    Gate,
    Holder,
    Left,
    address,
)
from images import BuiltImage, Images

from teemate._native import ffi

IO = 18
STORAGE = 12
NONE, WARDEN = 0, 1
OPEN, READ, WRITE, SYNC, SIZE, TRUNCATE, DELETE = range(1, 8)
FLAG_CREATE, FLAG_AGAIN = 1, 2
WAIT, WAKE = 1, 2
ARENA_WORDS = 1024
IO_SLOT, FIRST = 2, 3

_STEP = struct.Struct("<QqQIIIIIIQQ64s")


@dataclass(frozen=True)
class Step:
    """struct tm_io_step as it came out."""

    ticket: int
    wake: int
    idle: int
    op: int
    flags: int
    offset: int
    length: int
    name: str
    data: bytes


class Thread:
    """The warden's I/O thread."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.room = ffi.new("uint8_t[]", MOST)

    def enter(
        self,
        ticket: int = 0,
        result: int = 0,
        *,
        data: int | None = None,
        slot: int = IO_SLOT,
        begins: int = 0,
    ) -> Left:
        self.raw = ffi.new(
            "uint8_t[]",
            _STEP.pack(
                ticket,
                result,
                address(self.room) if data is None else data,
                0,
                0,
                0,
                begins,
                0,
                0,
                0,
                0,
                b"",
            ),
        )
        return self.gate.enter(slot, self.gate.key, IO, address(self.raw))

    def step(self, ticket: int = 0, result: int = 0, data: bytes = b"", *, begins: int = 0) -> Step:
        """Answer one request and take the next."""
        ffi.memmove(self.room, data, len(data))
        left = self.enter(ticket, result, begins=begins)
        assert (left.function, left.rdi, left.status) == (EEXIT, EXIT_DONE, OK), left
        ticket, _, _, wake, idle, _, _, op, flags, offset, length, name = _STEP.unpack(
            bytes(ffi.buffer(self.raw, _STEP.size))
        )
        written = bytes(ffi.buffer(self.room, length)) if op == WRITE else b""
        return Step(ticket, wake, idle, op, flags, offset, length, name.rstrip(b"\0").decode(), written)


class Asking:
    """One ECALL of a holder, who comes out to wake and to wait."""

    def __init__(self, holder: Holder, name: str, payload: bytes) -> None:
        self._holder = holder
        self._call = Call(name.encode(), payload, MOST + 64)
        self._left = holder.start(self._call)
        self.woke = self._go_on(WAKE)

    def _go_on(self, kind: int) -> bool:
        """Return from the OCALL that it came out for, if it is that one."""
        if self._left.rdi != EXIT_OCALL or self._left.status != kind:
            return False
        self._left = self._holder.gate.enter(
            self._holder.slot, self._holder.key, OCALL_RETURN, self._left.nonce
        )
        return True

    @property
    def waits(self) -> bool:
        return self._left.rdi == EXIT_OCALL and self._left.status == WAIT

    def look_again(self) -> None:
        """Its 100 ms are over, or it was woken."""
        assert self._go_on(WAIT)
        self._go_on(WAKE)

    def answer(self) -> tuple[int, bytes]:
        """Let it find its answer."""
        if self.waits:
            self.look_again()
        assert self._left.rdi == EXIT_DONE, self._left
        assert self._left.status == OK
        output = self._call.output(self._left.length)
        return int.from_bytes(output[:8], "little", signed=True), output[8:]


@pytest.fixture
def gate(files_image: BuiltImage) -> Iterator[Gate]:
    with Gate(files_image) as gate:
        assert gate.control(STORAGE, argument=WARDEN).status == OK
        yield gate


@pytest.fixture
def thread(gate: Gate) -> Thread:
    return Thread(gate)


@pytest.fixture
def holder(gate: Gate) -> Holder:
    return gate.assign(FIRST)


def end(gate: Gate, holder: Holder) -> None:
    """Its holder was killed outside: the slot is taken back as the broker does it."""
    assert gate.control(CLEAR, holder.slot, generation=holder.generation).status == OK
    assert gate.enter(holder.slot, gate.key, UNWIND, holder.generation).landed
    assert gate.control(RESET, holder.slot).status == OK


def opened(thread: Thread, holder: Holder, name: str = "a") -> None:
    """Give the holder a handle, which is number 0."""
    asking = Asking(holder, "open", order(flags=CREATE, data=name.encode()))
    taken = thread.step()
    assert thread.step(taken.ticket, 0).ticket == 0
    assert asking.answer() == (0, b"")


# ---- a request and its answer --------------------------------------------------------------


def test_a_request_is_whole_in_itself_and_its_answer_wakes_who_waits(thread: Thread, holder: Holder) -> None:
    opened(thread, holder, "a.db-wal")
    write = Asking(holder, "write", order(offset=4096, data=b"sealed"))
    assert write.waits
    taken = thread.step()
    assert (taken.op, taken.name, taken.offset, taken.data) == (WRITE, "a.db-wal", 4096, b"sealed")
    after = thread.step(taken.ticket, 6)
    assert after.ticket == 0
    assert after.wake < ARENA_WORDS
    assert write.answer() == (6, b"")
    read = Asking(holder, "read", order(offset=4096, length=100))
    taken = thread.step()
    assert (taken.op, taken.length, taken.data) == (READ, 100, b"")
    thread.step(taken.ticket, 6, b"SEALED")
    assert read.answer() == (6, b"SEALED")


def test_who_posts_wakes_the_thread_when_it_sleeps_and_only_then(thread: Thread, holder: Holder) -> None:
    busy = Asking(holder, "open", order(flags=CREATE, data=b"a"))
    assert not busy.woke  # it has not been here yet, and looks before it sleeps
    taken = thread.step()
    assert taken.ticket
    assert thread.step(taken.ticket, 0).idle < ARENA_WORDS
    assert busy.answer()[0] == 0
    assert Asking(holder, "size", order()).woke


def test_requests_of_several_slots_are_taken_by_turns(gate: Gate, thread: Thread) -> None:
    holders = [gate.assign(FIRST + n) for n in range(4)]
    asked = [Asking(h, "open", order(flags=CREATE, data=f"f{n}".encode())) for n, h in enumerate(holders)]
    names, taken = [], thread.step()
    while taken.ticket:
        names.append(taken.name)
        if taken.name == "f1":
            again = Asking(
                holders[0], "delete", order(data=b"f0")
            )  # who was served has to wait for the others
        taken = thread.step(taken.ticket, 0)
        if names[-1] == "f0" and len(names) == 1:
            assert asked[0].answer()[0] == 0
    assert names == ["f0", "f1", "f2", "f3", "f0"]
    assert [a.answer()[0] for a in [*asked[1:], again]] == [0] * 4


# ---- the host lies -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "payload", "result", "expected"),
    [
        ("read", order(length=10), 11, -EIO),
        ("read", order(length=10), -5000, -EIO),
        ("read", order(length=10), -(1 << 63), -EIO),
        ("write", order(data=b"four"), 3, -EIO),
        ("write", order(data=b"four"), 5, -EIO),
        ("sync", order(), 7, 0),
        ("size", order(), (1 << 63) - 1, (1 << 63) - 1),
    ],
)
def test_what_cannot_be_is_an_error(
    thread: Thread, holder: Holder, name: str, payload: bytes, result: int, expected: int
) -> None:
    opened(thread, holder)
    asking = Asking(holder, name, payload)
    thread.step(thread.step().ticket, result, b"x" * 64)
    assert asking.answer() == (expected, b"")


def test_answers_to_what_was_not_asked_change_nothing(gate: Gate, thread: Thread, holder: Holder) -> None:
    opened(thread, holder)
    asking = Asking(holder, "size", order())
    taken = thread.step()
    for wrong in (
        1 << 16,
        (1 << 64) - 1,
        taken.ticket + (1 << 16),
        taken.ticket - (1 << 16),
        FIRST + 1,
        IO_SLOT,
        0xFFFF,
    ):
        assert thread.step(wrong, 1).wake == ARENA_WORDS
    assert asking.waits
    asking.look_again()
    assert asking.waits
    thread.step(taken.ticket, 5)
    assert asking.answer()[0] == 5
    assert thread.step(taken.ticket, 6).wake == ARENA_WORDS  # it has its answer


def test_the_thread_is_let_in_with_the_control_key_through_its_own_slot_alone(
    gate: Gate, thread: Thread, holder: Holder
) -> None:
    assert gate.enter(IO_SLOT, holder.key, IO, address(thread.room)).landed
    for slot in (0, 1, FIRST, FIRST + 1):
        assert thread.enter(slot=slot).landed
    inside = thread.enter(data=gate.base + 4096)
    across = thread.enter(data=gate.base - MOST + 1)
    assert (inside.status, across.status) == (ARGUMENT, ARGUMENT)
    left = gate.enter(IO_SLOT, gate.key, IO, gate.base + 8192)
    assert left.status == ARGUMENT
    assert gate.enter(IO_SLOT, gate.key, ECALL, address(thread.room)).landed


# ---- deaths -------------------------------------------------------------------------------------


def test_what_a_dead_warden_took_is_taken_again_before_anything_else(gate: Gate, thread: Thread) -> None:
    holders = [gate.assign(FIRST + n) for n in range(3)]
    for n, holder in enumerate(holders):
        opened(thread, holder, f"f{n}")
    second = Asking(holders[1], "write", order(data=b"second"))
    taken = thread.step()
    first, third = (Asking(holders[n], "write", order(data=b"other")) for n in (0, 2))
    assert gate.control(REINIT, IO_SLOT).status == OK
    again = thread.step()
    assert (again.ticket, again.name, again.data) == (taken.ticket, "f1", b"second")
    assert again.flags == FLAG_AGAIN
    others = [following := thread.step(again.ticket, 6)]
    others.append(thread.step(following.ticket, 5))
    assert [other.flags for other in others] == [0, 0]
    thread.step(others[1].ticket, 5)
    assert [a.answer()[0] for a in (first, second, third)] == [5, 6, 5]


def test_what_a_dying_warden_takes_after_its_successors_start_is_taken_again(
    gate: Gate, thread: Thread, holder: Holder
) -> None:
    opened(thread, holder)
    write = Asking(holder, "write", order(data=b"late"))
    assert gate.control(REINIT, IO_SLOT).status == OK
    late = thread.step()
    assert late.ticket
    again = Thread(gate).step(begins=1)
    assert (again.ticket, again.flags) == (late.ticket, FLAG_AGAIN)
    thread.step(again.ticket, 4)
    assert write.answer() == (4, b"")
    assert thread.enter(begins=2).status == ARGUMENT


def test_a_warden_that_takes_nothing_back_leaves_its_clients_waiting(images: Images, tmp_path: Path) -> None:
    """The test above can fail: in this build REINIT leaves what was taken as it is."""
    with Gate(build_files_image(images, tmp_path, test_build="retake")) as gate:
        assert gate.control(STORAGE, argument=WARDEN).status == OK
        thread, holder = Thread(gate), gate.assign(FIRST)
        asking = Asking(holder, "open", order(flags=CREATE, data=b"a"))
        assert thread.step().ticket
        assert gate.control(REINIT, IO_SLOT).status == OK
        assert not thread.step().ticket
        asking.look_again()
        assert asking.waits


def test_what_a_dead_client_had_posted_is_never_done(gate: Gate, thread: Thread, holder: Holder) -> None:
    opened(thread, holder)
    assert Asking(holder, "write", order(data=b"dead")).waits
    end(gate, holder)
    assert thread.step().ticket == 0


@pytest.mark.parametrize("warden_dies", [False, True], ids=["done", "warden dies too"])
def test_the_next_holder_of_a_slot_waits_for_what_the_dead_one_has_under_way(
    gate: Gate, thread: Thread, holder: Holder, warden_dies: bool
) -> None:
    opened(thread, holder)
    assert Asking(holder, "write", order(data=b"dead")).waits
    taken = thread.step()
    end(gate, holder)
    next_holder = gate.assign(FIRST, 2)
    asking = Asking(next_holder, "open", order(flags=CREATE, data=b"mine"))
    assert asking.waits
    asking.look_again()
    assert asking.waits
    assert thread.step().ticket == 0  # it has posted nothing yet: the data is still the thread's
    if warden_dies:
        assert gate.control(REINIT, IO_SLOT).status == OK
        assert thread.step().ticket == 0  # half done or not, nobody asks for it any more
    else:
        assert thread.step(taken.ticket, 4).wake < ARENA_WORDS
    asking.look_again()
    mine = thread.step()
    assert (mine.name, mine.op, mine.flags) == ("mine", OPEN, FLAG_CREATE)
    thread.step(mine.ticket, 0)
    assert asking.answer() == (0, b"")


def test_handles_end_with_their_holder(gate: Gate, thread: Thread, holder: Holder) -> None:
    opened(thread, holder)
    end(gate, holder)
    next_holder = gate.assign(FIRST, 2)
    assert Asking(next_holder, "size", order()).answer()[0] == -EBADF


# ---- who has storage ------------------------------------------------------------------------------


def test_an_enclave_without_storage_says_so_and_one_that_lost_it_too(files_image: BuiltImage) -> None:
    with Gate(files_image) as gate:
        holder, thread = gate.assign(FIRST), Thread(gate)
        payload = order(flags=CREATE, data=b"a")
        assert Asking(holder, "open", payload).answer()[0] == -ENOSYS
        assert gate.control(STORAGE, argument=NONE).status == OK
        assert Asking(holder, "open", payload).answer()[0] == -ENOSYS
        assert gate.control(STORAGE, argument=WARDEN).status == OK
        posted = Asking(holder, "open", payload)
        taken = thread.step()
        waiting = gate.assign(FIRST + 1)
        late = Asking(waiting, "open", payload)
        # Its next warden has no storage: what was taken is given back, and nobody will do it.
        assert gate.control(REINIT, IO_SLOT).status == OK
        assert gate.control(STORAGE, argument=NONE).status == OK
        assert taken.ticket
        assert [posted.answer()[0], late.answer()[0]] == [-ESTALE, -ESTALE]
        assert Asking(holder, "open", payload).answer()[0] == -ESTALE
        assert gate.control(STORAGE, argument=3).status == ARGUMENT
