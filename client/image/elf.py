"""Enclaves as the compiler leaves them: what an image needs of an ELF file, and symbols for faults.

An enclave's ELF is a static position independent executable that is linked at 0, so that
an address in it is an offset from the enclave's base.  An *SDK image* has a symbol
``tm_image_header`` at 0 with 128 bytes of room for ``struct tm_image_header``; an ELF
without it is a *bare* one, which gets no header.
"""

from __future__ import annotations

import bisect
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What pyelftools returns is converted here, once.
from elftools.common.exceptions import DWARFError, ELFError
from elftools.construct import ConstructError
from elftools.elf.elffile import ELFFile

from ._problem import problem
from .sgxs import PAGE

__all__ = ["HEADER_SYMBOL", "Elf", "Location", "Segment", "Symbols", "load_elf"]

HEADER_SYMBOL = "tm_image_header"

_R_X86_64_RELATIVE = 8
_RELA_SIZE = 24
_PF_X, _PF_W, _PF_R = 1, 2, 4
# Far more than any enclave's code and static data, and little enough to be laid out at once.
_MAX_LOADED = 1 << 30

# What pyelftools lets through when a file is damaged: it checks few of the numbers that it follows.
_UNREADABLE = (
    ELFError,
    DWARFError,
    ConstructError,
    ValueError,
    OverflowError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A PT_LOAD: `size` bytes at `offset` from the base, the first of them are `data`, the rest zeros."""

    offset: int
    size: int
    data: bytes
    read: bool
    write: bool
    execute: bool

    @property
    def start(self) -> int:
        """Offset of its first page."""
        return self.offset & ~(PAGE - 1)

    @property
    def end(self) -> int:
        """Offset of the first page that is not its own."""
        return (self.offset + self.size + PAGE - 1) & ~(PAGE - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Elf:
    """What of an ELF goes into an image.  Offsets count from the enclave's base."""

    segments: tuple[Segment, ...]
    entry: int
    sdk: bool
    rela_offset: int
    rela_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where an address lies: any part may be unknown (None)."""

    function: str | None
    file: str | None
    line: int | None

    def __str__(self) -> str:
        place = None if self.file is None else f"{self.file}:{self.line}" if self.line else self.file
        if self.function and place:
            return f"{self.function} ({place})"
        return self.function or place or "unknown"


def load_elf(path: Path) -> Elf:
    """Read the ELF at `path` and check that an enclave can be made of it.

    Raises :class:`~teemate.errors.ImageError` (step ``elf``) that says what an enclave cannot
    have: an interpreter, shared libraries, thread-local storage, text relocations.
    """
    data = path.read_bytes()
    try:
        return _load(ELFFile(io.BytesIO(data)), path)
    except _UNREADABLE as exc:
        raise problem("elf", f"{path} is no ELF file that can be read: {exc}", file=str(path)) from exc


def _load(elf: Any, path: Path) -> Elf:
    name = str(path)
    if elf.elfclass != 64 or not elf.little_endian or elf["e_machine"] != "EM_X86_64":
        raise problem("elf", f"{path} is not for x86-64", file=name)
    if elf["e_type"] not in ("ET_DYN", "ET_EXEC"):
        raise problem(
            "elf", f"{path} is not linked ({elf['e_type']}): link it with -static-pie first", file=name
        )
    segments: list[Segment] = []
    rela_at = rela_size = 0
    for header in elf.iter_segments():
        match header["p_type"]:
            case "PT_INTERP":
                raise problem("elf", f"{path} wants an interpreter: link it with -static-pie", file=name)
            case "PT_TLS":
                raise problem(
                    "elf",
                    f"{path} has thread-local variables (_Thread_local): an enclave has state per enclave, "
                    "per identity or per slot instead",
                    file=name,
                )
            case "PT_DYNAMIC":
                rela_at, rela_size = _dynamic(header, path)
            case "PT_LOAD" if header["p_memsz"]:
                segments.append(_segment(header, path))
    segments.sort(key=lambda segment: segment.offset)
    if not segments:
        raise problem("elf", f"{path} has nothing to load", file=name)
    if segments[-1].end > _MAX_LOADED:
        raise problem(
            "elf", f"{path} wants {segments[-1].end:#x} bytes, {_MAX_LOADED:#x} is the most", file=name
        )
    for before, after in itertools.pairwise(segments):
        if after.start < before.end:
            raise problem(
                "elf", f"segments at {before.offset:#x} and {after.offset:#x} share a page", file=name
            )
    _check_relocations(segments, rela_at, rela_size, name)
    entry = elf["e_entry"]
    if not any(s.execute and s.offset <= entry < s.offset + s.size for s in segments):
        raise problem("elf", f"the entry {entry:#x} is not in an executable segment", file=name)
    return Elf(
        segments=tuple(segments),
        entry=entry,
        sdk=_has_header(elf, segments, name),
        rela_offset=rela_at,
        rela_count=rela_size // _RELA_SIZE,
    )


def _segment(header: Any, path: Path) -> Segment:
    flags = header["p_flags"]
    data = header.data()
    if len(data) != header["p_filesz"] or header["p_filesz"] > header["p_memsz"]:
        raise problem(
            "elf", f"segment at {header['p_vaddr']:#x} is cut off", offset=header["p_offset"], file=str(path)
        )
    if flags & _PF_W and flags & _PF_X:
        raise problem(
            "elf",
            f"segment at {header['p_vaddr']:#x} is writable and executable: keep code and data apart",
            file=str(path),
        )
    return Segment(
        offset=header["p_vaddr"],
        size=header["p_memsz"],
        data=data,
        read=bool(flags & _PF_R),
        write=bool(flags & _PF_W),
        execute=bool(flags & _PF_X),
    )


def _dynamic(header: Any, path: Path) -> tuple[int, int]:
    """Return where the relocations are and how many bytes they have."""
    values = {"DT_RELA": 0, "DT_RELASZ": 0}
    for tag in header.iter_tags():
        match tag.entry.d_tag:
            case "DT_NEEDED":
                raise problem(
                    "elf",
                    f"{path} needs {tag.needed}: there are no shared libraries in an enclave",
                    file=str(path),
                )
            case "DT_TEXTREL":
                raise problem(
                    "elf", f"{path} has relocations in its code: compile with -fPIE", file=str(path)
                )
            case "DT_RELA" | "DT_RELASZ":
                values[tag.entry.d_tag] = tag.entry.d_val
    return (values["DT_RELA"], values["DT_RELASZ"]) if values["DT_RELASZ"] else (0, 0)


def _check_relocations(segments: list[Segment], at: int, size: int, name: str) -> None:
    """The first entry applies R_X86_64_RELATIVE to writable words, and knows nothing else."""
    if not size:
        return
    home = next((s for s in segments if s.offset <= at and at + size <= s.offset + len(s.data)), None)
    if home is None or size % _RELA_SIZE:
        raise problem(
            "elf", f"the {size} bytes of relocations at {at:#x} are not in the loaded part", file=name
        )
    table = home.data[at - home.offset : at - home.offset + size]
    for start in range(0, size, _RELA_SIZE):
        target = int.from_bytes(table[start : start + 8], "little")
        kind = int.from_bytes(table[start + 8 : start + 12], "little")
        if kind != _R_X86_64_RELATIVE:
            raise problem(
                "elf",
                f"relocation of type {kind} at {target:#x}: only R_X86_64_RELATIVE can be applied inside, "
                "so every symbol must be defined",
                file=name,
            )
        if not any(s.write and s.offset <= target and target + 8 <= s.offset + s.size for s in segments):
            raise problem("elf", f"relocation at {target:#x} is not in a writable segment", file=name)


def _has_header(elf: Any, segments: list[Segment], name: str) -> bool:
    table = elf.get_section_by_name(".symtab")
    symbols = (table.get_symbol_by_name(HEADER_SYMBOL) or []) if table else []
    if not symbols:
        return False
    value = symbols[0]["st_value"]
    first = segments[0]
    if value != 0 or first.offset != 0 or first.write or first.size < 128:
        raise problem(
            "elf", f"{HEADER_SYMBOL} is at {value:#x}: it must open a read-only segment at 0", file=name
        )
    return True


class Symbols:
    """Functions and lines of an unstripped ELF, for reports of faults.

    Reading is done at the first question and takes some 100 ms for an image; what the file does
    not tell is None in the answer, so an ELF without debug information is no error.
    """

    def __init__(self, path: Path) -> None:
        """`path` is opened when it is needed, not before, and not kept open."""
        self._path = path
        self._functions: list[tuple[int, int, str]] | None = None
        self._lines: list[tuple[int, int, str, int]] = []

    def at(self, offset: int) -> Location:
        """Return the function and line of the instruction at `offset` from the enclave's base.

        Raises :class:`~teemate.errors.ImageError` when the file is no ELF, OSError when it cannot be read.
        """
        if self._functions is None:
            self._load()
        functions = self._functions or []
        function = _covering([(low, high) for low, high, _ in functions], offset)
        line = _covering([(low, high) for low, high, _, _ in self._lines], offset)
        return Location(
            function=None if function is None else functions[function][2],
            file=None if line is None else self._lines[line][2],
            line=None if line is None else self._lines[line][3] or None,
        )

    def address(self, name: str) -> int | None:
        """Return the offset of the function `name`, None when there is none."""
        if self._functions is None:
            self._load()
        return next((low for low, _, found in self._functions or [] if found == name), None)

    def _load(self) -> None:
        data = self._path.read_bytes()
        try:
            elf = ELFFile(io.BytesIO(data))
            self._lines = sorted(_lines(elf))
            self._functions = sorted(_functions(elf))
        except _UNREADABLE as exc:
            raise problem("elf", f"{self._path} cannot be read: {exc}", file=str(self._path)) from exc


def _covering(ranges: list[tuple[int, int]], offset: int) -> int | None:
    """Index of the range that holds `offset`; `ranges` are sorted."""
    index = bisect.bisect_right(ranges, (offset, 1 << 64)) - 1
    return index if index >= 0 and ranges[index][0] <= offset < ranges[index][1] else None


def _functions(elf: Any) -> Iterator[tuple[int, int, str]]:
    table = elf.get_section_by_name(".symtab")
    if table is None:
        return
    for symbol in table.iter_symbols():
        if symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_shndx"] != "SHN_UNDEF":
            start = symbol["st_value"]
            # gcc's clones are called divide.isra.0 and the like; the author knows divide.
            yield start, start + max(symbol["st_size"], 1), symbol.name.partition(".")[0]


def _lines(elf: Any) -> Iterator[tuple[int, int, str, int]]:
    if not elf.has_dwarf_info():
        return
    dwarf = elf.get_dwarf_info()
    for unit in dwarf.iter_CUs():
        program = dwarf.line_program_for_CU(unit)
        if program is None:
            continue
        # DWARF 5 counts files from 0, earlier versions from 1 (DWARF 5, section 6.2.4).
        base = 0 if program["version"] >= 5 else 1
        previous: Any = None
        dropped = False
        for entry in program.get_entries():
            state = entry.state
            if state is None:
                continue
            if previous is None:
                # The linker moves the lines of functions that it dropped to 0, where no code is.
                dropped = state.address == 0
            elif state.address > previous.address and not dropped:
                yield (
                    previous.address,
                    state.address,
                    _file_name(program, previous.file - base),
                    previous.line,
                )
            previous = None if state.end_sequence else state


def _file_name(program: Any, index: int) -> str:
    entries = program["file_entry"]
    if not 0 <= index < len(entries):
        return "?"
    entry = entries[index]
    name = _text(entry.name)
    directories = program["include_directory"]
    place = entry.dir_index if program["version"] >= 5 else entry.dir_index - 1
    if not name.startswith("/") and 0 <= place < len(directories):
        directory = _text(directories[place])
        if directory not in ("", "."):
            return f"{directory}/{name}"
    return name


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
