from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_api import file_of, measure
from sgxs_writer import CHUNK, PAGE, REG, TCS, R, Stream, W, X, eadd, eextend, small_image, unmeasured

from teemate._native import ffi, lib


def test_the_measurement_is_the_hash_of_all_measured_records() -> None:
    image = small_image()
    assert bytes(measure(image.to_bytes()).mrenclave) == image.mrenclave()


def test_the_counts_say_what_the_image_holds() -> None:
    image = small_image()
    info = measure(image.to_bytes())
    assert info.size == 64 * 1024
    assert info.pages == 7
    assert info.measured_bytes == 2 * PAGE
    assert info.file_bytes == len(image.to_bytes())
    assert info.ssa_frame_pages == 1
    assert info.tcs_count == 1
    assert info.segment_count == 4  # code, TCS, SSA, heap behind a gap
    assert info.sdk == 0
    assert bytes(info.header) == bytes(128)


def test_pages_of_equal_kind_are_one_segment() -> None:
    image = Stream()
    for offset in range(0, 4 * PAGE, PAGE):
        image.page(offset, REG | R | W)
    image.page(4 * PAGE, REG | R | W | X)
    assert measure(image.to_bytes()).segment_count == 2


def test_unmeasured_data_does_not_count() -> None:
    image = Stream().page(0, REG | R | W, b"one").page(PAGE, REG | R | W, b"two", measured=False)
    other = Stream().page(0, REG | R | W, b"one").page(PAGE, REG | R | W, b"six", measured=False)
    assert bytes(measure(image.to_bytes()).mrenclave) == image.mrenclave()
    assert image.mrenclave() == other.mrenclave()
    assert measure(image.to_bytes()).measured_bytes == PAGE


def test_chunks_of_a_page_may_come_in_any_order() -> None:
    image = Stream()
    image.records += [eadd(0, REG | R), eextend(512, b"c"), eextend(0, b"a"), unmeasured(256, b"b")]
    assert bytes(measure(image.to_bytes()).mrenclave) == image.mrenclave()


def test_the_position_of_the_descriptor_does_not_matter() -> None:
    image = small_image()
    info, diag = ffi.new("struct teemate_image_info *"), ffi.new("struct teemate_diag *")
    with file_of(image.to_bytes()) as fd:  # which leaves the position at the end
        assert lib.teemate_image_measure(fd, info, diag) == 0
        assert lib.teemate_image_measure(fd, info, ffi.NULL) == 0
    assert bytes(info.mrenclave) == image.mrenclave()


@pytest.mark.parametrize("seed", range(4))
def test_streams_longer_than_any_buffer_are_measured_right(seed: int) -> None:
    draw = random.Random(seed)
    image = Stream(size=8 << 20)
    for page in range(600):
        kind = draw.choice([REG | R, REG | R | W, REG | R | X, TCS])
        image.records.append(eadd(page * PAGE, kind))
        for chunk in range(draw.choice([0, 1, 16])):
            record = draw.choice([eextend, eextend, eextend, unmeasured])
            image.records.append(record(page * PAGE + chunk * CHUNK, draw.randbytes(CHUNK)))
    assert bytes(measure(image.to_bytes()).mrenclave) == image.mrenclave()


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    pages = draw(st.lists(st.integers(0, 15), unique=True, max_size=8).map(sorted))
    image = Stream(size=16 * PAGE)
    for page in pages:
        image.records.append(eadd(page * PAGE, draw(st.sampled_from([REG | R, REG | R | W, TCS]))))
        for chunk in draw(st.lists(st.integers(0, 15), unique=True, max_size=5)):
            record = draw(st.sampled_from([eextend, unmeasured]))
            image.records.append(record(page * PAGE + chunk * CHUNK, draw(st.binary(max_size=CHUNK))))
    return image


@settings(max_examples=200, deadline=None)
@given(image=streams())
def test_every_canonical_stream_is_measured_right(image: Stream) -> None:
    info = measure(image.to_bytes())
    assert bytes(info.mrenclave) == image.mrenclave()
    assert info.pages == sum(record.startswith(b"EADD") for record in image.records)
    assert info.measured_bytes == CHUNK * sum(record.startswith(b"EEXTEND") for record in image.records)
