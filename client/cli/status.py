"""`teemate status`: what the broker owns, and who uses it."""

from __future__ import annotations

from collections.abc import Sequence

import click

from .._sizes import format_size
from .._types import ClientInfo, EnclaveInfo, SlotCounts
from ..errors import Denied
from ._output import json_option, print_json
from ._socket import socket_option

__all__ = ["status"]

SIM_WARNING = (
    "backend sim: a model of SGX in ordinary memory. It protects nothing: "
    "no confidentiality, no isolation between clients. Do not put secrets into it."
)


@click.command()
@socket_option
@json_option
def status(path: str | None, as_json: bool) -> None:
    """Show the enclaves, their slots, and (for administrators) the clients."""
    from .. import connect

    with connect(path, client="teemate status") as broker:
        enclaves = broker.enclaves()
        backend, wanted = broker.backend()
        clients: list[ClientInfo] | None
        try:
            clients = broker.clients()
        except Denied:
            clients = None  # only administrators see who else is there
    if as_json:
        print_json({**_as_json(broker.path, enclaves, clients), "backend": backend, "wanted": wanted})
    else:
        _show(broker.path, enclaves, clients)
        _show_backend(backend, wanted)


def _as_json(
    path: str, enclaves: Sequence[EnclaveInfo], clients: Sequence[ClientInfo] | None
) -> dict[str, object]:
    listed = [
        {
            **info._asdict(),
            "mrenclave": info.mrenclave.hex(),
            "mrsigner": info.mrsigner.hex(),
            "slots": info.slots._asdict(),
        }
        for info in enclaves
    ]
    result: dict[str, object] = {"socket": path, "enclaves": listed}
    if any(info.backend == "sim" for info in enclaves):
        result["warning"] = SIM_WARNING
    if clients is not None:
        result["clients"] = [
            {**client._asdict(), "grants": [grant._asdict() for grant in client.grants]} for client in clients
        ]
    return result


def _slots(counts: SlotCounts) -> str:
    """Say how many are free, and in further lines what is out of the ordinary."""
    rest = (
        (counts.waiting, "waited for"),
        (counts.withheld, "withheld"),
        (counts.quarantined, "quarantined"),
    )
    return "\n".join(
        [f"{counts.free}/{counts.total} free", *(f"{count} {what}" for count, what in rest if count)]
    )


def _show_backend(backend: str, wanted: str) -> None:
    if backend:
        chosen = f"{backend}, chosen by auto (its log says why)" if wanted == "auto" else backend
        click.echo(f"New enclaves get backend {chosen}.")


def _show(path: str, enclaves: Sequence[EnclaveInfo], clients: Sequence[ClientInfo] | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not enclaves:
        console.print(f"The broker at {path} has no enclaves that you may see.", markup=False)
    else:
        # What 80 columns have room for; --json has everything.
        table = Table(
            title=f"Enclaves of {path}",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("enclave", overflow="fold", min_width=8)
        table.add_column("state", overflow="fold", min_width=7)
        for heading in ("backend", "isolation", "size", "MRENCLAVE", "slots"):
            table.add_column(heading, no_wrap=True)
        table.add_column("clients", justify="right", no_wrap=True)
        for info in enclaves:
            state = info.state if info.reason is None else f"{info.state}: {info.reason}"
            table.add_row(
                Text(info.name),
                Text(state, style="green" if info.state == "ready" else "red"),
                Text(info.backend, style="yellow" if info.backend == "sim" else ""),
                info.isolation,
                format_size(info.size),
                info.mrenclave.hex()[:8] + "…",
                _slots(info.slots),
                str(info.clients),
            )
        console.print(table)
    if clients:
        table = Table(
            title="Clients", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
        )
        for heading in ("client", "name", "pid", "uid", "cgroup", "grants"):
            number = heading in ("client", "pid", "uid")
            table.add_column(heading, no_wrap=number, overflow="fold", justify="right" if number else "left")
        for client in clients:
            grants = ", ".join(
                f"{grant.enclave} (grant {grant.grant}, slots {', '.join(map(str, grant.slots))})"
                for grant in client.grants
            )
            row = (str(client.client), client.name, str(client.pid), str(client.uid), client.cgroup, grants)
            table.add_row(*map(Text, row))
        console.print(table)
    if any(info.backend == "sim" for info in enclaves):
        console.print(f"Warning: {SIM_WARNING}", style="bold yellow", markup=False)
