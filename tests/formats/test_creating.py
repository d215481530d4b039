"""From image to enclave, and what is refused on the way: the same on every backend."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
from backends import BACKEND, NUMBER, sim_only
from public_api import RefusalError, created
from sgxs_writer import (
    PAGE,
    REG,
    TCS,
    R,
    Stream,
    W,
    X,
    eadd,
    ecreate,
    eextend,
    sign,
    small_image,
    tcs_page,
    unmeasured,
)

from teemate._native import ffi, lib

RWX = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
WINDOW = range(0x4000_0000_0000, 0x4100_0000_0000)


def signed(image: Stream, **fields: Any) -> tuple[bytes, bytes]:
    return image.to_bytes(), sign(image.mrenclave(), **fields)


def refused(content: bytes, sigstruct: bytes, **arguments: Any) -> RefusalError:
    with pytest.raises(RefusalError) as caught:
        with created(content, sigstruct, **arguments):
            pass
    assert caught.value.text
    return caught.value


def describe(enclave: Any) -> Any:
    info = ffi.new("struct teemate_enclave_info *")
    assert lib.teemate_enclave_describe(enclave, info) == 0
    return info


def contents(enclave: Any, offset: int, length: int) -> bytes:
    """Return what pages of a debug enclave hold."""
    if BACKEND == "sim":
        return os.pread(lib.teemate_enclave_fd(enclave), length, offset)
    # EDBGRD, by way of ptrace's access to a mapping of the driver's (sgx_vma_access).
    assert lib.teemate_map(enclave, ffi.NULL) == 0
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        return os.pread(memory, length, describe(enclave).base + offset)
    finally:
        os.close(memory)


def segments(enclave: Any) -> list[tuple[int, int, int, int]]:
    count = lib.teemate_enclave_segments(enclave, ffi.NULL, 0)
    array = ffi.new("struct teemate_segment[]", count)
    assert lib.teemate_enclave_segments(enclave, array, count) == count
    return [(segment.offset, segment.size, segment.prot, segment.type) for segment in array]


def test_an_enclave_knows_what_it_was_made_from() -> None:
    image = small_image()
    with created(*signed(image)) as enclave:
        info = describe(enclave)
        assert bytes(info.mrenclave) == image.mrenclave()
        assert info.backend == NUMBER
        assert (info.size, info.pages, info.tcs_count, info.sdk) == (64 * 1024, 7, 1, 0)
        assert (info.isvprodid, info.isvsvn) == (7, 3)
        read, write, execute = RWX
        assert segments(enclave) == [
            (0x0000, 0x1000, read | execute, 2),
            (0x1000, 0x1000, read | write, 1),
            (0x2000, 0x1000, read | write, 2),
            (0x4000, 0x4000, read | write, 2),
        ]
        offsets = ffi.new("uint64_t[4]")
        assert lib.teemate_enclave_tcs(enclave, offsets, 4) == 1
        assert offsets[0] == 0x1000


def test_the_base_is_aligned_and_has_room_above() -> None:
    for _ in range(10):
        with created(*signed(small_image())) as enclave:
            info = describe(enclave)
            assert info.base % info.size == 0
            assert info.base in WINDOW
            assert info.base + 2 * info.size - 1 in WINDOW


def test_two_enclaves_rarely_choose_one_base() -> None:
    content, sigstruct = signed(small_image())
    bases = set()
    for _ in range(8):
        with created(content, sigstruct) as enclave:
            bases.add(describe(enclave).base)
    assert len(bases) >= 7  # 2^23 places: two of 28 pairs are equal once in 10^9 runs at most


def test_a_base_is_taken_as_given() -> None:
    base = WINDOW.start + 5 * 64 * 1024
    with created(*signed(small_image()), base=base) as enclave:
        assert describe(enclave).base == base


@pytest.mark.parametrize("base", [PAGE, WINDOW.start + PAGE, (1 << 64) - 64 * 1024, (1 << 47) - 64 * 1024])
def test_a_base_that_cannot_be_is_refused(base: int) -> None:
    refusal = refused(*signed(small_image()), base=base)
    assert (refusal.error, refusal.step) == (errno.EINVAL, lib.TEEMATE_STEP_ECREATE)


def test_what_the_pages_hold_is_what_the_stream_said() -> None:
    image = Stream().page(0, REG | R | X, b"code" * 1024)
    # Kinds of page in a row, each with its data at another place of the reader's.
    image.records += [eadd(PAGE, REG | R | W), unmeasured(PAGE + 512, b"c" * 256)]
    image.records += [unmeasured(PAGE, b"a" * 256)]
    image.page(2 * PAGE, REG | R | W).page(3 * PAGE, REG | R | W, b"unmeasured" * 300, measured=False)
    with created(*signed(image, attributes=4 | 2), attributes=2) as enclave:
        assert contents(enclave, 0, PAGE) == b"code" * 1024
        assert contents(enclave, PAGE, PAGE) == (b"a" * 256 + bytes(256) + b"c" * 256).ljust(PAGE, b"\0")
        assert contents(enclave, 2 * PAGE, PAGE) == bytes(PAGE)
        assert contents(enclave, 3 * PAGE, PAGE) == (b"unmeasured" * 300).ljust(PAGE, b"\0")


@sim_only("Linux does not add a page that is measured in part")
def test_a_page_that_is_measured_in_part_has_both_parts() -> None:
    image = Stream().page(0, REG | R | X, b"code")
    image.records += [eadd(PAGE, REG | R | W), eextend(PAGE + 512, b"c" * 256), unmeasured(PAGE, b"a" * 256)]
    with created(*signed(image)) as enclave:
        assert contents(enclave, PAGE, PAGE) == (b"a" * 256 + bytes(256) + b"c" * 256).ljust(PAGE, b"\0")


def test_long_runs_of_data_arrive_in_order() -> None:
    image = Stream(size=2 << 20)
    for page in range(300):
        image.page(page * PAGE, REG | R | W, page.to_bytes(4, "little") * 1024, measured=page % 150 < 100)
    with created(*signed(image, attributes=4 | 2), attributes=2) as enclave:
        content = contents(enclave, 0, 300 * PAGE)
    assert content == b"".join(page.to_bytes(4, "little") * 1024 for page in range(300))


def test_a_bad_record_tears_everything_down() -> None:
    image = small_image()
    content = image.to_bytes() + eadd(0, REG | R)
    refusal = refused(content, sign(image.mrenclave()))
    assert (refusal.error, refusal.step) == (errno.EBADMSG, lib.TEEMATE_STEP_PARSE)
    assert (refusal.code, refusal.offset) == (lib.TEEMATE_BAD_ORDER, len(image.to_bytes()))


def test_a_truncated_image_tears_everything_down() -> None:
    image = small_image()
    refusal = refused(image.to_bytes()[:-1], sign(image.mrenclave()))
    assert (refusal.error, refusal.code) == (errno.EBADMSG, lib.TEEMATE_BAD_TRUNCATED)
    assert refusal.offset == image.offset_of(-1)


@pytest.mark.parametrize(
    "page",
    [
        tcs_page()[:8] + b"\4" + tcs_page()[9:],
        tcs_page()[:72] + b"\1" + tcs_page()[73:],  # OCETSSA, without CET
        tcs_page()[:-1] + b"\1",
    ],
    ids=["flags", "OCETSSA", "reserved"],
)
def test_a_tcs_that_eadd_refuses_is_named_by_its_record(page: bytes) -> None:
    image = Stream().page(0, REG | R | X, b"code").page(PAGE, TCS, page).page(2 * PAGE, REG | R | W)
    refusal = refused(*signed(image))
    assert (refusal.error, refusal.step) == (errno.EBADMSG, lib.TEEMATE_STEP_EADD)
    assert refusal.offset == image.offset_of(1 + 17)


def test_ssa_frames_too_small_for_the_registers_are_refused() -> None:
    image = Stream().page(0, REG | R | X, b"code")
    refusal = refused(*signed(image, xfrm=1))
    assert (refusal.error, refusal.step) == (errno.EBADMSG, lib.TEEMATE_STEP_ECREATE)


def test_an_enclave_that_is_larger_than_the_machine_takes_is_refused() -> None:
    image = Stream(size=1 << 46).page(0, REG | R | X, b"code")
    refusal = refused(*signed(image))
    assert (refusal.error, refusal.step) == (errno.ENOSPC, lib.TEEMATE_STEP_ECREATE)


def test_the_sigstruct_of_another_image_is_refused() -> None:
    refusal = refused(small_image().to_bytes(), sign(bytes(32)))
    assert (refusal.error, refusal.step) == (errno.EKEYEXPIRED, lib.TEEMATE_STEP_EINIT)
    assert (refusal.code, refusal.offset) == (4, 960)


def test_a_sigstruct_with_a_wrong_signature_is_refused() -> None:
    content, sigstruct = signed(small_image())
    forged = sigstruct[:516] + bytes([sigstruct[516] ^ 1]) + sigstruct[517:]
    refusal = refused(content, forged)
    assert (refusal.error, refusal.step) == (errno.EKEYREJECTED, lib.TEEMATE_STEP_EINIT)
    assert (refusal.code, refusal.offset) == (8, 516)


def test_a_malformed_sigstruct_is_refused() -> None:
    content, sigstruct = signed(small_image())
    refusal = refused(content, b"\0" + sigstruct[1:])
    assert (refusal.error, refusal.step, refusal.code) == (errno.EBADMSG, lib.TEEMATE_STEP_EINIT, 1)


@pytest.mark.parametrize(
    ("fields", "attributes"),
    [
        ({"attribute_mask": (1 << 64) - 1}, 2),
        ({"attributes": 4 | 0x20}, 0),
    ],
    ids=["DEBUG that the signer forbids", "EINITTOKENKEY"],
)
def test_attributes_that_are_not_allowed_are_refused(fields: dict[str, int], attributes: int) -> None:
    refusal = refused(*signed(small_image(), **fields), attributes=attributes)
    assert (refusal.error, refusal.step) == (errno.EACCES, lib.TEEMATE_STEP_EINIT)


@sim_only("who may open /dev/sgx_provision gets PROVISIONKEY")
def test_the_sim_gives_nobody_the_provision_key() -> None:
    refusal = refused(*signed(small_image(), attributes=4 | 0x10))
    assert (refusal.error, refusal.step) == (errno.EACCES, lib.TEEMATE_STEP_EINIT)
    assert (refusal.code, refusal.offset) == (0, 928)


@pytest.mark.parametrize("attributes", [1, 4, 0x10, 1 << 63])
def test_only_debug_can_be_asked_for(attributes: int) -> None:
    assert refused(*signed(small_image()), attributes=attributes).error == errno.EINVAL


def test_debug_is_on_only_when_it_is_asked_for_or_signed() -> None:
    may = signed(small_image(), attributes=4 | 2)
    must = signed(small_image(), attributes=4 | 2, attribute_mask=(1 << 64) - 1)
    for arguments, asked, debug in [(may, 0, 0), (may, 2, 2), (must, 0, 2)]:
        with created(*arguments, attributes=asked) as enclave:
            assert describe(enclave).attributes & 2 == debug


@pytest.mark.skipif(os.path.exists("/dev/sgx_enclave"), reason="this host has SGX")
def test_the_sgx_backend_says_that_it_is_not_here() -> None:
    enclave, diag = ffi.new("struct teemate_enclave **"), ffi.new("struct teemate_diag *")
    result = lib.teemate_create(lib.TEEMATE_SGX, 0, 0, -1, bytes(1808), enclave, diag)
    assert result == -errno.ENODEV
    assert b"there is no /dev/sgx_enclave" in ffi.string(diag.text)


@sim_only("Linux tells nobody how many pages of an enclave are in memory")
def test_a_heap_costs_its_pages_once() -> None:
    image = Stream(size=32 << 20).page(0, REG | R | X, b"code")
    pages = 16 * 256
    image.records += [eadd(PAGE * (1 + page), REG | R | W) for page in range(pages)]
    with created(*signed(image)) as enclave:
        assert describe(enclave).pages == pages + 1
        held = lib.teemate_sim_pages(lib.teemate_enclave_fd(enclave))
        # The enclave's tables lie in the file as well: 8 bytes for each page, and one page of TCSs.
        assert pages + 1 <= held <= pages + 1 + pages * 2 * 8 // PAGE + 80


def epc_pages() -> int:
    """Return the size of the EPC as the kernel tells it."""
    sizes = Path("/sys/devices/system/node").glob("node*/x86/sgx_total_bytes")
    return sum(int(path.read_text()) for path in sizes) // PAGE


def test_more_pages_than_the_machine_can_give_are_refused_before_they_are_taken() -> None:
    """A stream of 64 bytes for each page may not bring the host down."""
    pages = os.sysconf("SC_PHYS_PAGES") // 2 + 1 + (0 if BACKEND == "sim" else epc_pages())
    if pages > 1 << 23:
        pytest.skip("with more than 64 GiB of memory the stream itself would be too large for a test")
    size = 1 << (pages * PAGE - 1).bit_length()
    image = Stream(size=size)
    image.records.append(b"".join(eadd(PAGE * page, REG | R | W) for page in range(pages)))
    refusal = refused(image.to_bytes(), sign(bytes(32)))
    assert (refusal.error, refusal.step) == (errno.ENOMEM, lib.TEEMATE_STEP_EADD)


# ---- opening what another process made ---------------------------------------------------


def opened(fd: int, base: int, size: int, *parts: tuple[int, int, int, int]) -> tuple[int, str]:
    """Open and close again; returns the result and the diag's text."""
    array = ffi.new("struct teemate_segment[]", list(parts))
    enclave, diag = ffi.new("struct teemate_enclave **"), ffi.new("struct teemate_diag *")
    result = lib.teemate_open(NUMBER, fd, base, size, array, len(parts), enclave, diag)
    if result == 0:
        lib.teemate_close(enclave[0])
    return result, ffi.string(diag.text).decode()


