"""`teemate image info`: an image's facts, as a JSON object and as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._sizes import about_size, format_size
from ..errors import ImageError
from ..image.info import ImageInfo, SegmentInfo, TcsInfo, read_sigstruct
from ..image.layout import WARDEN_SLOTS, ImageHeader
from ..image.sigstruct import Sigstruct, attribute_names, verify

__all__ = ["describe", "show"]


def describe(path: Path, info: ImageInfo, signature: Path | None) -> dict[str, Any]:
    """Return everything about the image that `show` shows; sizes in bytes, hashes in hexadecimal."""
    return {
        "image": str(path),
        "mrenclave": info.mrenclave.hex(),
        "size": info.size,
        "pages": info.pages,
        "measured_bytes": info.measured,
        "file_bytes": info.file_size,
        "ssa_frame_pages": info.ssa_frame_pages,
        "sdk": _header(info.header),
        "signature": _signature(info, signature),
        "segments": [_segment(segment, info.header) for segment in info.segments],
        "tcs": [_tcs(number, tcs, info.header) for number, tcs in enumerate(info.tcs)],
    }


def _header(header: ImageHeader | None) -> dict[str, Any] | None:
    if header is None:
        return None
    return {name: getattr(header, name) for name in ImageHeader.__slots__} | {"debug": header.debug}


def _signature(info: ImageInfo, path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    facts: dict[str, Any] = {"file": str(path)}
    try:
        sigstruct = read_sigstruct(path)
    except ImageError as error:
        return facts | {"fits": False, "reason": error.message}
    facts |= _signed(sigstruct)
    try:
        verify(sigstruct, mrenclave=info.mrenclave)
    except ImageError as error:
        return facts | {"fits": False, "reason": error.message}
    return facts | {"fits": True, "reason": None}


def _signed(sigstruct: Sigstruct) -> dict[str, Any]:
    return {
        "mrsigner": sigstruct.mrsigner.hex(),
        "enclavehash": sigstruct.enclavehash.hex(),
        "isvprodid": sigstruct.isvprodid,
        "isvsvn": sigstruct.isvsvn,
        "date": sigstruct.day,
        "attributes": attribute_names(sigstruct.attributes),
        "xfrm": sigstruct.xfrm,
        "debug_allowed": sigstruct.debug_allowed,
    }


def _segment(segment: SegmentInfo, header: ImageHeader | None) -> dict[str, Any]:
    return {
        "offset": segment.offset,
        "size": segment.size,
        "type": segment.type,
        "permissions": segment.permissions,
        "measured_bytes": segment.measured,
        "use": _use(segment, header),
    }


def _use(segment: SegmentInfo, header: ImageHeader | None) -> str:
    """What the header says that these pages are for."""
    if segment.type == "TCS":
        return "TCSs"
    if header is not None:
        at = segment.offset
        stacks = header.stack_offset + header.tcs_count * header.stack_stride
        if at == header.td_offset:
            return "thread data"
        if header.stack_offset <= at < stacks and header.stack_stride:
            return f"stack {(at - header.stack_offset) // header.stack_stride}"
        if at == header.ssa_offset:
            return "SSA frames"
        if at == header.heap_offset and header.heap_size:
            return "heap"
        if at == 0:
            return "header, constants"
    return {"r-x": "code", "rw-": "data", "r--": "constants"}.get(segment.permissions, "")


def _tcs(number: int, tcs: TcsInfo, header: ImageHeader | None) -> dict[str, Any]:
    return {
        "number": number,
        "offset": tcs.offset,
        "entry": tcs.entry,
        "ssa": tcs.ssa,
        "nssa": tcs.nssa,
        "thread_data": tcs.fs,
        "for": _whose(number, header),
    }


def _whose(number: int, header: ImageHeader | None) -> str:
    if header is None:
        return "any"
    if number < WARDEN_SLOTS:
        return "warden"
    return "I/O" if number < WARDEN_SLOTS + header.io_slots else "client"


def show(facts: dict[str, Any]) -> None:
    """Print `facts` for people; as wide as the terminal, plain where it is none."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    _show_summary(facts, console)
    segments = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("OFFSET", "SIZE"):
        segments.add_column(name, justify="right", no_wrap=True)
    segments.add_column("TYPE", no_wrap=True)
    segments.add_column("MEASURED", justify="right", no_wrap=True)
    segments.add_column("WHAT", overflow="fold")  # the one that may wrap in a narrow terminal
    for row in _folded(facts["segments"]):
        segments.add_row(*row)
    console.print()
    console.print(segments)
    tcs = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("SLOTS", "FOR", "FIRST TCS", "ENTRY", "SSA FRAMES"):
        tcs.add_column(name, justify="left" if name == "FOR" else "right", no_wrap=True)
    for row in _slots(facts["tcs"]):
        tcs.add_row(*row)
    console.print()
    console.print(tcs)


