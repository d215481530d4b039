"""`teemate enclave`: start writing an enclave of your own."""

from __future__ import annotations

from pathlib import Path

import click

from ._output import json_option, print_json

__all__ = ["enclave"]


@click.group()
def enclave() -> None:
    """Start writing an enclave of your own."""


@enclave.command()
@click.argument("name")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where to make it. Default: a folder NAME here.",
)
@json_option
def new(name: str, directory: Path | None, as_json: bool) -> None:
    """Make a project NAME: an enclave that works, and a test that passes."""
    from ..image.project import new_project

    folder = directory or Path(name)
    written = new_project(name, folder)
    if as_json:
        print_json({"name": name, "folder": str(folder), "files": [str(path) for path in written]})
        return
    for path in written:
        click.echo(f"wrote {path}")
    click.echo(f"\nNow try it:\n  cd {folder}\n  python -m pytest")