def test_an_opened_enclave_is_the_one_that_was_made() -> None:
    image = small_image()
    with created(*signed(image)) as enclave:
        info = describe(enclave)
        parts = ffi.new("struct teemate_segment[4]")
        lib.teemate_enclave_segments(enclave, parts, 4)
        other = ffi.new("struct teemate_enclave **")
        fd = os.dup(lib.teemate_enclave_fd(enclave))
        assert lib.teemate_open(lib.TEEMATE_AUTO, fd, info.base, info.size, parts, 4, other, ffi.NULL) == 0
        found = describe(other[0])
        # The driver tells nobody whose enclave it is: what attaches knows it from the broker.
        assert bytes(found.mrenclave) == (image.mrenclave() if BACKEND == "sim" else bytes(32))
        assert (found.base, found.size, found.pages, found.tcs_count) == (info.base, info.size, 0, 1)
        assert segments(other[0]) == segments(enclave)
        lib.teemate_close(other[0])


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 0, 1, 2)],
        [(1, PAGE, 1, 2)],
        [(0, PAGE + 1, 1, 2)],
        [(0, 128 * 1024, 1, 2)],
        [(64 * 1024, PAGE, 1, 2)],
        [(PAGE, (1 << 64) - PAGE, 1, 2)],
        [((1 << 64) - PAGE, 2 * PAGE, 1, 2)],
        [(PAGE, PAGE, 1, 2), (0, PAGE, 1, 2)],
        [(0, 2 * PAGE, 1, 2), (PAGE, PAGE, 1, 2)],
        [(0, PAGE, 8, 2)],
        [(0, PAGE, 1, 0)],
        [(0, PAGE, 1, 4)],
    ],
)
def test_segments_that_cannot_be_are_refused(parts: list[tuple[int, int, int, int]]) -> None:
    with created(*signed(small_image())) as enclave:
        info = describe(enclave)
        result, text = opened(os.dup(lib.teemate_enclave_fd(enclave)), info.base, info.size, *parts)
    assert result == -errno.EINVAL
    assert "segment" in text


