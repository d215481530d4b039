"""`teemate db`: databases in an enclave, from the shell."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import click

from ._complete import enclaves as known_enclaves
from ._socket import socket_option
from .db_whole import COMMANDS

__all__ = ["db"]

_HELP = """\
Statements end with a semicolon.  Besides them:
  .tables   names of tables and views
  .schema   how they were made
  .help     this
  .quit     leave; what was not committed is rolled back"""
_CHUNK = 200
"""Rows of one printed table: the next are fetched when these have been seen."""


@click.group()
def db() -> None:
    """Work with a database in an enclave."""


for _whole in COMMANDS:
    db.add_command(_whole)


@db.command()
@click.argument("enclave", shell_complete=known_enclaves)
@click.argument("database", default=":memory:")
@click.option("--readonly", is_flag=True, help="Write nothing.")
@click.option("--timeout", type=click.FloatRange(min=0), default=5.0, show_default=True, help="For locks.")
@socket_option
def shell(enclave: str, database: str, readonly: bool, timeout: float, path: str | None) -> None:
    """Read SQL and print what it returns, from DATABASE in ENCLAVE (default: one in memory).

    At a terminal results are tables, Ctrl-C ends the statement that runs or the printing of its rows, and
    the history is not written to a file.  Otherwise columns are separated by tabs, and the first error is
    the end, with status 1.
    """
    from .. import connect, errors
    from .. import db as database_module

    with connect(path, client="teemate db") as broker, broker.attach(enclave) as attached:
        try:
            connection = database_module.connect(
                attached, database, timeout=timeout, isolation_level=None, readonly=readonly
            )
        except database_module.Error as error:
            if isinstance(error, errors.Error):
                raise
            raise click.ClickException(shown_text(str(error))) from None
        with contextlib.closing(connection):
            _converse(connection)


def _converse(connection: Any) -> None:
    from ..db import Error

    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  it edits what input() reads
        click.echo("SQLite in an enclave.  .help says what there is besides SQL.")
    for text in _inputs(terminal):
        try:
            with _interrupting(connection) as check:
                if text.startswith("."):
                    if not _dot_command(connection, text, check):
                        return
                else:
                    # Closed at once: what is half read would keep its lock until the next statement.
                    with contextlib.closing(connection.execute(text)) as cursor:
                        _print(cursor, terminal, check)
        except Error as error:
            said = shown_text(str(error))
            if not terminal:
                raise click.ClickException(said) from None
            click.echo(f"Error: {said}", err=True)


def _inputs(terminal: bool) -> Iterator[str]:
    """Yield statements and commands as they are complete; the last may lack its semicolon."""
    begun = ""
    while True:
        try:
            line = input(("   ...> " if begun else "teemate> ") if terminal else "")
        except EOFError:
            break
        except KeyboardInterrupt:  # what was begun is forgotten
            click.echo()
            begun = ""
            continue
        if not begun and line.startswith("."):
            yield line.strip()
            continue
        complete, begun = split(f"{begun}{line}\n")
        yield from complete
    if terminal:
        click.echo()
    if begun:
        yield begun


def split(text: str) -> tuple[list[str], str]:
    """Return the complete statements of `text`, and what has begun after them."""
    from ..db import complete_statement

    statements: list[str] = []
    begin = end = 0
    while (end := text.find(";", end) + 1) > 0:
        if complete_statement(text[begin:end]):
            statements.append(text[begin:end])
            begin = end
    rest = text[begin:]
    return statements, rest if rest.strip() else ""


@contextlib.contextmanager
def _interrupting(connection: Any) -> Iterator[Callable[[], None]]:
    """Have Ctrl-C end the statement that runs, and not this program with it.

    Yields what raises the same error where it came while no statement ran, but its rows were printed.
    """
    from ..db import OperationalError

    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True
        connection.interrupt()

    def check() -> None:
        if pressed:
            raise OperationalError("interrupted")

    before = signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _rows(cursor: Any, check: Callable[[], None]) -> Iterator[Any]:
    """Yield the rows of `cursor`, none once Ctrl-C has come."""
    for row in cursor:
        yield row
        check()


def _dot_command(connection: Any, text: str, check: Callable[[], None]) -> bool:
    """Do what `text` says; false when it is to leave."""
    tables = "FROM sqlite_schema WHERE name NOT LIKE 'sqlite~_%' ESCAPE '~'"
    if text == ".tables":
        query = f"SELECT name {tables} AND type IN ('table', 'view') ORDER BY name"
    elif text == ".schema":
        query = f"SELECT sql || ';' {tables} AND sql IS NOT NULL ORDER BY rowid"
    elif text in (".quit", ".exit"):
        return False
    else:
        click.echo(_HELP if text == ".help" else f"There is no {shown(text)}: .help says what there is.")
        return True
    with contextlib.closing(connection.execute(query)) as cursor:
        for (line,) in _rows(cursor, check):
            click.echo(shown_text(line))
    return True


def shown(value: object) -> str:
    """Return `value` as it is printed: no character of it reaches the terminal as a command."""
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"x'{value.hex()}'"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def shown_text(text: str) -> str:
    """Return `text` as `shown` does, but with the lines and tabs that it has."""
    return "".join(c if c in "\n\t" else shown(c) for c in text)


def _print(cursor: Any, terminal: bool, check: Callable[[], None]) -> None:
    if cursor.description is None:
        return
    names = [shown(column[0]) for column in cursor.description]
    if not terminal:
        for row in _rows(cursor, check):
            click.echo("\t".join(map(shown, row)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    each = _rows(cursor, check)
    rows = list(islice(each, _CHUNK))
    while True:
        table = Table()
        for name in names:
            table.add_column(Text(name))
        for row in rows:
            cells = []
            for value in row:
                right = isinstance(value, int | float)
                style = "dim" if value is None else ""
                cells.append(Text(shown(value), style=style, justify="right" if right else "left"))
            table.add_row(*cells)
        console.print(table)
        rows = list(islice(each, _CHUNK))
        if not rows:
            return
