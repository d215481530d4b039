"""`teemate bench`: figures, and campaigns, to run on one's own host."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._output import json_option, print_json
from .demo import Display

if TYPE_CHECKING:
    from ..bench._figures import StormFigures

__all__ = ["bench"]

_MEASURED = {
    "floor": "The least that each thing can cost here: what the others are compared with.",
    "attach": "How long until the first reply from inside, for several sizes of heap.",
    "call": "What calls cost above entering and leaving, and how they add up over cores.",
    "memory": "What 1 to 64 clients cost together, sharing an enclave and with one each.",
    "scale": "What up to 1,024 clients, and 4,096 attaches a second, cost the broker.",
    "churn": "Clients that come, call once and leave for a minute: what do they leave behind?",
    "db": "A database: opened, in memory and at work; in a shared enclave, in one each, and in none.",
    "functions": "A function: cold, warm, and many; in a shared enclave, in one each, and in none.",
    "container": "From the start of a container to its first reply from inside (root, runc).",
    "all": "All but containers; with --quick attach, call, memory, scale and functions, in a minute.",
}


@click.group()
def bench() -> None:
    """Measure on this host, and try what a shared enclave stands.

    Everything is compared with its like in the same run, by turns, so look at the ratios: what else the
    machine does hits both sides. Each starts a broker of its own on a temporary socket.
    """


backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", "sim", "sgx"]),
    default="auto",
    show_default=True,
    help="sgx needs a CPU with SGX.",
)


def _measuring(name: str, text: str) -> click.Command:
    """Return the command that runs one benchmark."""

    @click.command(name, help=text)
    @click.option("--quick", is_flag=True, help="Fewer repetitions, and only what has targets.")
    @click.option(
        "--plot",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Draw the result into this file (.svg, .png); needs teemate[plot].",
    )
    @backend_option
    @json_option
    def command(quick: bool, plot: Path | None, backend: str, as_json: bool) -> None:
        from rich.console import Console

        from ..bench._plot import draw, require_plotting
        from ..bench._run import run_bench
        from .figures import show_report

        if plot is not None:
            require_plotting(plot)  # said before anything is measured
        with Display(Console(stderr=True)) as display:
            report = run_bench(name, display, backend=backend, quick=quick)
        if as_json:
            print_json(report.as_json())
        else:
            show_report(report)
        if plot is not None:
            draw(report, plot)

    return command


for _name, _text in _MEASURED.items():
    bench.add_command(_measuring(_name, _text))


@bench.command()
@click.option(
    "--seed", type=click.IntRange(0), help="Decides who is killed and about when [default: random]."
)
@click.option(
    "--seconds", type=click.FloatRange(1.0), default=30.0, show_default=True, help="The kills take at most."
)
@click.option(
    "--clients", type=click.IntRange(1, 256), default=8, show_default=True, help="Programs at work."
)
@backend_option
@click.option(
    "--client-kills", type=click.IntRange(0), help="Programs to kill [default: while there is time]."
)
@click.option(
    "--each-state",
    type=click.IntRange(0),
    default=0,
    help="Of these, so many at least in each state that programs can be met in: choose the moments for it.",
)
@click.option(
    "--broker-kills", type=click.IntRange(0), default=0, help="Kills of the broker under its keeper."
)
@click.option("--warden-kills", type=click.IntRange(0), default=0, help="Of the enclave's warden.")
@click.option("--keeper-kills", type=click.IntRange(0), default=0, help="Of the keeper, afterwards.")
@json_option
def storm(
    seed: int | None,
    seconds: float,
    clients: int,
    backend: str,
    client_kills: int | None,
    each_state: int,
    broker_kills: int,
    warden_kills: int,
    keeper_kills: int,
    as_json: bool,
) -> None:
    """Kill programs in a shared enclave at random moments and see that nothing is lost.

    Starts a broker on a temporary socket, and programs that work in one vault. Every value and the shared
    counter are compared with what the programs know that they have done. The exit status is 1 when
    something was lost or wrong.
    """
    from rich.console import Console

    from ..bench._storm import Plan, run_storm

    plan = Plan(
        seed=secrets.randbelow(1 << 31) if seed is None else seed,
        seconds=seconds,
        clients=clients,
        backend=backend,
        client_kills=client_kills,
        each_state=each_state,
        broker_kills=broker_kills,
        warden_kills=warden_kills,
        keeper_kills=keeper_kills,
    )
    with Display(Console(stderr=True)) as display:
        figures = run_storm(plan, display)
    if as_json:
        print_json(figures.as_json())
    else:
        _show(figures)
    if not figures.good:
        for error in figures.errors:
            click.echo(f"failure: {error}", err=True)
        sys.exit(1)


def _show(figures: StormFigures) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"storm of {figures.seconds:.0f} s, seed {figures.seed}", title_justify="left")
    table.add_column("killed")
    table.add_column("times", justify="right")
    for state, count in figures.kills_by_state.items():
        table.add_row(f"program: {state}", str(count))
    table.add_row("all programs", str(figures.client_kills), end_section=True)
    for kind, count in (
        ("broker", figures.broker_kills),
        ("warden", figures.warden_kills),
        ("keeper", figures.keeper_kills),
    ):
        if count:
            table.add_row(kind, str(count))
    console = Console()
    console.print(table)
    console.print(
        f"slots: {figures.slots_repaired} repaired with a call in them, {figures.slots_lost} lost,"
        f" {figures.slots_quarantined} quarantined ({figures.quarantined_with_reason} with a reason)\n"
        f"values: {figures.wrong_values} wrong; counter {figures.counter} after"
        f" {figures.counter_expected} increments\n"
        f"calls: {figures.failed_calls} failed, {figures.repeated_calls} done more than once;"
        f" {figures.lost_grants} grants lost",
        style="green" if figures.good else "bold red",
        highlight=False,
    )
    if figures.resume_ms_p50 is not None:
        console.print(
            f"a new attach waited {figures.resume_ms_p50:.0f} ms (p50) when the broker was killed",
            highlight=False,
        )
