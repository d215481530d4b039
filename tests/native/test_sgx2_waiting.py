"""How SGX2's calls go on when the driver wants to be asked again (native/lib/sgx2.c)."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI
from native_library import build_library

PAGE = 4096
RESTRICT, MODIFY, REMOVE = 0, 1, 2
ALL = (RESTRICT, MODIFY, REMOVE)

Answer = tuple[int, int] | tuple[int, int, int]
"""Errno, pages done, and what the instruction returned."""


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library's code over a backend whose answers are given."""
    output = tmp_path_factory.mktemp("sgx2") / "libscripted.so"
    fake = str(Path(__file__).with_name("scripted_backend.c"))
    build_library(["sgx2.c"], output, [fake, "-fsanitize=undefined", "-fno-sanitize-recover"])
    ffi = FFI()
    ffi.cdef(
        """
        struct answer { int error; uint64_t done, result; };
        int play(int which, const struct answer *script, unsigned count, int forked, uint64_t offset,
                 uint64_t length, uint64_t argument, uint64_t *result, uint64_t *done, uint64_t *seen);
        """
    )
    return ffi, ffi.dlopen(str(output))


def play(scripted: Any, which: int, *answers: Answer, pages: int = 4, forked: bool = False) -> dict[str, int]:
    ffi, lib = scripted
    script = ffi.new("struct answer[]", len(answers))
    for place, (error, done, *result) in zip(script, answers, strict=True):
        place.error, place.done, place.result = -error, done * PAGE, result[0] if result else 0
    result, done, seen = ffi.new("uint64_t *"), ffi.new("uint64_t *"), ffi.new("uint64_t[4]")
    error = lib.play(which, script, len(answers), forked, 16 * PAGE, pages * PAGE, 3, result, done, seen)
    return {
        "error": -error, "result": result[0], "done": done[0] // PAGE, "calls": seen[0],
        "offset": seen[1] // PAGE, "length": seen[2] // PAGE, "argument": seen[3],
    }  # fmt: skip


@pytest.mark.parametrize("which", ALL)
def test_a_call_that_succeeds_is_made_once(scripted: Any, which: int) -> None:
    seen = play(scripted, which, (0, 4))
    assert (seen["error"], seen["done"], seen["calls"]) == (0, 4, 1)
    assert (seen["offset"], seen["length"]) == (16, 4)


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("again", [errno.EBUSY, errno.EAGAIN])
def test_it_goes_on_where_the_call_before_stopped(scripted: Any, which: int, again: int) -> None:
    seen = play(scripted, which, (again, 0), (again, 1), (again, 2), (again, 0), (0, 1))
    assert (seen["error"], seen["done"], seen["calls"]) == (0, 4, 5)
    assert (seen["offset"], seen["length"]) == (19, 1)


@pytest.mark.parametrize("which", ALL)
def test_who_keeps_it_busy_for_ever_ends_it(scripted: Any, which: int) -> None:
    seen = play(scripted, which, (errno.EAGAIN, 2), (errno.EBUSY, 0))
    assert (seen["error"], seen["done"]) == (errno.EBUSY, 2)
    # It waits longer and longer, up to a limit: no busy loop, and no endless one.
    assert 8 < seen["calls"] < 200


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("error", [errno.ENODEV, errno.EINVAL, errno.EPERM])
def test_other_errors_end_it_at_once(scripted: Any, which: int, error: int) -> None:
    seen = play(scripted, which, (error, 1))
    assert (seen["error"], seen["done"], seen["calls"]) == (error, 1, 1)


@pytest.mark.parametrize("which", [RESTRICT, MODIFY])
def test_what_the_instruction_said_comes_back(scripted: Any, which: int) -> None:
    seen = play(scripted, which, (errno.EAGAIN, 1), (errno.EFAULT, 1, 20))
    assert (seen["error"], seen["result"], seen["done"], seen["argument"]) == (errno.EFAULT, 20, 2, 3)


@pytest.mark.parametrize("which", ALL)
def test_a_child_of_fork_calls_nothing(scripted: Any, which: int) -> None:
    seen = play(scripted, which, (0, 4), forked=True)
    assert (seen["error"], seen["done"], seen["calls"]) == (errno.ENOTCONN, 0, 0)