def _show_summary(facts: dict[str, Any], console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    sdk = facts["sdk"]
    table.add_row("Image", Text(facts["image"]))
    table.add_row("MRENCLAVE", facts["mrenclave"])
    signature = facts["signature"]
    if signature is None:
        table.add_row("Signature", Text("none (sign it with `teemate image sign`)", style="yellow"))
    else:
        for label, text in _signature_rows(signature):
            table.add_row(label, text)
    table.add_row("ELRANGE", format_size(facts["size"]))
    pages = facts["pages"]
    table.add_row(
        "Pages",
        f"{pages} ({about_size(pages * 4096)}), {about_size(facts['measured_bytes'])} measured, "
        f"file {about_size(facts['file_bytes'])}",
    )
    if sdk is None:
        table.add_row("SDK", "no: an image with an entry of its own, it has no gate")
    else:
        kind = "debug" if sdk["debug"] else "release"
        table.add_row(
            "SDK", f"ABI {sdk['abi_version']}, {kind}" + (", wants the time" if sdk["flags"] & 2 else "")
        )
        table.add_row("Stack", f"{format_size(sdk['stack_size'])} per slot")
        table.add_row("Heap", format_size(sdk["heap_size"]))
    console.print(table)


def _signature_rows(signature: dict[str, Any]) -> list[tuple[str, Any]]:
    from rich.text import Text

    rows: list[tuple[str, Any]] = []
    if "mrsigner" in signature:
        rows.append(("MRSIGNER", signature["mrsigner"]))
    if signature["fits"]:
        rows.append(("Signature", Text("valid, for this image", style="green")))
    else:
        rows.append(("Signature", Text(f"DOES NOT FIT: {signature['reason']}", style="red")))
    if "mrsigner" in signature:
        debug = "debug allowed" if signature["debug_allowed"] else "no debug"
        rows.append(
            (
                "Signed",
                f"{signature['date']}, ISVPRODID {signature['isvprodid']}, ISVSVN {signature['isvsvn']}, "
                f"{signature['attributes']}, XFRM {signature['xfrm']:#x}, {debug}",
            )
        )
    return rows


def _measured(segment: dict[str, Any]) -> str:
    if segment["measured_bytes"] == segment["size"]:
        return "all"
    return format_size(segment["measured_bytes"]) if segment["measured_bytes"] else "no"


def _folded(segments: list[dict[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """One row per segment, but one for all stacks: they differ in their place alone."""
    stacks = [s for s in segments if s["use"].startswith("stack ")]
    rows = []
    for segment in segments:
        use = segment["use"]
        if stacks and segment in stacks[1:]:
            continue
        if stacks and segment is stacks[0] and len(stacks) > 1:
            stride = stacks[1]["offset"] - stacks[0]["offset"]
            use = f"stack 0 of {len(stacks)}, every {format_size(stride)}"
        kind = segment["type"] if segment["type"] == "TCS" else segment["permissions"]
        rows.append((f"{segment['offset']:#x}", format_size(segment["size"]), kind, _measured(segment), use))
    return rows


def _slots(tcs: list[dict[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """One row per run of TCSs for the same use."""
    rows: list[tuple[str, str, str, str, str]] = []
    first = 0
    for index in range(1, len(tcs) + 1):
        if index < len(tcs) and all(tcs[index][k] == tcs[first][k] for k in ("for", "entry", "nssa")):
            continue
        start = tcs[first]
        span = str(first) if index - first == 1 else f"{first}-{index - 1}"
        rows.append((span, start["for"], f"{start['offset']:#x}", f"{start['entry']:#x}", str(start["nssa"])))
        first = index
    return rows
