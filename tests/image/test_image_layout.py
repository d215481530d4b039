from __future__ import annotations

import io
import json
import struct
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teemate.errors import ImageError
from teemate.image import ImageHeader, LayoutOptions, layout_image, sdk_paths, sgxs
from teemate.image.elf import Elf, Segment, load_elf
from teemate.image.layout import HEADER_SIZE, MAX_SEGMENTS, plan, write
from teemate.image.sgxs import PAGE, PT_TCS, Add, Create, Extend
from teemate.image.sigstruct import FIELDS

# What a small SDK enclave looks like, so that layouts can be tried by the hundred.
ELF = Elf(
    segments=(
        Segment(offset=0, size=5000, data=b"\x11" * 5000, read=True, write=False, execute=False),
        Segment(offset=0x2000, size=3000, data=b"\xc3" * 3000, read=True, write=False, execute=True),
        Segment(offset=0x4100, size=9000, data=b"\x22" * 100, read=True, write=True, execute=False),
    ),
    entry=0x2040,
    sdk=True,
    rela_offset=0x1000,
    rela_count=3,
)

layouts = st.builds(
    LayoutOptions,
    slots=st.integers(1, 40),
    io_slots=st.integers(0, 4),
    stack=st.integers(2, 40).map(lambda n: n * PAGE),
    heap=st.integers(0, 300).map(lambda n: n * PAGE),
    nssa=st.integers(3, 8),
    debug=st.booleans(),
    time=st.booleans(),
)


@given(layouts)
def test_nothing_overlaps_and_a_guard_page_lies_between_any_two(options: LayoutOptions) -> None:
    layout = plan(ELF, options)
    header = layout.header
    for before, after in pairwise(layout.regions[2:]):
        assert after.offset >= before.end + PAGE
    assert all(region.offset % PAGE == 0 and region.size % PAGE == 0 for region in layout.regions)
    assert layout.regions[-1].end <= header.size
    assert header.size & (header.size - 1) == 0
    assert header.size < 2 * layout.regions[-1].end or header.size == 2 * PAGE
    assert layout.pages == sum(region.size for region in layout.regions) // PAGE


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(layouts)
def test_the_stream_says_what_the_header_says(options: LayoutOptions) -> None:
    stream = io.BytesIO()
    mrenclave = write(plan(ELF, options), stream)
    stream.seek(0)
    added: dict[int, int] = {}
    content: dict[int, bytes] = {}
    for record in sgxs.read(stream):
        if isinstance(record, Create):
            create = record
        elif isinstance(record, Add):
            added[record.offset] = record.flags
        else:
            assert isinstance(record, Extend)
            content[record.offset] = record.data
    stream.seek(0)
    assert sgxs.measure(stream) == mrenclave

    header = ImageHeader.from_bytes(content[0])
    assert header is not None
    assert create.size == header.size
    assert (header.client_slots, header.io_slots, header.nssa) == (
        options.slots,
        options.io_slots,
        options.nssa,
    )
    assert (header.stack_size, header.heap_size) == (options.stack, options.heap)
    assert header.debug == options.debug
    assert header.flags == options.debug + 2 * options.time
    assert (header.rela_offset, header.rela_count) == (ELF.rela_offset, ELF.rela_count)
    count = 2 + options.slots + options.io_slots
    assert header.tcs_count == count
    assert [o for o, flags in added.items() if flags >> 8 == PT_TCS] == [
        header.tcs_offset + n * PAGE for n in range(count)
    ]
    for index in range(count):
        tcs = header.tcs_offset + index * PAGE
        _, flags, ossa, cssa, nssa, oentry, _, ofs, ogs = struct.unpack_from("<QQQIIQQQQ", content[tcs])
        assert (flags, cssa, nssa, oentry) == (0, 0, options.nssa, ELF.entry)
        assert ossa == header.ssa_offset + index * options.nssa * PAGE
        assert ofs == ogs == header.td_offset + index * header.td_stride
        self_offset, number, top = struct.unpack_from("<QQQ", content[ofs])
        assert (self_offset, number) == (ofs, index)
        bottom = header.stack_offset + index * header.stack_stride
        assert top == bottom + options.stack
        assert bottom - PAGE not in added
        assert top not in added
        assert all(page in added for page in range(bottom, top, PAGE))
        assert all(ossa + n * PAGE in added for n in range(options.nssa))
    assert all(page in added for page in range(header.heap_offset, header.heap_offset + options.heap, PAGE))
    assert content[0x2000][:1] == b"\xc3"
    assert content[0x4100][:101] == b"\x22" * 100 + b"\0"


def test_the_heap_moves_nothing_else() -> None:
    small, large = (plan(ELF, LayoutOptions(heap=heap)) for heap in (1 << 20, 1 << 28))
    assert replace(small.header, size=0, heap_size=0) == replace(large.header, size=0, heap_size=0)


