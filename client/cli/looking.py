"""A command for each question of an operator: who holds what and blocks whom, uses what, was denied what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from ._complete import enclaves as known_enclaves
from ._output import json_option, print_json
from ._socket import socket_option

if TYPE_CHECKING:
    from .._looking import DenialInfo, Holders, ProcessInfo
    from .._types import ClientInfo, EnclaveInfo

__all__ = ["denials", "reload", "slots", "usage"]

_PAGE = 4096
_UNKNOWN = "(not known)"


@click.command()
@click.argument("names", nargs=-1, metavar="[ENCLAVE]...", shell_complete=known_enclaves)
@click.option("--all", "everything", is_flag=True, help="Free slots too.")
@socket_option
@json_option
def slots(names: tuple[str, ...], everything: bool, path: str | None, as_json: bool) -> None:
    """Show who holds which slot of which enclave, and who waits for whom.

    A slot that is withheld counts for its former holder until that has ended, or has said that it
    unmapped it.
    """
    from .. import connect

    with connect(path, client="teemate slots") as broker:
        wanted = names or tuple(info.name for info in broker.enclaves())
        found = {name: broker.holders(name) for name in wanted}
    if as_json:
        print_json({"enclaves": {name: _slots_json(holders) for name, holders in found.items()}})
        return
    for name, holders in found.items():
        _show_slots(name, holders, everything=everything)


def _slots_json(holders: Holders) -> dict[str, object]:
    return {
        "slots": [
            {**slot._asdict(), "holder": slot.holder and slot.holder._asdict()} for slot in holders.slots
        ],
        "waiting": [
            {**request.process._asdict(), "slots": request.slots, "waited": request.waited}
            for request in holders.waiting
        ],
    }


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _who(process: ProcessInfo) -> str:
    return f"client {process.client} ({process.name or 'no name'}, pid {process.pid}, uid {process.uid})"


def _print(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; nothing in it is markup, whatever a client calls itself."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _show_slots(name: str, holders: Holders, *, everything: bool) -> None:
    counts = Counter(slot.state for slot in holders.slots)
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    rows = []
    for slot in holders.slots:
        if slot.state == "free" and not everything:
            continue
        who = ("", "", "", "") if slot.holder is None else (
            f"{slot.holder.client} {slot.holder.name}", str(slot.holder.pid), str(slot.holder.uid),
            slot.holder.cgroup or _UNKNOWN,
        )  # fmt: skip
        state = f"{slot.state}: {slot.reason}" if slot.reason else slot.state
        if slot.former is not None:
            state += f" (uid {slot.former} had it)"
        rows.append((str(slot.slot), state, *who))
    _print(f"Slots of {name}: {told}", ("slot", "state", "client", "pid", "uid", "cgroup"), rows)
    if not holders.waiting:
        return
    held = Counter(slot.holder for slot in holders.slots if slot.holder is not None)
    blockers = ", ".join(f"{_who(process)}: {count}" for process, count in held.most_common(4))
    more = f" and {len(held) - 4} more" if len(held) > 4 else ""
    for number, request in enumerate(holders.waiting):
        ahead = f", behind {_many(number, 'other')}" if number else ""
        wanted = _many(request.slots, "slot")
        click.echo(f"{_who(request.process)} waits for {wanted} since {request.waited:.1f} s{ahead}")
    click.echo(f"Slots are held by {blockers}{more}.")


@click.command()
@socket_option
@json_option
def usage(path: str | None, as_json: bool) -> None:
    """Show how much enclave memory (EPC) each container uses, by control group.

    An enclave is there once however many share it: beside its size stands a container's part of it, the
    size divided by the containers that are attached.
    """
    from .. import connect

    with connect(path, client="teemate usage") as broker:
        enclaves, clients = broker.enclaves(), broker.clients()
    parts = _parts(enclaves, clients)
    total = sum(info.pages for info in enclaves) * _PAGE
    if as_json:
        print_json({"total_bytes": total, "containers": [part._asdict() for part in parts]})
        return
    from .._sizes import about_size

    rows = [
        (
            part.cgroup or _UNKNOWN, str(part.uid), str(part.processes), str(part.slots),
            ", ".join(part.enclaves), about_size(part.mapped_bytes), about_size(part.part_bytes),
        )
        for part in parts
    ]  # fmt: skip
    headings = ("cgroup", "uid", "processes", "slots", "enclaves", "maps", "its part")
    _print(f"{_many(len(enclaves), 'enclave')}, {about_size(total)}", headings, rows)


class _Part(NamedTuple):
    """What a container (control group and user) uses."""

    cgroup: str
    uid: int
    processes: int
    slots: int
    enclaves: tuple[str, ...]
    mapped_bytes: int
    part_bytes: int


def _parts(enclaves: Sequence[EnclaveInfo], clients: Sequence[ClientInfo]) -> list[_Part]:
    """Divide every enclave among the containers that are attached to it, the largest part first."""
    bytes_of = {info.name: info.pages * _PAGE for info in enclaves}
    users: dict[tuple[str, int], list[ClientInfo]] = {}
    for client in clients:
        if any(grant.slots for grant in client.grants):  # who only waits for slots maps nothing yet
            users.setdefault((client.cgroup, client.uid), []).append(client)
    attached = {
        key: tuple(sorted({grant.enclave for client in group for grant in client.grants if grant.slots}))
        for key, group in users.items()
    }
    sharers = Counter(name for names in attached.values() for name in names)
    parts = [
        _Part(
            *key,
            len({client.pid for client in group}),
            sum(len(grant.slots) for client in group for grant in client.grants),
            attached[key],
            sum(bytes_of.get(name, 0) for name in attached[key]),
            sum(bytes_of.get(name, 0) // sharers[name] for name in attached[key]),
        )
        for key, group in users.items()
    ]
    return sorted(parts, key=lambda part: part.part_bytes, reverse=True)


@click.command()
@click.option("--uid", type=click.IntRange(0), help="Of this user.")
@socket_option
@json_option
def denials(uid: int | None, path: str | None, as_json: bool) -> None:
    """Show who was denied what lately, and the rule that is missing.

    Clients are never told which one. The journal has all of them, from before a restart too:
    journalctl -u teemate-broker TEEMATE_AUDIT=denial.
    """
    from .. import connect

    with connect(path, client="teemate denials") as broker:
        found = broker.denials(uid=uid)
    if as_json:
        print_json({"denials": [denial._asdict() for denial in found]})
        return
    if not found:
        click.echo("Nobody was denied anything since the broker started.")
        return
    _print("Denials, the newest first", ("ago", "times", "uid", "pid", "cgroup", "what", "missing rule"), [
        _denial(denial) for denial in found
    ])  # fmt: skip


def _denial(denial: DenialInfo) -> tuple[str, ...]:
    return (
        f"{denial.ago:.0f} s", str(denial.times), str(denial.uid), str(denial.pid),
        denial.cgroup or _UNKNOWN, denial.operation, denial.missing_rule,
    )  # fmt: skip


@click.command()
@socket_option
def reload(path: str | None) -> None:
    """Have the broker take its policy's file, as it is now, into use.

    A file with a mistake is refused, and the old policy holds on. Grants that were given stay given.
    """
    from .. import connect

    with connect(path, client="teemate reload") as broker:
        broker.reload()
    click.echo("The policy's file, as it is now, is in force.")
