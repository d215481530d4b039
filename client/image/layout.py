"""Where everything of an enclave lies in ELRANGE, and writing it as an SGXS stream.

The mirror of ``struct tm_image_header`` and ``struct tm_td_static`` in
native/include/teemate_abi.h; a test compares the two.  From the base upwards, with an
unmapped guard page between any two of them::

    segments of the ELF      measured   the header is its first 128 bytes
    thread data, a page per TCS   measured
    stacks, each with a guard page below
    SSA frames, nssa per TCS
    TCSs, one after the other     measured
    heap

Stacks, SSA frames and heap are added by EADD alone: what they hold at the start is the
host's choice and no enclave may rely on it (the SDK does not), and measuring zeros would make
images larger and loading slower.  The heap comes last, so that another heap size moves nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from .._sizes import format_size
from ._problem import problem
from .elf import Elf, Segment
from .sgxs import PAGE, PageFlags, Writer

__all__ = [
    "HEADER_SIZE",
    "MAX_SLOTS",
    "WARDEN_SLOTS",
    "ImageHeader",
    "Layout",
    "LayoutOptions",
    "Region",
    "plan",
    "write",
]

ABI_VERSION = 1
MAGIC = 0x3145544D45455400
FLAG_DEBUG = 1
FLAG_TIME = 2
WARDEN_SLOTS = 2
MAX_SLOTS = 4096
# native/warden/protocol.h, WARDEN_SEGMENTS: an enclave is described in one message.
MAX_SEGMENTS = 128
# The largest ELRANGE of the CPUs that SGX is tried on (CPUID.12H.0:EDX.MaxEnclaveSize_64 = 36).
MAX_SIZE = 1 << 36
MIN_STACK = 2 * PAGE
MIN_NSSA = 3
MAX_NSSA = 64
# XFRM = 3: 576 bytes of XSAVE area, EXINFO and GPRSGX fit in one page (SDM 3D, "SSA frame").
SSA_FRAME = PAGE

_HEADER = struct.Struct("<Q6I12Q")
HEADER_SIZE = _HEADER.size
_TD = struct.Struct("<QQQ16xQ")
# struct sgx_tcs: state, flags, OSSA, CSSA, NSSA, OENTRY, AEP, OFSBASE, OGSBASE, FSLIMIT, GSLIMIT.
_TCS = struct.Struct("<QQQIIQQQQII")

_R = PageFlags.REG | PageFlags.R
_RW = _R | PageFlags.W
_ZERO = bytes(PAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutOptions:
    """What the author chooses.  Sizes in bytes; `slots` are those for clients.

    `debug` permits debug prints and tells faulting addresses, `time` asks the warden for the time
    of day; `measure_heap` measures the heap's zeros, for images that rely on them.
    """

    slots: int = 8
    io_slots: int = 0
    stack: int = 64 << 10
    heap: int = 1 << 20
    nssa: int = MIN_NSSA
    debug: bool = False
    time: bool = False
    measure_heap: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    """struct tm_image_header without the magic; offsets from the base and sizes in bytes."""

    abi_version: int
    flags: int
    io_slots: int
    client_slots: int
    nssa: int
    ssa_frame_size: int
    size: int
    tcs_offset: int
    td_offset: int
    td_stride: int
    stack_offset: int
    stack_stride: int
    stack_size: int
    ssa_offset: int
    heap_offset: int
    heap_size: int
    rela_offset: int
    rela_count: int

    @property
    def debug(self) -> bool:
        """Whether it is a debug image: prints, and faulting addresses, leave the enclave."""
        return bool(self.flags & FLAG_DEBUG)

    @property
    def tcs_count(self) -> int:
        """TCSs of warden, I/O and clients."""
        return WARDEN_SLOTS + self.io_slots + self.client_slots

    def to_bytes(self) -> bytes:
        """Return the 128 bytes as they lie at the base."""
        return _HEADER.pack(MAGIC, *(getattr(self, name) for name in self.__slots__))

    @classmethod
    def from_bytes(cls, data: bytes) -> ImageHeader | None:
        """Read the header from the first bytes of ELRANGE; None when there is none (a bare image)."""
        if len(data) < HEADER_SIZE:
            return None
        magic, *values = _HEADER.unpack_from(data)
        if magic != MAGIC:
            return None
        return cls(**dict(zip(cls.__slots__, values, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Pages of one purpose: `size` bytes at `offset`, SECINFO `flags`."""

    name: str
    offset: int
    size: int
    flags: int
    measured: bool

    @property
    def end(self) -> int:
        """Offset of the first byte above it."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A finished plan: ``write`` makes the stream of it."""

    elf: Elf
    header: ImageHeader
    regions: tuple[Region, ...] = field(repr=False)
    measure_heap: bool = False

    @property
    def pages(self) -> int:
        """EPC pages that an enclave of it takes, its SECS not counted."""
        return sum(region.size for region in self.regions) // PAGE


def _option(name: str, value: object, reason: str) -> Exception:
    return problem("layout", f"--{name} {value}: {reason}", option=f"--{name}")


def _check(options: LayoutOptions, sdk: bool) -> None:
    if options.slots < 1:
        raise _option("slots", options.slots, "an image needs at least one slot for clients")
    if options.io_slots < 0:
        raise _option("io-slots", options.io_slots, "there cannot be fewer than none")
    total = WARDEN_SLOTS + options.io_slots + options.slots
    if total > MAX_SLOTS:
        raise _option(
            "slots",
            options.slots,
            f"with {total - options.slots} for warden and I/O that is more than {MAX_SLOTS} TCSs",
        )
    least = MIN_NSSA if sdk else 1
    if not least <= options.nssa <= MAX_NSSA:
        raise _option("nssa", options.nssa, f"it must be {least} to {MAX_NSSA} SSA frames per TCS")
    if options.stack % PAGE or options.stack < MIN_STACK:
        raise _option(
            "stack",
            format_size(options.stack),
            f"it must be a multiple of 4 KiB of at least {format_size(MIN_STACK)}",
        )
    if options.heap % PAGE or options.heap < 0:
        raise _option("heap", format_size(options.heap), "it must be a multiple of 4 KiB")


