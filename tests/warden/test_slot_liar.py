"""What an enclave answers is believed only as far as it can be true."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backends import NUMBER
from elves import compile_elf
from images import Images
from warden_harness import Slot, check

from teemate._native import ffi, lib
from teemate.image import LayoutOptions, SigParams, layout_image, sign_with_key

HERE = Path(__file__).resolve().parent

DONE, OCALL = 0, 1
NAMED, WAIT, WAKE, PRINT, FILE = range(5)
OCALL_FAILED = -10
CAPACITY = 4096
OCALL_CAPACITY = 1 << 20


@pytest.fixture(scope="module")
def liar_image(images: Images, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Image and SIGSTRUCT of liar.S."""
    stem = tmp_path_factory.mktemp("liar") / "liar"
    compile_elf([HERE / "liar.S"], stem.with_suffix(".elf"), bare=True)
    options = LayoutOptions(slots=2, stack=8192, heap=0)
    built = layout_image(stem.with_suffix(".elf"), stem.with_suffix(".sgxs"), options)
    signed = sign_with_key(SigParams().unsigned(built.mrenclave), images.key)
    return stem.with_suffix(".sgxs"), signed.to_bytes()


@pytest.fixture
def liar(liar_image: tuple[Path, bytes]) -> Iterator[Slot]:
    """A slot of the lying enclave."""
    diag = ffi.new("struct teemate_diag *")
    pointer = ffi.new("struct teemate_enclave **")
    with liar_image[0].open("rb") as file:
        signature = ffi.new("uint8_t[]", liar_image[1])
        check(lib.teemate_create(NUMBER, 0, 0, file.fileno(), signature, pointer, diag), diag)
    check(lib.teemate_map(pointer[0], diag), diag)
    arena = check(lib.teemate_arena_create())
    check(lib.teemate_map_arena(pointer[0], arena, diag), diag)
    args = ffi.new("struct teemate_slot_args *")
    assert lib.teemate_enclave_tcs(pointer[0], ffi.addressof(args, "tcs_offset"), 1) >= 1
    yield Slot(pointer[0], args)
    lib.teemate_close(pointer[0])


def answer(rdi: int, rsi: int = 0, rdx: int = 0, r8: int = 0, buffer: bytes = b"") -> bytes:
    """Registers at the exit, and the first bytes of the OCALL buffer."""
    return struct.pack("<QQQQ", rdi, rsi, rdx, r8) + buffer.ljust(16, b"\0")


def name_of(length: int) -> bytes:
    """The start of a named OCALL."""
    return length.to_bytes(4, "little") + b"name"


def wait(index: int, expected: int = 0, timeout_ns: int = 0) -> bytes:
    """struct tm_ocall_wait."""
    return struct.pack("<IIQ", index, expected, timeout_ns)


@pytest.mark.parametrize(
    "lie",
    [
        answer(2),
        answer(1 << 63),
        answer(DONE, 1 << 40),
        answer(DONE, (1 << 64) - (1 << 40)),
        answer(DONE, 0, CAPACITY + 1),
        answer(DONE, 0, (1 << 64) - 1),
        answer(OCALL, 5),
        answer(OCALL, FILE, 8),
        answer(OCALL, (1 << 64) - 1),
        answer(OCALL, NAMED, OCALL_CAPACITY + 1, 1, name_of(4)),
        answer(OCALL, NAMED, (1 << 64) - 1, 1, name_of(4)),
        answer(OCALL, NAMED, 3, 1, name_of(4)),
        answer(OCALL, NAMED, 8, 1, name_of(0)),
        answer(OCALL, NAMED, 7, 1, name_of(4)),
        answer(OCALL, NAMED, 4096, 1, name_of(65)),
        answer(OCALL, NAMED, 4096, 1, name_of(0xFFFFFFFF)),
        answer(OCALL, WAIT, 15, 1, wait(0)),
        answer(OCALL, WAKE, 17, 1, wait(0)),
        answer(OCALL, PRINT, OCALL_CAPACITY + 1, 1),
    ],
    ids=lambda lie: str(struct.unpack_from("<QQQ", lie)),
)
def test_an_answer_that_cannot_be_ends_the_slot(liar: Slot, lie: bytes) -> None:
    assert liar.begin("any", lie, capacity=CAPACITY) == -errno.EBADMSG
    assert liar.begin("any", answer(DONE)) == -errno.ESTALE
    assert liar.close() == 0


@pytest.mark.parametrize("index", [1024, 0xFFFFFFFF])
@pytest.mark.parametrize("kind", [WAIT, WAKE])
def test_a_wait_outside_of_the_arena_is_refused_to_the_enclave(liar: Slot, kind: int, index: int) -> None:
    assert liar.call("any", answer(OCALL, kind, 16, 1, wait(index))).status == OCALL_FAILED
    assert liar.close() == 1


def test_a_wait_for_ever_and_a_wake_of_everybody_come_back(liar: Slot) -> None:
    for_ever = answer(OCALL, WAIT, 16, 1, wait(1023, 0, (1 << 64) - 1))
    assert liar.begin("any", for_ever) == 0
    assert liar.last.outcome == lib.TEEMATE_CALL_PAUSED
    assert liar.finish().status == 0
    assert liar.call("any", answer(OCALL, WAKE, 16, 1, wait(1023, 0xFFFFFFFF))).status == 0
    assert liar.close() == 1


def test_the_longest_name_and_the_longest_answer_are_taken(liar: Slot) -> None:
    asked: list[Any] = []

    def handler(name: bytes, data: bytes) -> bytes:
        asked.append((len(name), len(data)))
        return bytes(OCALL_CAPACITY)

    liar.call("any", answer(OCALL, NAMED, OCALL_CAPACITY, 1, name_of(64)), handler=handler)
    assert asked == [(64, OCALL_CAPACITY - 4 - 64)]
    assert liar.close() == 1
