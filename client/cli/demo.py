"""`teemate demo`: one shared enclave against one for each program, measured."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from ._output import SIZE, json_option, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from ..demo._figures import Figures

__all__ = ["Display", "demo"]


@click.command()
@click.option("--clients", type=click.IntRange(1, 512), default=8, show_default=True, help="Programs.")
@click.option("--calls", type=click.IntRange(1), default=1000, show_default=True, help="Calls of each.")
@click.option("--heap", type=SIZE, default="64M", show_default=True, help="Of the enclave.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "sim", "sgx"]),
    default="auto",
    show_default=True,
    help="sgx needs a CPU with SGX.",
)
@json_option
def demo(clients: int, calls: int, heap: int, backend: str, as_json: bool) -> None:
    """Run programs in ONE shared enclave, then each in an enclave of its own.

    Starts a broker on a temporary socket. Everything is measured in this run; the exit status is 1
    when a call failed or the shared counter is wrong.
    """
    from rich.console import Console

    from ..demo._run import run_demo

    # Progress goes to stderr, so that stdout has the table or the JSON alone.
    console = Console(stderr=True)
    with Display(console) as display:
        figures = run_demo(clients=clients, calls=calls, heap=heap, backend=backend, listener=display)
    if as_json:
        print_json(figures.as_json())
    else:
        _show(figures)
    if not figures.good:
        for error in figures.errors:
            click.echo(f"failure: {error}", err=True)
        sys.exit(1)


class Display:
    """Progress while it works: a bar on a terminal, a line for each phase elsewhere."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed

        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                Elapsed(),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def phase(self, text: str, total: int = 0) -> None:
        if self._bar is None:
            self._console.print(text, markup=False, highlight=False)
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(text, total=total or None)

    def progress(self, done: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)


def _show(figures: Figures) -> None:
    from rich.console import Console
    from rich.table import Table

    from .._sizes import format_size
    from .status import SIM_WARNING

    console = Console()
    table = Table(
        title=f"{figures.clients} programs, {figures.calls} calls each, {figures.image} "
        f"with {format_size(figures.heap_bytes)} heap, backend {figures.backend}",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("one shared enclave", justify="right")
    table.add_column("one enclave each", justify="right")
    table.add_column("ratio", justify="right")
    shared, conventional = figures.attach_ms, figures.conventional_ms
    table.add_row(
        "ready for work, p50",
        f"{shared.p50:.2f} ms",
        f"{conventional.p50:.1f} ms",
        f"{figures.latency_ratio:.1f}",
    )
    table.add_row("ready for work, p99", f"{shared.p99:.2f} ms", f"{conventional.p99:.1f} ms", "")
    table.add_row(
        "enclave memory",
        format_size(figures.epc_pages_shared * 4096),
        format_size(figures.epc_pages_conventional * 4096),
        f"{figures.memory_ratio:.1f}",
    )
    table.add_row(
        "all memory",
        f"{figures.pss_mib_shared:.0f} MiB",
        f"{figures.pss_mib_conventional:.0f} MiB",
        f"{figures.pss_mib_conventional / figures.pss_mib_shared:.1f}",
    )
    console.print(table)
    right = figures.counter == figures.counter_expected
    console.print(
        f"counter: {figures.counter} after {figures.counter_expected} successful increments "
        f"({'right' if right else 'WRONG'}); {figures.calls_total} calls, {figures.failures} failures",
        style="green" if figures.good else "bold red",
        highlight=False,
    )
    console.print(
        f"one enclave each takes {conventional.p50 / figures.floor_ms.p50:.2f} x the floor "
        f"({figures.floor_ms.p50:.1f} ms to touch the same memory and hash the same bytes)",
        highlight=False,
    )
    console.print(
        f"MRENCLAVE {figures.mrenclave}: the same from the file, the broker and EREPORT", highlight=False
    )
    if figures.backend == "sim":
        console.print(f"Warning: {SIM_WARNING}", style="bold yellow", markup=False)