def plan(elf: Elf, options: LayoutOptions) -> Layout:
    """Place everything.  Raises ImageError (step ``layout``) that names the option."""
    _check(options, elf.sdk)
    count = WARDEN_SLOTS + options.io_slots + options.slots
    regions: list[Region] = [
        Region(name=_name(s), offset=s.start, size=s.end - s.start, flags=_flags(s), measured=True)
        for s in elf.segments
    ]

    def place(name: str, size: int, flags: int, *, measured: bool) -> int:
        offset = regions[-1].end + PAGE
        regions.append(Region(name=name, offset=offset, size=size, flags=flags, measured=measured))
        return offset

    td = place("thread data", count * PAGE, _RW, measured=True)
    stacks = [place(f"stack {n}", options.stack, _RW, measured=False) for n in range(count)]
    ssa = place("SSA frames", count * options.nssa * SSA_FRAME, _RW, measured=False)
    tcs = place("TCSs", count * PAGE, PageFlags.TCS, measured=True)
    heap = (
        place("heap", options.heap, _RW, measured=options.measure_heap) if options.heap else regions[-1].end
    )
    size = max(2 * PAGE, 1 << (regions[-1].end - 1).bit_length())
    if size > MAX_SIZE:
        largest = max(
            (("heap", options.heap), ("stack", options.stack * count)), key=lambda candidate: candidate[1]
        )[0]
        value = options.heap if largest == "heap" else options.stack
        raise _option(
            largest,
            format_size(value),
            f"the enclave would have {format_size(size)}, {format_size(MAX_SIZE)} is the most",
        )
    if len(regions) > MAX_SEGMENTS:
        raise _option(
            "slots",
            options.slots,
            f"every TCS has a stack of its own between guard pages, which makes {len(regions)} ranges; "
            f"{MAX_SEGMENTS} is the most, so at most {options.slots - len(regions) + MAX_SEGMENTS} slots",
        )
    header = ImageHeader(
        abi_version=ABI_VERSION,
        flags=FLAG_DEBUG * options.debug | FLAG_TIME * options.time,
        io_slots=options.io_slots,
        client_slots=options.slots,
        nssa=options.nssa,
        ssa_frame_size=SSA_FRAME,
        size=size,
        tcs_offset=tcs,
        td_offset=td,
        td_stride=PAGE,
        stack_offset=stacks[0],
        stack_stride=options.stack + PAGE,
        stack_size=options.stack,
        ssa_offset=ssa,
        heap_offset=heap,
        heap_size=options.heap,
        rela_offset=elf.rela_offset,
        rela_count=elf.rela_count,
    )
    return Layout(elf=elf, header=header, regions=tuple(regions), measure_heap=options.measure_heap)


def write(layout: Layout, stream: BinaryIO) -> bytes:
    """Write the SGXS stream of `layout` to `stream`, which stays open; return MRENCLAVE (32 bytes)."""
    header = layout.header
    writer = Writer(stream, size=header.size, ssa_frame_pages=header.ssa_frame_size // PAGE)
    named = {"thread data": _thread_data, "TCSs": _tcs_pages}
    for index, region in enumerate(layout.regions):
        if index < len(layout.elf.segments):
            pages = _segment_pages(layout, layout.elf.segments[index])
        elif region.name in named:
            pages = named[region.name](layout)
        elif region.measured:
            pages = (_ZERO for _ in range(region.size // PAGE))
        else:
            writer.zeros(region.offset, region.flags, region.size // PAGE)
            continue
        for number, page in enumerate(pages):
            writer.page(region.offset + number * PAGE, region.flags, page)
    return writer.mrenclave()


def _name(segment: Segment) -> str:
    return "code" if segment.execute else "data" if segment.write else "constants"


def _flags(segment: Segment) -> int:
    return (
        PageFlags.REG
        | (PageFlags.R if segment.read or segment.write else 0)
        | (PageFlags.W if segment.write else 0)
        | (PageFlags.X if segment.execute else 0)
    )


def _segment_pages(layout: Layout, segment: Segment) -> Iterator[bytes]:
    data = bytearray(segment.offset - segment.start) + segment.data
    if layout.elf.sdk and segment.start == 0:
        data[:HEADER_SIZE] = layout.header.to_bytes()
    for start in range(0, segment.end - segment.start, PAGE):
        yield bytes(data[start : start + PAGE]).ljust(PAGE, b"\0")


def _thread_data(layout: Layout) -> Iterator[bytes]:
    header = layout.header
    for index in range(header.tcs_count):
        top = header.stack_offset + index * header.stack_stride + header.stack_size
        yield _TD.pack(header.td_offset + index * header.td_stride, index, top, 0).ljust(PAGE, b"\0")


def _tcs_pages(layout: Layout) -> Iterator[bytes]:
    header = layout.header
    for index in range(header.tcs_count):
        ssa = header.ssa_offset + index * header.nssa * header.ssa_frame_size
        data = header.td_offset + index * header.td_stride
        # FSLIMIT and GSLIMIT are looked at in 32-bit enclaves only; their low bits must be set there.
        tcs = _TCS.pack(0, 0, ssa, 0, header.nssa, layout.elf.entry, 0, data, data, 0xFFFFFFFF, 0xFFFFFFFF)
        yield tcs.ljust(PAGE, b"\0")
