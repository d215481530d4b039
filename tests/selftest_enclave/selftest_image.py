"""The enclave of the kernel's SGX selftests as an SGXS image.

``test_encl.elf`` (tools/testing/selftests/sgx) is laid out as the selftests' loader does it (load.c,
encl_load): the first PT_LOAD segment holds TCSs, every further one is added with its permissions, offsets
count from the first one's place in the *file*, and a heap of zeros that is not measured comes last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile
from sgxs_writer import PAGE, REG, TCS, R, Stream, W, X, sign

HEAP = 4096
"""Bytes: ENCL_HEAP_SIZE_DEFAULT of the selftests."""

_PF_X, _PF_W, _PF_R = 1, 2, 4


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Pages of one kind: SECINFO flags, and what they hold (nothing: zeros, not measured)."""

    offset: int
    size: int
    flags: int
    content: bytes | None


@dataclass(frozen=True, kw_only=True)
class SelftestImage:
    """The files of the image, and where in it something is (offsets from the base)."""

    sgxs: Path
    sigstruct: Path
    mrenclave: bytes
    data: int
    """Of .data: the buffer of two pages."""
    dynamic_entry: int
    """Of ``encl_dyn_entry``, the entry of TCSs that are made later."""


def segments(elf: Path, heap: int = HEAP) -> list[Segment]:
    """Lay the ELF out."""
    raw = elf.read_bytes()
    found: list[Segment] = []
    with elf.open("rb") as stream:
        loads = [part for part in ELFFile(stream).iter_segments() if part["p_type"] == "PT_LOAD"]
        start = loads[0]["p_offset"] & -PAGE
        for load in loads:
            place = load["p_offset"] & -PAGE
            size = load["p_filesz"] + PAGE - 1 & -PAGE
            flags = TCS
            if found:
                permissions = ((_PF_R, R), (_PF_W, W), (_PF_X, X))
                flags = REG | sum(ours for theirs, ours in permissions if load["p_flags"] & theirs)
            content = raw[place : place + size].ljust(size, b"\0")
            found.append(Segment(offset=place - start, size=size, flags=flags, content=content))
    end = found[-1].offset + found[-1].size
    found.append(Segment(offset=end, size=heap, flags=REG | R | W, content=None))
    return found


def stream(parts: list[Segment]) -> Stream:
    """Write the segments as SGXS; ELRANGE is the power of two that holds them."""
    end = parts[-1].offset + parts[-1].size
    image = Stream(size=1 << (end - 1).bit_length())
    for part in parts:
        for at in range(0, part.size, PAGE):
            data = part.content[at : at + PAGE] if part.content is not None else b""
            image.page(part.offset + at, part.flags, data)
    return image


def symbol(elf: Path, name: str) -> int:
    """The value of a symbol: its offset from the base, since the ELF is linked at 0."""
    with elf.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        (found,) = table.get_symbol_by_name(name)
        return int(found["st_value"])


def convert(elf: Path, folder: Path) -> SelftestImage:
    """Write the image and a SIGSTRUCT by a key of this run to `folder`."""
    image = stream(segments(elf))
    sgxs, sigstruct = folder / "test_encl.sgxs", folder / "test_encl.sig"
    sgxs.write_bytes(image.to_bytes())
    sigstruct.write_bytes(sign(image.mrenclave()))
    return SelftestImage(
        sgxs=sgxs,
        sigstruct=sigstruct,
        mrenclave=image.mrenclave(),
        data=symbol(elf, "encl_buffer"),
        dynamic_entry=symbol(elf, "encl_dyn_entry"),
    )
