"""`teemate revoke`: take slots back from their holders."""

from __future__ import annotations

import click

from ._complete import enclaves as known_enclaves
from ._output import json_option, print_json
from ._socket import socket_option

__all__ = ["revoke"]


@click.command()
@click.option("--grant", type=click.IntRange(min=0), help="One grant; `teemate status` shows the numbers.")
@click.option("--client", type=click.IntRange(min=0), help="Everything that one client holds.")
@click.option("--enclave", help="Every grant on one enclave.", shell_complete=known_enclaves)
@click.option("--grace", type=click.FloatRange(min=0), help="Seconds that the holders get to acknowledge.")
@click.option("--reason", help="For the audit record.")
@socket_option
@json_option
def revoke(
    grant: int | None,
    client: int | None,
    enclave: str | None,
    grace: float | None,
    reason: str | None,
    path: str | None,
    as_json: bool,
) -> None:
    """Take grants back: exactly one of --grant, --client, --enclave says which.

    Before this returns the keys are cleared, and the slots are repaired: nothing that their holders
    left in them can go on. Slots whose holder did not acknowledge in time are withheld, and counted
    as leaked; what cannot be repaired is quarantined.
    """
    from .. import connect

    if sum(value is not None for value in (grant, client, enclave)) != 1:
        raise click.UsageError("give exactly one of --grant, --client and --enclave")
    with connect(path, client="teemate revoke") as broker:
        done = broker.revoke(grant=grant, client=client, enclave=enclave, grace=grace, reason=reason)
    if as_json:
        print_json(done._asdict())
        return
    click.echo(
        f"revoked {done.grants} grant{'s' * (done.grants != 1)}: {done.cleared} slots cleared, "
        f"{done.quarantined} quarantined, {done.leaked} leaked"
    )
    if done.leaked:
        click.echo(
            "A leaked slot stays withheld until its holder ends or acknowledges that it unmapped it.",
            err=True,
        )
    if done.busy:
        click.echo(
            f"In {done.busy} of them a thread of the holder runs still: it gets no result, and the slot is "
            "repaired when it leaves.",
            err=True,
        )
