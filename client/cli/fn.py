"""`teemate fn`: functions in WebAssembly."""

from __future__ import annotations

from pathlib import Path

import click

from ._output import SIZE, json_option, print_json
from .fn_deployed import COMMANDS

__all__ = ["fn"]

_SOURCE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def fn() -> None:
    """Functions in WebAssembly, run inside an enclave that is already there."""


@fn.command()
@click.argument("sources", nargs=-1, required=True, type=_SOURCE, metavar="FILE.c...")
@click.option("-o", "--output", type=_SOURCE, metavar="FILE.wasm", help="Default: beside the first source.")
@click.option("--small", is_flag=True, help="Optimise for size instead of speed.")
@click.option("--stack", type=SIZE, default="64K", show_default=True, help="The function's C stack.")
@click.option(
    "-D", "--define", "defines", multiple=True, metavar="NAME[=VALUE]", help="For the C preprocessor."
)
@click.option(
    "-I", "--include", "includes", multiple=True, metavar="DIR", type=_FOLDER, help="Where headers are."
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=600.0, show_default=True, metavar="SECONDS",
    help="How long it may take; the first time compiles the C library too.",
)  # fmt: skip
@json_option
def build(
    sources: tuple[Path, ...],
    output: Path | None,
    small: bool,
    stack: int,
    defines: tuple[str, ...],
    includes: tuple[Path, ...],
    timeout: float,
    as_json: bool,
) -> None:
    """Compile C to a module for WASI, with the compiler of the wheel `ziglang` (teemate[fn])."""
    from ..wasm import build_module

    output = output or sources[0].with_suffix(".wasm")
    if output.suffix != ".wasm":
        raise click.UsageError(f"{output}: the name of a module ends in .wasm")
    built = build_module(
        sources, output, small=small, stack=stack, defines=defines, includes=includes, timeout=timeout
    )
    if as_json:
        print_json(
            {"module": str(built.path), "size": built.size, "sha256": built.sha256, "said": built.said}
        )
        return
    if built.said:
        click.echo(built.said, err=True)
    click.echo(f"wrote {built.path} ({built.size} bytes)\nSHA-256 {built.sha256}")


for command in COMMANDS:
    fn.add_command(command)