def test_a_measured_heap_is_in_the_measurement() -> None:
    streams = [io.BytesIO(), io.BytesIO()]
    for stream, measure_heap in zip(streams, (False, True), strict=True):
        write(plan(ELF, LayoutOptions(heap=1 << 20, measure_heap=measure_heap)), stream)
    assert len(streams[1].getvalue()) - len(streams[0].getvalue()) == (1 << 20) // 256 * 320


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"slots": 0}, "--slots"),
        ({"slots": 4095}, "--slots"),
        ({"slots": MAX_SEGMENTS}, "--slots"),
        ({"io_slots": -1}, "--io-slots"),
        ({"nssa": 2}, "--nssa"),
        ({"nssa": 65}, "--nssa"),
        ({"stack": 4096}, "--stack"),
        ({"stack": 10000}, "--stack"),
        ({"heap": 1}, "--heap"),
        ({"heap": 1 << 37}, "--heap"),
        ({"stack": 1 << 37}, "--stack"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_option_named(change: dict[str, int], option: str) -> None:
    with pytest.raises(ImageError, match=f"^layout: {option} ") as caught:
        plan(ELF, replace(LayoutOptions(), **change))  # type: ignore[arg-type]
    assert caught.value.detail["option"] == option


def test_the_limit_that_is_named_for_slots_is_the_one_that_fits() -> None:
    with pytest.raises(ImageError, match=r"at most \d+ slots") as caught:
        plan(ELF, LayoutOptions(slots=200))
    most = int(caught.value.message.split("at most ")[1].split()[0])
    plan(ELF, LayoutOptions(slots=most))
    with pytest.raises(ImageError):
        plan(ELF, LayoutOptions(slots=most + 1))


def test_a_bare_image_has_no_header_and_may_have_one_ssa_frame(bare_elf: Path, tmp_path: Path) -> None:
    elf = load_elf(bare_elf)
    assert not elf.sdk
    built = layout_image(bare_elf, tmp_path / "bare.sgxs", LayoutOptions(slots=1, nssa=1, heap=0))
    with built.sgxs.open("rb") as stream:
        first = next(r for r in sgxs.read(stream) if isinstance(r, Extend))
    assert ImageHeader.from_bytes(first.data) is None


def test_the_c_structures_have_the_layout_that_is_written(tmp_path: Path) -> None:
    """The C compiler is asked where every field lies."""
    structs = {
        "tm_image_header": ["magic", *ImageHeader.__slots__],
        "tm_td_static": ["self_offset", "index", "stack_top", "canary"],
        "sgx_tcs": [
            *("stage", "flags", "ossa", "cssa", "nssa", "oentry", "aep"),
            *("ofsbase", "ogsbase", "fslimit", "gslimit"),
        ],
        # C has the attributes and their masks as structures of two words.
        "sgx_sigstruct": [f.name for f in FIELDS if not f.name.startswith(("attribute", "xfrm"))],
    }
    lines = [
        f'printf("{{\\"key\\": \\"{s}.{f}\\", \\"at\\": %zu}}\\n", offsetof(struct {s}, {f}));'
        for s, names in structs.items()
        for f in names
    ]
    source = tmp_path / "offsets.c"
    source.write_text(
        "#include <stdio.h>\n#include <stddef.h>\n"
        '#include "sgx_arch.h"\n#include "teemate_abi.h"\n'
        '_Static_assert(TM_IMAGE_MAGIC == 0x3145544d45455400ull, "magic");\n'
        '_Static_assert(TM_WARDEN_SLOTS == 2 && TM_MAX_SLOTS == 4096 && TM_ABI_VERSION == 1, "limits");\n'
        '_Static_assert(TM_IMAGE_DEBUG == 1 && TM_IMAGE_TIME == 2, "flags");\n'
        '_Static_assert(offsetof(struct sgx_sigstruct, attributes) == 928, "attributes");\n'
        '_Static_assert(offsetof(struct sgx_sigstruct, attributemask) == 944, "attributemask");\n'
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    program = tmp_path / "offsets"
    include = sdk_paths().native / "include"
    subprocess.run(["cc", f"-I{include}", "-o", str(program), str(source)], check=True)
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    found = {row["key"]: row["at"] for row in map(json.loads, output.splitlines())}

    header = ImageHeader(**dict.fromkeys(ImageHeader.__slots__, 0))
    assert len(header.to_bytes()) == HEADER_SIZE == 128
    for name in ImageHeader.__slots__:
        data = replace(header, **{name: 1}).to_bytes()
        assert data[8:].index(1) + 8 == found[f"tm_image_header.{name}"], name
    assert [found[f"tm_td_static.{f}"] for f in structs["tm_td_static"]] == [0, 8, 16, 0x28]
    assert [found[f"sgx_tcs.{f}"] for f in structs["sgx_tcs"]] == [0, 8, 16, 24, 28, 32, 40, 48, 56, 64, 68]
    for field in FIELDS:
        if f"sgx_sigstruct.{field.name}" in found:
            assert field.offset == found[f"sgx_sigstruct.{field.name}"], field.name
