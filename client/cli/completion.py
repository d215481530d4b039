"""`teemate completion`: what makes a shell complete commands, options, enclaves and operations."""

from __future__ import annotations

import click

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what a shell needs to complete teemate's commands.

    \b
    bash: eval "$(teemate completion bash)" in ~/.bashrc
    zsh:  eval "$(teemate completion zsh)" in ~/.zshrc, after compinit
    fish: teemate completion fish >~/.config/fish/completions/teemate.fish
    """
    from click.shell_completion import get_completion_class

    from .main import cli

    kind = get_completion_class(shell)
    assert kind is not None  # click has had these three from the beginning
    click.echo(kind(cli, {}, "teemate", "_TEEMATE_COMPLETE").source())
