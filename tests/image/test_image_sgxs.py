from __future__ import annotations

import hashlib
import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teemate.errors import ImageError
from teemate.image import sgxs
from teemate.image.sgxs import PAGE, Add, Create, Extend, PageFlags, Unmeasured, Writer

RW = PageFlags.REG | PageFlags.R | PageFlags.W
SIZE = 1 << 20


def record(tag: bytes, *words: int) -> bytes:
    return struct.pack("<8s" + "Q" * len(words), tag, *words).ljust(64, b"\0")


def create(size: int = SIZE, frame: int = 1) -> bytes:
    return struct.pack("<8sIQ44x", b"ECREATE", frame, size)


def add(offset: int, flags: int = RW) -> bytes:
    return record(b"EADD", offset, flags)


def extend(offset: int, data: bytes = bytes(256), tag: bytes = b"EEXTEND") -> bytes:
    return record(tag, offset) + data


def listed(stream: bytes) -> list[sgxs.Record]:
    return list(sgxs.read(io.BytesIO(stream)))


pages = st.lists(
    st.tuples(
        st.integers(0, SIZE // PAGE - 1),
        st.sampled_from([RW, PageFlags.REG | PageFlags.R, PageFlags.REG | PageFlags.R | PageFlags.X]),
        st.sampled_from(["measured", "unmeasured", "zeros"]),
        st.binary(min_size=1, max_size=64),
    ),
    unique_by=lambda page: page[0],
    max_size=12,
).map(sorted)


@given(pages=pages, frame=st.integers(1, 4))
def test_what_the_writer_writes_is_what_the_reader_reads(
    pages: list[tuple[int, int, str, bytes]], frame: int
) -> None:
    stream = io.BytesIO()
    writer = Writer(stream, size=SIZE, ssa_frame_pages=frame)
    for number, flags, kind, data in pages:
        if kind == "zeros":
            writer.zeros(number * PAGE, flags, 1)
        else:
            page = (data * (PAGE // len(data) + 1))[:PAGE]
            writer.page(number * PAGE, flags, page, measured=kind == "measured")

    first, *records = listed(stream.getvalue())
    assert first == Create(at=0, size=SIZE, ssa_frame_pages=frame)
    found: dict[int, bytes] = {}
    for one in records:
        if isinstance(one, Add):
            found[one.offset] = b""
        else:
            assert isinstance(one, Extend | Unmeasured)
            found[one.offset & ~(PAGE - 1)] += one.data
    assert [offset // PAGE for offset in found] == [number for number, *_ in pages]
    for number, _, kind, data in pages:
        expected = b"" if kind == "zeros" else (data * (PAGE // len(data) + 1))[:PAGE]
        assert found[number * PAGE] == expected
    assert writer.pages == len(pages)
    stream.seek(0)
    assert writer.mrenclave() == sgxs.measure(stream)


@given(pages=pages)
def test_the_measurement_is_the_sha256_of_all_but_unmeasured_records(
    pages: list[tuple[int, int, str, bytes]],
) -> None:
    stream = create()
    measured = hashlib.sha256(create())
    for number, flags, kind, data in pages:
        stream += add(number * PAGE, flags)
        measured.update(add(number * PAGE, flags))
        chunk = extend(
            number * PAGE, data.ljust(256, b"\1"), b"EEXTEND" if kind == "measured" else b"UNMEASRD"
        )
        stream += chunk
        if kind == "measured":
            measured.update(chunk)
    assert sgxs.measure(io.BytesIO(stream)) == measured.digest()


def test_chunks_of_a_page_may_come_in_any_order() -> None:
    data = b"x" * 256
    records = listed(create() + add(0) + extend(768, data) + extend(0, data) + extend(256, data, b"UNMEASRD"))
    assert [type(one).__name__ for one in records] == ["Create", "Add", "Extend", "Extend", "Unmeasured"]


def test_a_large_heap_costs_one_record_per_page() -> None:
    stream = io.BytesIO()
    Writer(stream, size=1 << 27, ssa_frame_pages=1).zeros(0, RW, (64 << 20) // PAGE)
    assert len(stream.getvalue()) == 64 * (1 + (64 << 20) // PAGE)


BAD = {
    "nothing at all": (b"", 0, "no SGXS"),
    "something else": (b"\x7fELF" + bytes(100), 0, "does not start with ECREATE"),
    "a page before ECREATE": (add(0), 0, "does not start with ECREATE"),
    "a size that is still open": (b"UNSIZED\0" + create()[8:], 0, "UNSIZED"),
    "a size that is no power of two": (create(SIZE + PAGE), 0, "power of two"),
    "a size of one page": (create(PAGE), 0, "power of two"),
    "no SSA frame": (create(frame=0), 0, "SSA frame"),
    "reserved bytes in ECREATE": (create()[:63] + b"\1", 0, "reserved"),
    "ECREATE twice": (create() + create(), 64, "no record"),
    "an unknown tag": (create() + record(b"EREMOVE", 0), 64, "no record"),
    "a page outside": (create() + add(SIZE), 64, "not inside"),
    "a page far outside": (create() + add((1 << 64) - PAGE), 64, "not inside"),
    "a page that is not aligned": (create() + add(256), 64, "not aligned"),
    "a page twice": (create() + add(0) + add(0), 128, "comes after"),
    "pages in the wrong order": (create() + add(PAGE) + add(0), 128, "comes after"),
    "a page of an odd type": (create() + add(0, PageFlags.R | 3 << 8), 64, "no such page"),
    "a page with unknown flags": (create() + add(0, RW | 1 << 20), 64, "no such page"),
    "a page that is pending": (create() + add(0, RW | 8), 64, "no such page"),
    "a page to write only": (create() + add(0, PageFlags.REG | PageFlags.W), 64, "not readable"),
    "a TCS with permissions": (create() + add(0, PageFlags.TCS | PageFlags.R), 64, "permissions"),
    "reserved bytes in EADD": (create() + add(0)[:63] + b"\1", 64, "reserved"),
    "data without a page": (create() + extend(0), 64, "no page"),
    "data for another page": (create() + add(0) + extend(PAGE), 128, "no part of"),
    "data that is not aligned": (create() + add(0) + extend(16), 128, "no part of"),
    "data twice": (create() + add(0) + extend(0) + extend(0, tag=b"UNMEASRD"), 128 + 320, "twice"),
    "reserved bytes in EEXTEND": (
        create() + add(0) + extend(0)[:63] + b"\1" + bytes(256),
        128,
        "reserved",
    ),
    "a record that is cut off": (create() + add(0)[:63], 64, "inside of a record"),
    "data that is cut off": (create() + add(0) + extend(0)[:-1], 128, "inside of the data"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_stream_is_refused_with_the_place_and_the_reason(name: str) -> None:
    stream, offset, reason = BAD[name]
    with pytest.raises(ImageError, match=reason) as caught:
        listed(stream)
    assert caught.value.detail["step"] == "sgxs"
    assert caught.value.detail["offset"] == offset
    with pytest.raises(ImageError):
        sgxs.measure(io.BytesIO(stream))


@given(st.binary(max_size=400))
def test_garbage_is_an_image_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(ImageError):
        listed(data)
    try:
        listed(create() + data)
    except ImageError:
        pass
    else:
        assert data == b"" or data.startswith(b"EADD\0\0\0\0")


@pytest.mark.parametrize("size", [0, PAGE, 3 * PAGE, SIZE + 1])
def test_the_writer_refuses_a_size_that_no_enclave_has(size: int) -> None:
    with pytest.raises(ImageError, match="power of two"):
        Writer(io.BytesIO(), size=size, ssa_frame_pages=1)


@pytest.mark.parametrize("offset", [0, 100, SIZE, SIZE - PAGE])
def test_the_writer_refuses_pages_that_overlap_or_lie_outside(offset: int) -> None:
    writer = Writer(io.BytesIO(), size=SIZE, ssa_frame_pages=1)
    writer.zeros(0, RW, 2)
    with pytest.raises(ImageError, match="page"):
        writer.zeros(offset, RW, 2)
