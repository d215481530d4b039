"""What the driver lets a holder of an enclave's descriptor map, and how libteemate keeps to it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from images import BuiltImage, Images
from sharing import (
    DEVICE,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    REG,
    Operation,
    Raw,
    Segment,
    Stranger,
    StrangerError,
    map_bare,
    maps,
    protect,
)

import teemate
from teemate.image import SigParams

pytestmark = pytest.mark.skipif(
    not DEVICE.exists(), reason=f"no {DEVICE} here: tests/machine/run boots a machine that has it"
)

RW = PROT_READ | PROT_WRITE
RWX = RW | PROT_EXEC


@pytest.fixture
def image(images: Images) -> BuiltImage:
    return images.build("raw", heap="64K", sign=SigParams(debug_allowed=True))


@pytest.fixture
def raw(image: BuiltImage) -> Iterator[Raw]:
    """An enclave that is not mapped yet."""
    with Raw.create(image) as raw:
        yield raw


def in_elrange(raw: Raw) -> list[tuple[int, int, str, str]]:
    shape = raw.geometry
    return [row for row in maps() if shape.base <= row[0] < shape.base + shape.size]


def test_a_private_mapping_is_refused_by_the_driver(raw: Raw) -> None:
    data = raw.geometry.part(RW)
    place = raw.geometry.base + data.offset
    assert map_bare(raw.fd, place, PAGE, PROT_READ, MAP_PRIVATE) == errno.EINVAL
    assert map_bare(raw.fd, place, PAGE, PROT_READ, MAP_SHARED) == 0


def test_a_mapping_outside_of_elrange_is_refused_by_the_driver(raw: Raw) -> None:
    shape = raw.geometry
    assert map_bare(raw.fd, shape.base + shape.size, PAGE, PROT_READ) == errno.EACCES
    assert map_bare(raw.fd, shape.base - PAGE, PAGE, PROT_READ) == errno.EACCES
    assert map_bare(raw.fd, shape.base + shape.size - PAGE, 2 * PAGE, 0) == errno.EACCES
    assert map_bare(raw.fd, 0, PAGE, PROT_READ) == errno.EACCES  # wherever the kernel likes
    assert map_bare(raw.fd, shape.base, shape.size, 0) == 0


def test_a_mapping_wider_than_one_of_its_pages_is_refused_by_the_driver(raw: Raw) -> None:
    shape = raw.geometry
    data = shape.part(RW)
    assert map_bare(raw.fd, shape.base + data.offset, data.size, RWX) == errno.EACCES
    assert map_bare(raw.fd, shape.base + data.offset, data.size, RW) == 0
    # One page of code among them is enough.
    assert map_bare(raw.fd, shape.base, shape.size, RW) == errno.EACCES


def test_the_library_maps_each_segment_with_its_own_permissions_and_no_tcs_unasked(raw: Raw) -> None:
    raw.map(tcs=False)
    letters = {
        (raw.geometry.base + part.offset, raw.geometry.base + part.offset + part.size): "".join(
            letter if part.prot & bit else "-" for letter, bit in zip("rwx", (1, 2, 4), strict=True)
        )
        + "s"
        for part in raw.geometry.segments
        if part.type == REG
    }
    device = [(start, end, mode) for start, end, mode, name in in_elrange(raw) if name == str(DEVICE)]
    for (start, end), mode in letters.items():
        assert [row[2] for row in device if row[0] <= start and end <= row[1]] == [mode]
    open_ones = sum(end - start for start, end, mode in device if mode != "---s")
    assert open_ones == sum(end - start for start, end in letters)
    # All the rest of ELRANGE, the TCSs among it, is reserved and open to nobody.
    rest = [mode for start, end, mode, name in in_elrange(raw) if name != str(DEVICE)]
    assert set(rest) == {"---p"}
    raw.map()
    assert raw.call(Operation.COUNT) == 1


@pytest.mark.parametrize("prot", [RWX, PROT_READ | PROT_EXEC])
def test_segments_that_claim_more_than_the_pages_have_are_refused_and_nothing_stays_mapped(
    raw: Raw, prot: int
) -> None:
    data = raw.geometry.part(RW)
    parts = tuple(replace(part, prot=prot) if part == data else part for part in raw.geometry.segments)
    with Raw.open(os.dup(raw.fd), replace(raw.geometry, segments=parts)) as liar:
        with pytest.raises(teemate.Denied, match="permission"):
            liar.map()
        assert in_elrange(raw) == []
    assert raw.map().call(Operation.COUNT) == 1


def test_a_mapped_page_takes_no_more_permissions_later(raw: Raw) -> None:
    raw.map()
    data = raw.geometry.part(RW)
    assert protect(raw.geometry.base + data.offset, data.size, RWX) == errno.EACCES
    assert protect(raw.geometry.base + data.offset, data.size, PROT_READ) == 0
    assert protect(raw.geometry.base + data.offset, data.size, RW) == 0


def test_another_place_than_the_enclaves_own_is_refused_with_a_sentence(raw: Raw) -> None:
    elsewhere = replace(raw.geometry, base=raw.geometry.base ^ (1 << 38))
    with pytest.raises(teemate.Error) as caught, Raw.open(os.dup(raw.fd), elsewhere) as moved:
        moved.map()
    assert caught.value.detail["errno"] == "ESTALE"
    assert "does not have its place" in caught.value.message
    assert raw.map().call(Operation.COUNT) == 1


def test_a_page_that_was_never_added_faults_inside_and_not_in_the_kernel(raw: Raw) -> None:
    raw.map()
    hole = next(
        at
        for at in range(0, raw.geometry.size, PAGE)
        if not any(part.offset <= at < part.offset + part.size for part in raw.geometry.segments)
    )
    left = raw.enter(Operation.LOAD, raw.geometry.base + hole)
    assert (left.function, left.vector) == (3, 14)
    assert raw.call(Operation.COUNT, tcs=1) == 1


# ---- opening again -------------------------------------------------------------------------------------


def test_opening_the_descriptor_again_gives_another_empty_enclave_and_the_library_says_so(raw: Raw) -> None:
    copy = os.dup(raw.fd)
    with Raw.open(copy, raw.geometry) as other:  # the control: a dup is the same enclave
        assert other.map().call(Operation.COUNT) == 1
    again = os.open(f"/proc/self/fd/{raw.fd}", os.O_RDWR | os.O_CLOEXEC)
    with pytest.raises(teemate.Error) as caught, Raw.open(again, raw.geometry) as empty:
        empty.map()
    assert caught.value.detail["errno"] == "ESTALE"
    assert "not finished" in caught.value.message
    assert raw.map().call(Operation.COUNT) == 2


def test_a_descriptor_that_is_no_enclave_is_refused_with_a_sentence(raw: Raw) -> None:
    with pytest.raises(teemate.Unsupported, match="not that of an SGX enclave"):
        Raw.open(os.memfd_create("x"), raw.geometry)


# ---- READ_IMPLIES_EXEC -----------------------------------------------------------------------------------

CREATE = """
import ctypes, sys
sys.path[:0] = [{guest!r}, {tests!r}]
from pathlib import Path
from images import BuiltImage
from sharing import Operation, Raw
import teemate
files = {{"sgxs": Path({sgxs!r}), "sigstruct": Path({sig!r}), "elf": Path()}}
image = BuiltImage(name="raw", mrenclave=b"", slots=2, **files)
def read_implies_exec():
    ctypes.CDLL(None).personality(0x0400000)
