"""`teemate db import`, `export`, `backup`, `delete`, and who may use a database: what is about all of one."""

from __future__ import annotations

import contextlib
import grp
import pwd
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._complete import enclaves as known_enclaves
from ._output import NUMBER, SIZE, json_option, print_json
from ._socket import socket_option

if TYPE_CHECKING:
    from .._grant import GrantedEnclave
    from ..db import Connection, Description, Right

__all__ = ["COMMANDS"]

_enclave = click.argument("enclave", shell_complete=known_enclaves)
_database = click.argument("database")
_uid = click.option("--uid", type=NUMBER, help="A user.")
_gid = click.option("--gid", type=NUMBER, help="A group: whose first one it is.")


@contextlib.contextmanager
def _attached(path: str | None, enclave: str) -> Iterator[GrantedEnclave]:
    """Have `enclave` attached; errors of the database end the command."""
    from .. import connect, errors
    from ..db import Error

    with connect(path, client="teemate db") as broker, broker.attach(enclave) as attached:
        try:
            yield attached
        except Error as error:
            if isinstance(error, errors.Error):
                raise
            raise click.ClickException(str(error)) from None


@contextlib.contextmanager
def _opened(path: str | None, enclave: str, database: str, *, readonly: bool = False) -> Iterator[Connection]:
    from ..db import connect

    with (
        _attached(path, enclave) as attached,
        contextlib.closing(connect(attached, database, readonly=readonly, create=False)) as connection,
    ):
        yield connection


@contextlib.contextmanager
def _shown(label: str, connection: Connection) -> Iterator[Callable[[int, int], None]]:
    """Yield what is told how far a copy is: a bar at a terminal, and where Ctrl-C ends it in order."""
    from ..db import OperationalError

    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True
        connection.interrupt()  # the enclave's look at all of what came in takes its time

    with contextlib.ExitStack() as stack:
        bar: Any = None
        shown = sys.stderr.isatty()

        def step(done: int, pages: int) -> None:
            nonlocal bar
            if pressed:
                raise KeyboardInterrupt
            if bar is None and shown:
                bar = stack.enter_context(click.progressbar(length=pages, label=label, file=sys.stderr))
            if bar is not None:
                bar.update(done - bar.pos)

        before = signal.signal(signal.SIGINT, press)
        try:
            yield step
        except OperationalError as error:
            if pressed and error.sqlite_errorname == "SQLITE_INTERRUPT":
                raise KeyboardInterrupt from None
            raise
        finally:
            signal.signal(signal.SIGINT, before)


@click.command("import")
@_enclave
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_database
@socket_option
def import_(enclave: str, file: Path, database: str, path: str | None) -> None:
    """Make the new DATABASE in ENCLAVE of FILE, a plain one of SQLite that nobody writes to.

    DATABASE is yours, and there when all of FILE is in it and sound. FILE stays as it is: plain. Where its
    pages are not of 4096 bytes, a copy whose are lies below TMPDIR meanwhile.
    """
    from ..db import connect
    from ..db._copying import import_by

    with (
        _attached(path, enclave) as attached,
        contextlib.closing(connect(attached)) as connection,
        _shown(f"{file.name} into {database}", connection) as progress,
    ):
        import_by(connection, file, database, progress=progress)


@click.command()
@_enclave
@_database
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Take the place of a file that is there.")
@socket_option
def export(enclave: str, database: str, file: Path, force: bool, path: str | None) -> None:
    """Write DATABASE in ENCLAVE, which is yours, to FILE as SQLite has it: PLAIN, for whoever can read it.

    FILE has mode 0600, and is there when it is complete. Others may write to DATABASE meanwhile: FILE is what
    it was at the beginning.
    """
    with (
        _opened(path, enclave, database, readonly=True) as connection,
        _shown(f"{database} to {file.name}", connection) as progress,
    ):
        connection.export(file, force=force, progress=progress)


@click.command()
@_enclave
@_database
@click.argument("new")
@socket_option
def backup(enclave: str, database: str, new: str, path: str | None) -> None:
    """Copy DATABASE, which is yours, to the database NEW in the same ENCLAVE: sealed, and yours alone.

    Others may write to DATABASE meanwhile: NEW is what it was at the beginning.
    """
    with (
        _opened(path, enclave, database, readonly=True) as connection,
        _shown(f"{database} to {new}", connection) as progress,
    ):
        connection.backup(new, progress=lambda _, left, pages: progress(pages - left, pages))


