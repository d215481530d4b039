"""`teemate drain`, `undrain`, `upgrade` and `destroy`: take enclaves out of use, and back."""

from __future__ import annotations

from pathlib import Path

import click

from .._types import Drained
from ._complete import enclaves as known_enclaves
from ._output import json_option, print_json
from ._socket import socket_option

__all__ = ["destroy", "drain", "undrain", "upgrade"]

NOT_DRAINED = 7
"""Exit status: the deadline is over and something is held still."""

_name = click.argument("name", required=False, shell_complete=known_enclaves)
_all = click.option("--all", "everything", is_flag=True, help="Every enclave of this host.")


def _check(name: str | None, everything: bool) -> None:
    if (name is None) != everything:
        raise click.UsageError("give either the name of an enclave, or --all")


@click.command()
@_name
@_all
@click.option(
    "--deadline",
    type=click.FloatRange(min=0, max=86400),
    default=30.0,
    show_default=True,
    help="Seconds that the holders get to leave.",
)
@click.option("--force", is_flag=True, help="Revoke what is held at the deadline.")
@click.option("--reason", help="For the audit record, and for who is refused meanwhile.")
@socket_option
@json_option
def drain(
    name: str | None,
    everything: bool,
    deadline: float,
    force: bool,
    reason: str | None,
    path: str | None,
    as_json: bool,
) -> int:
    """Give out no new grants on an enclave, and wait for the old ones to end.

    With --all the host is emptied: enclaves that nobody holds any more are taken down, until no SGX
    file of TeeMate's is open; microcode updates wait for that. What is in their memory is lost.
    `teemate undrain` takes them into use again.

    Exit status 7: the deadline is over, and something is held still.
    """
    from .. import connect

    _check(name, everything)
    with connect(path, client="teemate drain") as broker:
        done = broker.drain(name, deadline=deadline, force=force, reason=reason)
    if as_json:
        print_json({"enclaves": [drained._asdict() for drained in done]})
    else:
        for drained in done:
            click.echo(_sentence(drained, everything))
    clean = all(not (drained.left or drained.leaked) for drained in done)
    return 0 if clean and (not everything or all(drained.emptied for drained in done)) else NOT_DRAINED


def _sentence(drained: Drained, everything: bool) -> str:
    parts = [f"{drained.held} grants were held"]
    if drained.revoked:
        parts.append(f"{drained.revoked} were revoked")
    if drained.left:
        parts.append(f"{drained.left} are held still")
    if drained.leaked:
        parts.append(f"{drained.leaked} slots are mapped still (`teemate status` shows by whom)")
    if everything:
        parts.append("taken down" if drained.emptied else "not taken down")
    state = "drained" if not drained.left else "not drained"
    return f"{drained.enclave}: {state}: {', '.join(parts)}"


@click.command()
@_name
@_all
@socket_option
@json_option
def undrain(name: str | None, everything: bool, path: str | None, as_json: bool) -> int:
    """Take a drained enclave into use again; with --all build again what was taken down."""
    from .. import connect

    _check(name, everything)
    with connect(path, client="teemate undrain") as broker:
        done = broker.undrain(name)
    if as_json:
        print_json({"enclaves": list(done.enclaves), "failed": done.failed})
    else:
        for enclave in done.enclaves:
            click.echo(f"{enclave}: in use again")
        for enclave, reason in done.failed.items():
            click.echo(f"{enclave}: could not be built again: {reason}", err=True)
    return 1 if done.failed else 0


@click.command()
@click.argument("name", shell_complete=known_enclaves)
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("sigstruct", type=click.Path(path_type=Path), required=False)
@click.option(
    "--deadline",
    type=click.FloatRange(min=0, max=86400),
    default=30.0,
    show_default=True,
    help="Seconds that the holders get to leave.",
)
@click.option("--force", is_flag=True, help="Revoke what is held at the deadline.")
@click.option("--lose-state", is_flag=True, help="Also when an image cannot hand its state over.")
@socket_option
@json_option
def upgrade(
    name: str,
    image: Path,
    sigstruct: Path | None,
    deadline: float,
    force: bool,
    lose_state: bool,
    path: str | None,
    as_json: bool,
) -> None:
    """Replace an enclave by one from another image, with what the old one keeps.

    SIGSTRUCT is IMAGE with the ending .sig unless given. The new enclave is built beside the old one,
    which is drained and hands its state over, sealed; who attaches meanwhile gets the new one. When
    holders do not leave in time and --force is not given, nothing is changed.

    A broker that is started anew builds what its policy says: have that name the new image, too.
    """
    from .. import connect

    with connect(path, client="teemate upgrade") as broker:
        done = broker.upgrade(
            name,
            image,
            sigstruct or image.with_suffix(".sig"),
            deadline=deadline,
            force=force,
            lose_state=lose_state,
        )
    if as_json:
        print_json({**done._asdict(), "mrenclave": done.mrenclave.hex()})
        return
    click.echo(
        f"{name}: generation {done.generation}, MRENCLAVE {done.mrenclave.hex()}: {done.entries} entries"
        f" handed over, {done.revoked} of {done.held} grants revoked"
    )


@click.command()
@click.argument("name", shell_complete=known_enclaves)
@click.option("--force", is_flag=True, help="Revoke what is held first.")
@socket_option
@json_option
def destroy(name: str, force: bool, path: str | None, as_json: bool) -> None:
    """End an enclave and everything that is in it."""
    from .. import connect

    with connect(path, client="teemate destroy") as broker:
        revoked = broker.destroy(name, force=force)
    if as_json:
        print_json({"revoked": revoked})
    else:
        click.echo(f"{name}: destroyed" + (f", {revoked} grants were revoked" if revoked else ""))
