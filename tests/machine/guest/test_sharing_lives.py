"""How long an enclave of the driver lives, and what becomes of its sharers: fork, death, descriptors."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Iterator

import pytest
from images import BuiltImage, Images
from sharing import (
    DEVICE,
    PAGE,
    PROT_READ,
    PROT_WRITE,
    Operation,
    Raw,
    Stranger,
    keep_mapped,
    maps,
    word_in_memory,
)

import teemate
from teemate.image import SigParams

pytestmark = pytest.mark.skipif(
    not DEVICE.exists(), reason=f"no {DEVICE} here: tests/machine/run boots a machine that has it"
)

RW = PROT_READ | PROT_WRITE
SPINS = 10_000_000


@pytest.fixture
def image(images: Images) -> BuiltImage:
    """May be made as a debug enclave: then tests can read the state of its TCSs."""
    return images.build("raw", heap="64K", sign=SigParams(debug_allowed=True))


@pytest.fixture
def raw(image: BuiltImage) -> Iterator[Raw]:
    with Raw.create(image) as raw:
        yield raw.map()


def heap_word(raw: Raw) -> int:
    part = raw.geometry.part(RW)
    return raw.geometry.base + part.offset + part.size - 8


def in_child(body: object) -> int:
    """Run `body` in a child of fork(); its exit status is what `body` returns."""
    assert callable(body)
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = body()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- fork --------------------------------------------------------------------------------------------


def test_a_child_of_fork_finds_nothing_mapped_and_is_not_attached_while_its_parent_goes_on(raw: Raw) -> None:
    shape = raw.geometry
    assert any(name == str(DEVICE) for *_, name in maps())

    def child() -> int:
        if any(start < shape.base + 2 * shape.size and shape.base < end for start, end, *_ in maps()):
            return 1
        try:
            raw.enter(Operation.COUNT)
        except teemate.NotAttached:
            return 0
        return 2

    assert in_child(child) == 0
    assert raw.call(Operation.COUNT) == 1


def test_a_child_may_attach_itself_at_the_place_that_it_found_free(raw: Raw) -> None:
    raw.call(Operation.STORE, heap_word(raw), 0x7EA)
    copy = os.dup(raw.fd)

    def child() -> int:
        with Raw.open(copy, raw.geometry) as own:
            return int(own.map().call(Operation.LOAD, heap_word(raw), tcs=1) != 0x7EA)

    assert in_child(child) == 0
    os.close(copy)
    assert raw.call(Operation.LOAD, heap_word(raw)) == 0x7EA


def test_without_the_librarys_care_a_child_inherits_the_mapping(raw: Raw) -> None:
    """The control: the driver itself takes mappings along."""
    code = raw.geometry.part(PROT_READ | PROT_WRITE)
    place = raw.geometry.base + code.offset
    keep_mapped(raw.fd, place, code.size, RW)  # over the library's, without MADV_DONTFORK

    def child() -> int:
        return int(not any(start <= place < end and name == str(DEVICE) for start, end, _, name in maps()))

    assert in_child(child) == 0


def test_closing_the_enclave_in_a_child_leaves_the_parents_alone(raw: Raw) -> None:
    def child() -> int:
        raw.close()
        return 0

    assert in_child(child) == 0
    assert raw.call(Operation.COUNT) == 1


# ---- several processes -----------------------------------------------------------------------------------


def test_two_programs_see_each_others_writes_in_one_enclave(raw: Raw) -> None:
    where = heap_word(raw)
    with Stranger(raw) as stranger:
        raw.call(Operation.STORE, where, 0x1111)
        assert stranger.call(Operation.LOAD, where, tcs=1) == 0x1111
        stranger.call(Operation.STORE, where, 0x2222, tcs=1)
        assert raw.call(Operation.LOAD, where) == 0x2222
        counts = [raw.call(Operation.COUNT), stranger.call(Operation.COUNT, tcs=1), raw.call(Operation.COUNT)]
        assert counts == [1, 2, 3]
        with raw.create_twin() as twin:  # the control: the same image once more is not the same enclave
            assert twin.map().call(Operation.COUNT) == 1


def test_each_sharers_thread_is_inside_at_the_same_time(raw: Raw) -> None:
    """One waits inside for what the other one writes from inside: no turn-taking would end."""
    where = heap_word(raw)
    with Stranger(raw) as stranger:
        stranger.start("call", operation=Operation.UNTIL, rsi=where, rdx=0, tcs=1)
        raw.call(Operation.STORE, where, 0x77)
        assert stranger.answer() == 0x77


def test_the_creators_death_changes_nothing_for_the_others(image: BuiltImage) -> None:
    with Stranger() as creator, Stranger() as other:
        with creator.do("create", sgxs=str(image.sgxs), sigstruct=str(image.sigstruct)) as mine:
            mine.map()
            other.give(mine)
            assert creator.call(Operation.COUNT) == 1
            creator.kill()
            assert mine.call(Operation.COUNT) == 2
            assert other.call(Operation.COUNT, tcs=1) == 3


def tcs_state(raw: Raw, number: int) -> tuple[int, int]:
    """STATE and CSSA of a debug enclave's TCS (EDBGRD)."""
    place = raw.geometry.base + raw.geometry.tcs[number]
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(place)
        tcs = memory.read(PAGE)
    return int.from_bytes(tcs[:8], "little"), int.from_bytes(tcs[24:28], "little")


