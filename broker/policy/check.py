"""``teemate-broker check-config``: what a policy file means on this host, before a broker lives by it."""

from __future__ import annotations

import grp
import os
import pwd
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from teemate import errors
from teemate._backend import choose_backend
from teemate._sizes import format_size
from teemate.broker.enclaves.enclave import SIGSTRUCT_SIZE
from teemate.broker.policy.reloading import demand_backends
from teemate.broker.policy.rules import EnclavePolicy, Policy, PolicyError, Rule, load_policy

__all__ = ["DEFAULT_CONFIG", "check_config", "read_policy", "store_capacity_for"]

DEFAULT_CONFIG = Path("/etc/teemate/broker.toml")
_STORE_FIXED = 2
_STORE_EACH = 3


def read_policy(config: Path | None) -> Policy:
    """Return the policy of that file; without one the default file's, or the one that allows nothing.

    Raises
    ------
    PolicyError

    """
    if config is None and not DEFAULT_CONFIG.exists():
        return Policy()
    return load_policy(config or DEFAULT_CONFIG, default_owner=os.geteuid())


def store_capacity_for(enclaves: int) -> int:
    """Return how many descriptors a service manager's store has to take for so many enclaves.

    Snapshot and listener; descriptor, arena and image of each enclave, and once more during an upgrade.
    """
    return _STORE_FIXED + _STORE_EACH * (enclaves + 1)


def warnings_about(policy: Policy) -> Iterator[str]:
    """Say what would not keep a broker from starting, but will not be what somebody wanted."""
    for enclave in policy.enclaves:
        if enclave.image is not None and enclave.sigstruct is not None:
            yield from _unreadable(enclave.name, enclave.image, enclave.sigstruct)
        if not enclave.attach:
            yield f"enclave {enclave.name}: nobody may attach: it has no [[enclave.attach]]"
        for rule in enclave.attach:
            others = rule.any_uid or rule.uids is None or bool(rule.uids - {enclave.owner})
            if others and not (enclave.share_sim or enclave.share_sgx):
                yield (
                    f"enclave {enclave.name}: a rule names others than its owner, {_user(enclave.owner)};"
                    ' they are denied without share_between_owners = "unfenced" (sgx) or'
                    " insecure_sim_sharing = true (sim)"
                )
                break
        cgroups = any(rule.cgroups is not None for rule in enclave.attach)
        if cgroups and not policy.broker.trust_pid and _kernel() < (6, 5):
            yield (
                f"enclave {enclave.name}: its cgroup rules match nobody: this kernel is older than 6.5 and"
                " [broker] trust_pid is false"
            )
    if not policy.administrators.uids and not policy.administrators.gids:
        yield "there are no [administrators]: nobody may revoke, or see who is connected"
    capacity = os.environ.get("FDSTORE", "")
    needed = store_capacity_for(len(policy.enclaves))
    if capacity.isdecimal() and int(capacity) < needed:
        yield (
            f"the service manager keeps {capacity} descriptors, the enclaves of this policy need {needed}:"
            " raise FileDescriptorStoreMax= and FDSTORE= in the broker's unit"
        )


def _unreadable(name: str, image: Path, sigstruct: Path) -> Iterator[str]:
    for path in (image, sigstruct):
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            yield f"enclave {name}: {path}: {error.strerror}"
            continue
        if path == sigstruct and size != SIGSTRUCT_SIZE:
            yield f"enclave {name}: {path}: {size} bytes, a SIGSTRUCT has {SIGSTRUCT_SIZE}"


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"uid {uid}"


def _group(gid: int) -> str:
    try:
        return f"{grp.getgrgid(gid).gr_name} ({gid})"
    except KeyError:
        return f"gid {gid}"


def _rule(rule: Rule) -> str:
    """One rule in words."""
    conditions = ["every user"] if rule.any_uid else []
    if rule.uids is not None:
        conditions.append("user " + " or ".join(map(_user, sorted(rule.uids))))
    if rule.gids is not None:
        conditions.append("group " + " or ".join(map(_group, sorted(rule.gids))))
    if rule.cgroups is not None:
        conditions.append("cgroup " + " or ".join(rule.cgroups))
    return ", ".join(conditions)


def _enclave(enclave: EnclavePolicy) -> Iterator[str]:
    boot = enclave.start == "boot"
    image = f"{enclave.image}, built at the start" if boot else "its image comes with `create`"
    yield f"enclave {enclave.name}: {image}; owner {_user(enclave.owner)}"
    if enclave.share_sgx:
        yield "    shared with other users, on hardware"
    if enclave.share_sim:
        yield "    shared with other users, on the sim: all of them can read and write all of it"
    for rule in enclave.attach:
        yield f"    may attach: {_rule(rule)}"
    if enclave.storage:
        yield f"    files of up to {format_size(enclave.storage_limit)} in the state directory"
    if enclave.io == "client":
        yield "    its clients have descriptors of these files: they can cut, fill and change them"
    yield f"    {enclave.slots_per_client} slots a client, {enclave.clients_per_uid} clients a user"


def summarize(policy: Policy) -> Iterator[str]:
    """Say in words what the policy allows."""
    settings = policy.broker
    choice = choose_backend(settings.backend)
    why = f" ({choice.reason})" if choice.reason else ""
    yield f"backend {settings.backend}: {choice.backend} on this host{why}"
    yield f"socket {settings.socket}, unless a service manager passes one"
    if settings.state_directory is not None:
        yield f"state directory {settings.state_directory}"
    for enclave in policy.enclaves:
        yield from _enclave(enclave)
    for create in policy.create:
        yield f"may create enclaves of up to {create.pages} pages: {_rule(create.who)}"
    metrics = policy.metrics
    if metrics.socket is not None:
        yield f"metrics at {metrics.socket}, mode {metrics.socket_mode:04o}"
    if metrics.listen is not None:
        host, port = metrics.listen
        yield f"metrics at {host} port {port}, for every user of this host"
    who = [*map(_user, sorted(policy.administrators.uids)), *map(_group, sorted(policy.administrators.gids))]
    yield f"administrators: {', '.join(who) or 'nobody'}"


@click.command("check-config")
@click.option("--config", type=click.Path(path_type=Path), help=f"Policy file [default: {DEFAULT_CONFIG}].")
@click.option("--quiet", is_flag=True, help="Say only what is wrong.")
@click.option("--strict", is_flag=True, help="Warnings count as mistakes.")
def check_config(config: Path | None, quiet: bool, strict: bool) -> None:
    """Check a policy file as the broker does when it starts, and say what it means here.

    The exit status is 1 for what a broker would not start with; warnings are about what it would start
    with but would hardly be wanted.
    """
    try:
        policy = read_policy(config)
        demand_backends(policy)
        summary = list(summarize(policy))
    except (PolicyError, errors.Unsupported) as error:
        raise click.ClickException(str(error)) from None
    warnings = list(warnings_about(policy))
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    if not quiet:
        click.echo(f"{policy.source}:")
        for line in summary:
            click.echo(f"  {line}")
    if strict and warnings:
        sys.exit(1)