try:
    if "before" in sys.argv:
        read_implies_exec()
    with Raw.create(image) as raw:
        if "between" in sys.argv:
            read_implies_exec()
        print("called", raw.map().call(Operation.COUNT))
except teemate.Error as error:
    print(type(error).__name__, error.message)
"""


def create_alone(image: BuiltImage, *arguments: str) -> str:
    """Make an enclave in a program of its own; what came of it."""
    here = Path(__file__).resolve().parent
    code = CREATE.format(
        guest=str(here), tests=str(here.parents[1]), sgxs=str(image.sgxs), sig=str(image.sigstruct)
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, check=True
    )
    return done.stdout.strip()


def test_a_program_whose_memory_is_all_executable_is_told_so(image: BuiltImage) -> None:
    assert create_alone(image) == "called 1"
    said = create_alone(image, "before")
    assert said.startswith("Denied"), said
    assert "READ_IMPLIES_EXEC" in said
    said = create_alone(image, "between")
    assert said.startswith("Denied"), said
    assert "READ_IMPLIES_EXEC" in said


def test_such_a_program_is_told_so_also_when_it_only_attaches(raw: Raw) -> None:
    with Stranger() as stranger:
        stranger.do("read_implies_exec")
        with pytest.raises(StrangerError, match=r"Denied: .*READ_IMPLIES_EXEC"):
            stranger.give(raw)
    assert raw.map().call(Operation.COUNT) == 1


def test_a_segment_of_no_pages_at_all_may_be_mapped_with_any_permissions(raw: Raw) -> None:
    """Room for pages that come later (EAUG) is not the library's business to refuse."""
    last = raw.geometry.segments[-1]
    room = Segment(last.offset + last.size, PAGE, RWX, REG)
    if room.offset >= raw.geometry.size:
        pytest.fail("the image fills ELRANGE: build it with another heap")
    parts = (*raw.geometry.segments, room)
    with Raw.open(os.dup(raw.fd), replace(raw.geometry, segments=parts)) as roomy:
        assert roomy.map().call(Operation.COUNT) == 1
