"""What a shell is offered besides commands and options: enclaves, operations and what they take."""

from __future__ import annotations

import click

__all__ = ["arguments", "enclaves", "operations"]

_PATIENCE = 1.0
"""Seconds for the broker: somebody has pressed a key and waits."""


def enclaves(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the enclaves of the broker that is meant; none when it cannot be asked."""
    from ..errors import Error
    from ..traffic.plain import PlainConnection

    try:
        with PlainConnection(ctx.params.get("path"), patience=_PATIENCE) as broker:
            broker.ask("hello", {"version": 1, "client": "teemate completion"})
            known = [str(info["name"]) for info in broker.ask("enclaves", {}, 1)["enclaves"]]
    except (Error, LookupError):
        return []
    return [name for name in known if name.startswith(incomplete)]


def operations(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the protocol's operations."""
    from ..traffic.schema import operations as known

    return [name for name in known() if name.startswith(incomplete)]


def arguments(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return what the operation takes, and for an enclave which there are."""
    from ..traffic.schema import arguments_of

    key, equals, begun = incomplete.partition("=")
    if not equals:
        known = arguments_of(str(ctx.params.get("op")))
        return [f"{name}=" for name in known if name.startswith(incomplete)]
    return [f"{key}={name}" for name in enclaves(ctx, param, begun)] if key == "enclave" else []
