"""The tables of `teemate top` as text: cells for both displays, and lines that fit 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from teemate._sizes import format_size
from teemate.top._model import ClientRow, EnclaveRow, View, select

__all__ = [
    "CLAIMS",
    "CLIENT_HEADINGS",
    "ENCLAVE_HEADINGS",
    "LEFT",
    "client_cells",
    "enclave_cells",
    "lines",
    "summary",
]

ENCLAVE_HEADINGS = (
    "ENCLAVE", "STATE", "PAGES", "SLOTS", "USED", "FREE", "HELD", "QUAR", "QUEUE", "CL", "CALLS/s",
)  # fmt: skip
CLIENT_HEADINGS = ("CL", "UID", "PID", "WHERE", "ENCLAVE", "SLOTS", "WAIT", "SLOT-S", "CALLS/s*", "IN*")
CLAIMS = "* the client's own claim; of enclaves: the gate's count; SLOT-S: broker's clock"
LEFT = {"ENCLAVE", "STATE", "WHERE"}
_WIDEST = {"ENCLAVE": 14, "STATE": 11, "WHERE": 24}
_NARROWEST = 8


def _printable(text: str) -> str:
    """Nothing that a terminal would obey: a client chooses its name."""
    return "".join(char if char.isprintable() else "?" for char in text)


def rate(value: float | None) -> str:
    """Return a rate in at most 6 characters."""
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 10 * size:
            return f"{value / size:.1f}{unit}" if value < 1000 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.1f}"
    return f"{value:.0f}" if value < 1e5 else f"{value / 3600:.0f}h"


def enclave_cells(row: EnclaveRow) -> tuple[str, ...]:
    """Return the cells of an enclave."""
    return (
        _printable(row.name), row.state, str(row.pages), str(row.total), str(row.used), str(row.free),
        str(row.withheld), str(row.quarantined), str(row.queue), str(row.clients), rate(row.calls),
    )  # fmt: skip


def client_cells(row: ClientRow) -> tuple[str, ...]:
    """Return the cells of a client; who waits shows for how many slots, and for how long."""
    wait = f"{row.waiting}/{row.waited:.0f}s" if row.waiting else "-"
    inside = "-" if row.inside is None else f"{row.inside:.2f}"
    return (
        str(row.client), str(row.uid), str(row.pid), _printable(row.where or row.name) or "-",
        _printable(row.enclaves) or "-", str(row.slots), wait, _seconds(row.held), rate(row.calls), inside,
    )  # fmt: skip


def summary(view: View, sort: str) -> str:
    """One line about all of it."""
    pages = sum(row.pages for row in view.enclaves)
    used, total = sum(row.used for row in view.enclaves), sum(row.total for row in view.enclaves)
    kinds = "/".join(sorted({row.backend for row in view.enclaves})) or "no enclaves"
    return (
        f"{len(view.enclaves)} enclaves ({kinds}), {format_size(4096 * pages)}, "
        f"{used} of {total} slots used, {len(view.clients)} clients by {sort}"
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Columns as wide as what is in them; texts are cut, numbers never."""
    cut = [
        [cell[: _WIDEST[name]] if name in _WIDEST else cell for name, cell in zip(headings, row, strict=True)]
        for row in rows
    ]
    widths = [max(len(cells[at]) for cells in (headings, *cut)) for at in range(len(headings))]
    over = sum(widths) + len(widths) - 1 - width
    for name in ("WHERE", "ENCLAVE"):
        if over > 0 and name in headings:
            at = headings.index(name)
            saved = min(over, max(0, widths[at] - _NARROWEST))
            widths[at] -= saved
            over -= saved
    made = []
    for cells in (headings, *cut):
        parts = [
            cell[:size].ljust(size) if name in LEFT else cell.rjust(size)
            for name, cell, size in zip(headings, cells, widths, strict=True)
        ]
        made.append(" ".join(parts).rstrip()[:width])
    return made


def lines(view: View, *, sort: str, wanted: str = "", width: int = 80) -> list[str]:
    """Return the whole view."""
    enclaves = _table(ENCLAVE_HEADINGS, [enclave_cells(row) for row in view.enclaves], width)
    told = [summary(view, sort)[:width], *enclaves]
    if view.note:
        return [*told, "", view.note]
    rows = [client_cells(row) for row in select(view.clients, sort, wanted)]
    return [*told, "", *_table(CLIENT_HEADINGS, rows, width), "", CLAIMS[:width]]
