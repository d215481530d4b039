"""`teemate seccomp`: a container's seccomp profile without SGX's ioctls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

import click

from ..errors import Error

__all__ = ["seccomp", "without_sgx_ioctls"]

_TYPE = 0xA4
"""Of every SGX ioctl (asm/sgx.h), in the bits 8 to 15 of its number."""
_SHIFT, _BITS = 8, 8
_REQUEST = 1
"""Which argument of ioctl(2) the number is."""


def _allowing() -> Iterator[dict[str, object]]:
    """Comparisons of which one at least holds for every ioctl of another type, and none for SGX's.

    A profile that allows by list cannot say "all but": so there is one rule for each bit of the type.
    """
    for bit in range(_BITS):
        other = ~_TYPE >> bit & 1
        yield {
            "index": _REQUEST,
            "value": 1 << _SHIFT + bit,
            "valueTwo": other << _SHIFT + bit,
            "op": "SCMP_CMP_MASKED_EQ",
        }


def _denying() -> dict[str, object]:
    mask = (1 << _BITS) - 1 << _SHIFT
    compare = {"index": _REQUEST, "value": mask, "valueTwo": _TYPE << _SHIFT, "op": "SCMP_CMP_MASKED_EQ"}
    return {"names": ["ioctl"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": [compare]}


def without_sgx_ioctls(profile: dict[str, Any]) -> dict[str, Any]:
    """Return `profile` (OCI runtime specification, or docker's form) with SGX's ioctls denied.

    Raises
    ------
    Error
        It is no profile, or compares ioctl's number itself already.

    """
    if not isinstance(profile, dict) or "defaultAction" not in profile:
        raise Error("this is no seccomp profile: it has no defaultAction")
    rules: list[dict[str, Any]] = []
    for rule in profile.get("syscalls") or []:
        if rule.get("action") != "SCMP_ACT_ALLOW" or "ioctl" not in rule.get("names", ()):
            rules.append(rule)
            continue
        args = rule.get("args") or []
        if any(compare.get("index") == _REQUEST for compare in args):
            raise Error("this profile has a rule about ioctl's second argument already: add SGX's by hand")
        others = [name for name in rule["names"] if name != "ioctl"]
        if others:
            rules.append({**rule, "names": others})
        rules += [{**rule, "names": ["ioctl"], "args": [*args, compare]} for compare in _allowing()]
    if profile["defaultAction"] in ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG"):
        rules.append(_denying())
    return {**profile, "syscalls": rules}


@click.command()
@click.argument("profile", type=click.File())
def seccomp(profile: TextIO) -> None:
    """Print PROFILE, the seccomp profile of a container runtime, with SGX's ioctls denied.

    Clients need none of them; with them, holders of one enclave can change its pages under each other.
    podman's own profile is /usr/share/containers/seccomp.json, docker's is default.json of moby/profiles.
    """
    try:
        found = json.load(profile)
    except ValueError as error:
        raise click.ClickException(f"{profile.name}: {error}") from None
    click.echo(json.dumps(without_sgx_ioctls(found), indent=2))
