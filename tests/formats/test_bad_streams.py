"""A bad stream is refused with its reason and the offset of the record that is wrong."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_api import RefusalError, measure, refusal_of
from sgxs_writer import (
    CHUNK,
    PAGE,
    REG,
    TCS,
    R,
    Stream,
    W,
    eadd,
    ecreate,
    eextend,
    sdk_header,
    sdk_image,
    small_image,
    unmeasured,
)

from teemate._native import ffi, lib

SIZE = 64 * 1024


def refused(content: bytes) -> RefusalError:
    refusal = refusal_of(content)
    assert refusal is not None
    return refusal


def with_record(*records: bytes) -> bytes:
    """Return a stream of one measured page at 0x1000, then `records`."""
    image = Stream(size=SIZE).page(PAGE, REG | R, b"page")
    return image.to_bytes() + b"".join(records)


#: Where the first of `records` of with_record() starts.
NEXT = 64 + 64 + 16 * (64 + 256)

BAD_RECORDS: dict[str, tuple[bytes, int]] = {
    "unknown tag": (b"EBLOCK\0\0".ljust(64, b"\0"), lib.TEEMATE_BAD_TAG),
    "a tag in small letters": (b"eadd".ljust(64, b"\0"), lib.TEEMATE_BAD_TAG),
    "second ECREATE": (ecreate(SIZE), lib.TEEMATE_BAD_TAG),
    "late UNSIZED": (ecreate(SIZE, tag=b"UNSIZED\0"), lib.TEEMATE_BAD_TAG),
    "EADD of a page again": (eadd(PAGE, REG | R), lib.TEEMATE_BAD_OVERLAP),
    "EADD of an earlier page": (eadd(0, REG | R), lib.TEEMATE_BAD_ORDER),
    "EADD that is not on a page": (eadd(2 * PAGE + 1, REG | R), lib.TEEMATE_BAD_ALIGNMENT),
    "EADD between two pages": (eadd(2 * PAGE - 256, REG | R), lib.TEEMATE_BAD_ALIGNMENT),
    "EADD at the end of ELRANGE": (eadd(SIZE, REG | R), lib.TEEMATE_BAD_RANGE),
    "EADD far out": (eadd(1 << 63, REG | R), lib.TEEMATE_BAD_RANGE),
    "EADD at the last page of 64 bits": (eadd((1 << 64) - PAGE, REG | R), lib.TEEMATE_BAD_RANGE),
    "EADD of a SECS": (eadd(2 * PAGE, R), lib.TEEMATE_BAD_SECINFO),
    "EADD of a VA page": (eadd(2 * PAGE, 3 << 8), lib.TEEMATE_BAD_SECINFO),
    "EADD of a TRIM page": (eadd(2 * PAGE, 4 << 8), lib.TEEMATE_BAD_SECINFO),
    "EADD of an unknown type": (eadd(2 * PAGE, 0xFF << 8), lib.TEEMATE_BAD_SECINFO),
    "EADD that is pending": (eadd(2 * PAGE, REG | R | 8), lib.TEEMATE_BAD_SECINFO),
    "EADD with a high flag": (eadd(2 * PAGE, REG | R | 1 << 40), lib.TEEMATE_BAD_SECINFO),
    "EADD writable, not readable": (eadd(2 * PAGE, REG | W), lib.TEEMATE_BAD_SECINFO),
    "EADD of a TCS with permissions": (eadd(2 * PAGE, TCS | R | W), lib.TEEMATE_BAD_SECINFO),
    "EADD with reserved bytes": (eadd(2 * PAGE, REG | R)[:-1] + b"\1", lib.TEEMATE_BAD_RESERVED),
    "EEXTEND of a chunk again": (eextend(PAGE + 512, b""), lib.TEEMATE_BAD_OVERLAP),
    "UNMEASRD over a measured chunk": (unmeasured(PAGE + 512, b""), lib.TEEMATE_BAD_OVERLAP),
    "EEXTEND of the page before": (eextend(0, b""), lib.TEEMATE_BAD_ORDER),
    "EEXTEND of a page not added": (eextend(2 * PAGE, b""), lib.TEEMATE_BAD_ORDER),
    "UNMEASRD of a page not added": (unmeasured(2 * PAGE, b""), lib.TEEMATE_BAD_ORDER),
    "EEXTEND that is not on a chunk": (eextend(PAGE + 1, b""), lib.TEEMATE_BAD_ALIGNMENT),
    "EEXTEND outside of ELRANGE": (eextend(SIZE + PAGE, b""), lib.TEEMATE_BAD_RANGE),
    "EEXTEND at the last chunk of 64 bits": (eextend((1 << 64) - 256, b""), lib.TEEMATE_BAD_RANGE),
    "EEXTEND with reserved bytes": (
        eextend(PAGE, b"")[:63] + b"\1" + bytes(256),
        lib.TEEMATE_BAD_RESERVED,
    ),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_refused_at_its_offset(name: str) -> None:
    record, reason = BAD_RECORDS[name]
    refusal = refused(with_record(record))
    assert (refusal.error, refusal.step) == (errno.EBADMSG, lib.TEEMATE_STEP_PARSE)
    assert (refusal.code, refusal.offset) == (reason, NEXT), refusal.text
    assert refusal.text


@pytest.mark.parametrize("before", range(800, 830))
def test_a_bad_record_is_found_wherever_the_reader_cuts_the_file(before: int) -> None:
    """The reader holds 256 KiB: the record lies before, across and behind the end of that."""
    records = [ecreate(1 << 22)]
    for page in range(before * 320 // (64 + 16 * 320) + 1):
        records.append(eadd(page * PAGE, REG | R))
        records += [eextend(page * PAGE + at, b"x") for at in range(0, PAGE, CHUNK)]
    records = records[:before]
    offset = sum(len(record) for record in records)
    refusal = refused(b"".join(records) + eextend(1, b"") + eadd(1 << 21, REG | R))
    assert (refusal.code, refusal.offset) == (lib.TEEMATE_BAD_ALIGNMENT, offset)


@pytest.mark.parametrize(
    "size",
    [0, 1, PAGE, 3 * PAGE, SIZE - 1, SIZE + PAGE, (1 << 64) - 1, 1 << 63, 1 << 48, 3 << 62],
)
def test_a_size_that_is_no_usable_power_of_two_is_refused(size: int) -> None:
    refusal = refused(ecreate(size) + eadd(0, REG | R))
    assert (refusal.step, refusal.code, refusal.offset) == (lib.TEEMATE_STEP_PARSE, lib.TEEMATE_BAD_SIZE, 0)


@pytest.mark.parametrize("pages", [0, 16, 1 << 31, (1 << 32) - 1])
def test_ssa_frames_that_do_not_fit_are_refused(pages: int) -> None:
    assert refused(ecreate(SIZE, pages)).code == lib.TEEMATE_BAD_SIZE


def test_reserved_bytes_of_ecreate_are_refused() -> None:
    refusal = refused(ecreate(SIZE)[:63] + b"\x80")
    assert (refusal.code, refusal.offset) == (lib.TEEMATE_BAD_RESERVED, 0)


def test_a_stream_without_a_size_is_refused_as_such() -> None:
    refusal = refused(ecreate(0, tag=b"UNSIZED\0"))
    assert (refusal.code, refusal.offset) == (lib.TEEMATE_BAD_UNSIZED, 0)


@pytest.mark.parametrize("first", [eadd(0, REG | R), eextend(0, b""), b"\x7fELF".ljust(64, b"\0"), bytes(64)])
def test_a_stream_that_does_not_begin_with_ecreate_is_refused(first: bytes) -> None:
    refusal = refused(first + ecreate(SIZE))
    assert (refusal.code, refusal.offset) == (lib.TEEMATE_BAD_TAG, 0)


def test_data_before_any_page_is_refused() -> None:
    refusal = refused(ecreate(SIZE) + eextend(0, b"lost"))
    assert (refusal.code, refusal.offset) == (lib.TEEMATE_BAD_ORDER, 64)


def test_an_empty_file_is_refused() -> None:
    refusal = refused(b"")
    assert (refusal.code, refusal.offset) == (lib.TEEMATE_BAD_TRUNCATED, 0)


def test_a_stream_that_is_cut_anywhere_is_refused_at_the_cut_record() -> None:
    image = Stream(size=SIZE)
    image.records += [eadd(0, REG | R), eextend(0, b"a" * 256), unmeasured(256, b"b" * 256), eadd(PAGE, TCS)]
    content = image.to_bytes()
    starts = [image.offset_of(index) for index in range(len(image.records))]
    for length in range(1, len(content)):
        if length in starts:
            # Nothing in the stream says that more follows; MRENCLAVE tells.
            assert bytes(measure(content[:length]).mrenclave) != image.mrenclave()
            continue
        refusal = refused(content[:length])
        assert refusal.code == lib.TEEMATE_BAD_TRUNCATED
        assert refusal.offset == max(start for start in starts if start < length)


def test_every_flipped_bit_is_refused_or_changes_the_measurement() -> None:
    image = Stream(size=SIZE)
    image.records += [eadd(0, REG | R), eextend(0, b"data"), eadd(PAGE, TCS), eadd(2 * PAGE, REG | R | W)]
    content, expected = image.to_bytes(), image.mrenclave()
    count = 0
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        refusal = refusal_of(bytes(flipped))
        if refusal is None:
            assert bytes(measure(bytes(flipped)).mrenclave) != expected, f"bit {bit}"
            continue
        assert (refusal.error, refusal.step) == (errno.EBADMSG, lib.TEEMATE_STEP_PARSE)
        assert refusal.offset in {image.offset_of(index) for index in range(len(image.records))}
        count += 1
    assert count > 8 * 64 * 3  # most bits of the records themselves


@settings(max_examples=300, deadline=None)
@given(
    garbage=st.lists(
        st.one_of(
            st.binary(min_size=64, max_size=64),
            st.tuples(st.sampled_from([eadd]), st.integers(0, (1 << 64) - 1), st.integers(0, 0x1FFF)).map(
                lambda item: item[0](item[1], item[2])
            ),
            st.tuples(st.sampled_from([eextend, unmeasured]), st.integers(0, 1 << 18)).map(
                lambda item: item[0](item[1] // CHUNK * CHUNK, b"")
            ),
        ),
        max_size=6,
    )
)
def test_garbage_is_measured_or_refused_with_a_reason(garbage: list[bytes]) -> None:
    refusal = refusal_of(ecreate(SIZE) + b"".join(garbage))
    if refusal is not None:
        assert refusal.step == lib.TEEMATE_STEP_PARSE
        assert refusal.code in range(lib.TEEMATE_BAD_TRUNCATED, lib.TEEMATE_BAD_HEADER + 1)
        assert refusal.text


def test_more_segments_than_can_be_mapped_are_refused() -> None:
    count = 32768
    records = [ecreate(1 << 30)] + [eadd(page * 2 * PAGE, REG | R) for page in range(count + 1)]
    refusal = refused(b"".join(records))
    assert (refusal.code, refusal.offset) == (lib.TEEMATE_BAD_LIMIT, 64 * (count + 1))
    assert measure(b"".join(records[:-1])).segment_count == count


@pytest.mark.parametrize(
    ("open_it", "error"),
    [
        (lambda: os.open("/", os.O_RDONLY), errno.EISDIR),
        (lambda: os.open("/dev/null", os.O_WRONLY), errno.EBADF),
    ],
    ids=["a directory", "not open for reading"],
)
def test_what_cannot_be_read_gives_the_errno_of_reading(open_it: Callable[[], int], error: int) -> None:
    info, diag = ffi.new("struct teemate_image_info *"), ffi.new("struct teemate_diag *")
    fd = open_it()
    try:
        assert lib.teemate_image_measure(fd, info, diag) == -error
    finally:
        os.close(fd)
    assert diag.step == lib.TEEMATE_STEP_READ


def test_a_pipe_is_refused() -> None:
    info, diag = ffi.new("struct teemate_image_info *"), ffi.new("struct teemate_diag *")
    reader, writer = os.pipe()
    try:
        assert lib.teemate_image_measure(reader, info, diag) == -errno.ESPIPE
    finally:
        os.close(reader)
        os.close(writer)


def test_the_header_of_an_sdk_image_is_found() -> None:
    info = measure(sdk_image().to_bytes())
    assert info.sdk == 1
    assert bytes(info.header) == sdk_header()


def test_a_header_that_is_not_measured_is_no_header() -> None:
    image = Stream(size=SIZE).page(0, REG | R, sdk_header(), measured=False)
    assert measure(image.to_bytes()).sdk == 0


@pytest.mark.parametrize(
    "change",
    [
        {"abi_version": 2},
        {"size": 2 * SIZE},
        {"client_slots": 2},
        {"client_slots": 0xFFFFFFFF},
        {"io_slots": 0xFFFFFFFF, "client_slots": 4},
        {"nssa": 0},
        {"nssa": 0xFFFFFFFF},
        {"ssa_frame_size": 2 * PAGE},
        {"ssa_frame_size": 0},
        {"tcs_offset": 0x2000},
        {"tcs_offset": 0x1800},
        {"tcs_offset": (1 << 64) - PAGE},
        {"td_offset": SIZE - PAGE},
        {"td_stride": 1 << 63},
        {"stack_offset": (1 << 64) - 1},
        {"stack_size": (1 << 64) - 1},
        {"stack_stride": (1 << 64) - 1},
        {"ssa_offset": SIZE},
        {"heap_offset": 0xD001},
        {"heap_size": (1 << 64) - 1},
        {"rela_count": 1 << 60},
        {"rela_offset": SIZE},
    ],
    ids=str,
)
def test_a_header_that_contradicts_its_image_is_refused(change: dict[str, int]) -> None:
    refusal = refused(sdk_image(**change).to_bytes())
    assert (refusal.step, refusal.code) == (lib.TEEMATE_STEP_PARSE, lib.TEEMATE_BAD_HEADER)
    assert refusal.offset == 128  # the EEXTEND that carries it


def test_the_small_image_of_these_tests_is_good() -> None:
    assert measure(small_image().to_bytes()).pages == 7
