"""How benchmarks are shown to people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..bench._rows import Row
    from ..bench._run import Report

__all__ = ["show_report"]


def show_report(report: Report) -> None:
    """Print the rows as a table, and what they were measured on."""
    from rich.console import Console
    from rich.table import Table

    from .status import SIM_WARNING

    host = report.host
    table = Table(
        title=f"bench {report.bench}, backend {report.backend}, {host['cores']} cores ({host['processor']})",
        title_justify="left",
    )
    table.add_column("figure", no_wrap=True)
    for name in ("median", "p99", "spread", "n", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("to", no_wrap=True)
    table.add_column("target")
    for row in report.result.rows:
        table.add_row(*_cells(row))
    console = Console()
    if not console.is_terminal:  # a file has no edge
        console.width = 140
    console.print(table)
    aimed = [row for row in report.result.rows if row.met is not None]
    missed = [row.figure for row in aimed if not row.met]
    if aimed:
        console.print(
            f"{len(aimed) - len(missed)} of {len(aimed)} targets met"
            + (f"; not: {', '.join(missed)}" if missed else ""),
            style="yellow" if missed else "green",
            highlight=False,
        )
    console.print(
        "ratio: of medians that were measured by turns in this run; spread: the middle half of the"
        " measurements, as a part of the median",
        style="dim",
        highlight=False,
    )
    if report.backend == "sim":
        console.print(f"Warning: {SIM_WARNING}", style="bold yellow", markup=False)


def _cells(row: Row) -> tuple[str, ...]:
    target = ""
    if row.target is not None:
        target = f"[{'green' if row.met else 'bold red'}]{row.target} {'met' if row.met else 'NOT MET'}[/]"
    return (
        row.figure,
        f"{_number(row.value)} {row.unit}",
        "" if row.p99 is None else _number(row.p99),
        "" if row.spread is None else f"{row.spread:.0%}",
        str(row.n),
        "" if row.ratio is None else f"{_number(row.ratio)}",
        row.relative_to or "",
        target,
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