def wait_until_inside(raw: Raw, number: int) -> None:
    """A thread is inside when its TCS is busy, or interrupted: CSSA 1."""
    for _ in range(SPINS):
        state, cssa = tcs_state(raw, number)
        if state & 1 or cssa:
            return
    raise AssertionError("nobody entered")


def test_a_thread_that_is_inside_when_the_creator_dies_goes_on(image: BuiltImage) -> None:
    with Stranger() as creator:
        with creator.do("create", sgxs=str(image.sgxs), sigstruct=str(image.sigstruct), debug=True) as mine:
            mine.map()
            holder, word = word_in_memory()
            seen: list[int] = []
            thread = threading.Thread(target=lambda: seen.append(mine.call(Operation.UNTIL, word)))
            thread.start()
            wait_until_inside(mine, 0)
            creator.kill()
            assert mine.call(Operation.COUNT, tcs=1) == 1
            holder[0] = 5
            thread.join(60)
            assert seen == [5]
            assert tcs_state(mine, 0) == (0, 0)


def test_a_sharer_that_dies_inside_leaves_its_tcs_interrupted_and_the_others_alone(image: BuiltImage) -> None:
    with Raw.create(image, debug=True) as raw, Stranger() as stranger:
        raw.map()
        stranger.give(raw)
        stranger.start("call", operation=Operation.LOOP, rsi=0, rdx=0, tcs=1)
        wait_until_inside(raw, 1)
        stranger.kill()
        assert tcs_state(raw, 1)[1] == 1  # DESIGN, section 5: 'interrupted'; the kernel cleans nothing up
        assert raw.call(Operation.COUNT) == 1


# ---- descriptors -------------------------------------------------------------------------------------------


def test_a_descriptor_in_flight_keeps_the_enclave(raw: Raw) -> None:
    raw.call(Operation.COUNT)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [raw.fd])
        shape = raw.geometry
        raw.close()
        assert not any(name == str(DEVICE) for *_, name in maps())
        _, (fd,), _, _ = socket.recv_fds(theirs, 1, 1)
    with Raw.open(fd, shape) as again:
        assert again.map().call(Operation.COUNT) == 2


def test_a_mapping_without_any_descriptor_keeps_the_enclave(raw: Raw) -> None:
    raw.call(Operation.COUNT)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, raw.fd, inheritable=False)  # closes the enclave's; what takes its place is ours to close
    os.close(null)
    assert raw.call(Operation.COUNT) == 2


# ---- debug enclaves ---------------------------------------------------------------------------------------


def read_through_proc(raw: Raw, pid: int) -> bytes:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(heap_word(raw))
        return memory.read(8)


def test_whoever_shares_a_debug_enclave_can_read_it_and_nobody_a_release_enclave(image: BuiltImage) -> None:
    secret = 0x5EC2E75EC2E75EC2
    for debug in (True, False):
        with Raw.create(image, debug=debug) as raw, Stranger() as stranger:
            raw.map()
            stranger.give(raw)
            raw.call(Operation.STORE, heap_word(raw), secret)
            ctypes.string_at(heap_word(raw), 1)  # the page is there
            for pid in (os.getpid(), stranger.pid):
                if debug:
                    assert read_through_proc(raw, pid) == secret.to_bytes(8, "little")
                else:
                    with pytest.raises(OSError, match="Input/output error"):
                        read_through_proc(raw, pid)
            # Looking at it from outside, without the kernel's help, shows all ones either way.
            assert ctypes.string_at(heap_word(raw), 8) == b"\xff" * 8