@pytest.mark.parametrize(
    ("base", "size"),
    [
        (0, 0x10000),
        (PAGE, 0x10000),
        (WINDOW.start, 0),
        (WINDOW.start, 3 * PAGE),
        (1 << 63, 1 << 16),
        (0, 1 << 63),
    ],
)
def test_a_geometry_that_cannot_be_is_refused(base: int, size: int) -> None:
    with created(*signed(small_image())) as enclave:
        assert opened(os.dup(lib.teemate_enclave_fd(enclave)), base, size)[0] == -errno.EINVAL


def test_another_geometry_than_the_files_is_stale() -> None:
    with created(*signed(small_image())) as enclave:
        info = describe(enclave)
        fd = lib.teemate_enclave_fd(enclave)
        assert opened(os.dup(fd), info.base + info.size, info.size)[0] == -errno.ESTALE
        assert opened(os.dup(fd), info.base, info.size // 2)[0] == -errno.ESTALE


def test_a_smaller_geometry_inside_of_the_files_is_stale() -> None:
    with created(*signed(small_image())) as enclave:
        info = describe(enclave)
        fd = lib.teemate_enclave_fd(enclave)
        for part in range(4):
            base = info.base + part * info.size // 4
            assert opened(os.dup(fd), base, info.size // 4)[0] == -errno.ESTALE


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/proc/self/exe", "/dev/full"])
def test_a_file_that_is_no_enclave_is_refused(path: str) -> None:
    assert opened(os.open(path, os.O_RDONLY), WINDOW.start, 0x10000)[0] == -errno.ENODEV


def test_what_is_no_file_at_all_is_refused() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    assert opened(reading, WINDOW.start, 0x10000)[0] == -errno.ENODEV


def test_an_enclave_may_have_no_pages() -> None:
    """A stream of ECREATE alone is an enclave without pages: EINIT takes it, nobody can enter it."""
    image = Stream()
    assert image.records == [ecreate(64 * 1024)]
    with created(*signed(image)) as enclave:
        assert describe(enclave).pages == 0
        assert segments(enclave) == []