@click.command()
@_enclave
@_database
@click.option("--yes", is_flag=True, help="Do not ask.")
@socket_option
def delete(enclave: str, database: str, yes: bool, path: str | None) -> None:
    """Delete DATABASE in ENCLAVE, which is yours and nobody has open."""
    from ..db import delete as delete_database

    with _attached(path, enclave) as attached:
        if not yes:
            click.confirm(f"Delete the database {database} in {enclave}?", abort=True)
        delete_database(attached, database)


@click.command()
@_enclave
@_database
@_uid
@_gid
@click.option("--read-only/--read-write", "readonly", default=True, help="Default: read only.")
@socket_option
def grant(
    enclave: str, database: str, uid: int | None, gid: int | None, readonly: bool, path: str | None
) -> None:
    """Let another user, or a group, use DATABASE in ENCLAVE, which is yours.

    They have to be allowed to attach to ENCLAVE too, by the broker's policy.
    """
    _check(uid, gid)
    with _opened(path, enclave, database) as connection:
        connection.grant(uid=uid, gid=gid, readonly=readonly)


@click.command()
@_enclave
@_database
@_uid
@_gid
@socket_option
def revoke(enclave: str, database: str, uid: int | None, gid: int | None, path: str | None) -> None:
    """Take back what was granted on DATABASE in ENCLAVE; who has it open can do nothing more with it."""
    _check(uid, gid)
    with _opened(path, enclave, database) as connection:
        connection.revoke(uid=uid, gid=gid)


def _check(uid: int | None, gid: int | None) -> None:
    if (uid is None) == (gid is None):
        raise click.UsageError("give either --uid or --gid")


@click.command()
@_enclave
@_database
@click.argument("size", type=SIZE)
@socket_option
def limit(enclave: str, database: str, size: int, path: str | None) -> None:
    """Have DATABASE in ENCLAVE, which is yours, grow to SIZE (64M) and no further; 0 lifts that."""
    with _opened(path, enclave, database) as connection:
        connection.limit(size)


@click.command("list")
@_enclave
@socket_option
@json_option
def list_(enclave: str, path: str | None, as_json: bool) -> None:
    """List the databases in ENCLAVE that you may use: name, owner, what you may do."""
    from ..db import databases

    with _attached(path, enclave) as attached:
        found = databases(attached)
    if as_json:
        rows = [
            {"database": one.name, "owner": one.owner, "access": one.access.name.lower()} for one in found
        ]
        print_json({"databases": rows})
        return
    for one in found:
        click.echo(f"{one.name}\t{_user(one.owner)}\t{_ACCESS[one.access.name]}")


@click.command()
@_enclave
@_database
@socket_option
@json_option
def describe(enclave: str, database: str, path: str | None, as_json: bool) -> None:
    """Say whose DATABASE in ENCLAVE is, what you may do with it, and, to its owner, what others may."""
    with _opened(path, enclave, database, readonly=True) as connection:
        description = connection.describe()
    if as_json:
        print_json(
            {
                "database": database,
                "owner": description.owner,
                "access": description.access.name.lower(),
                "bytes": description.size,
                "size_limit": description.size_limit,
                "rights": [
                    {right.grantee.name.lower(): right.id, "access": right.access.name.lower()}
                    for right in description.rights
                ],
            }
        )
        return
    click.echo(f"owner   {_user(description.owner)}")
    click.echo(f"access  {_ACCESS[description.access.name]}")
    most = f", may grow to {description.size_limit >> 10} KiB" if description.size_limit else ""
    click.echo(f"size    {description.size >> 10} KiB{most}")
    for line in _granted(description):
        click.echo(line)


_ACCESS = {"READ": "read only", "WRITE": "read and write", "OWNER": "it is yours"}


def _granted(description: Description) -> Iterator[str]:
    for right in description.rights:
        yield f"grant   {_grantee(right)}: {_ACCESS[right.access.name]}"


def _grantee(right: Right) -> str:
    return _user(right.id) if right.grantee.name == "UID" else _group(right.id)


def _user(uid: int) -> str:
    with contextlib.suppress(KeyError):
        return f"uid {uid} ({pwd.getpwuid(uid).pw_name})"
    return f"uid {uid}"


def _group(gid: int) -> str:
    with contextlib.suppress(KeyError):
        return f"gid {gid} ({grp.getgrgid(gid).gr_name})"
    return f"gid {gid}"


COMMANDS = (import_, export, backup, delete, grant, revoke, limit, list_, describe)
