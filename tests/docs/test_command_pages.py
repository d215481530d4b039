"""teemate(1), teemate-gateway(8) and --help tell of every command, every option and every default."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from teemate.cli.bench import bench
from teemate.cli.main import cli
from teemate.gateway.main import main as gateway

PROJECT = Path(__file__).resolve().parents[2]
README = (PROJECT / "README.md").read_text()
PAGE = (PROJECT / "man" / "teemate.1").read_text()
GATEWAY = (PROJECT / "man" / "teemate-gateway.8").read_text()


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        elif not command.hidden:
            yield (*path, name), command


def untold(page: str) -> set[tuple[str, ...]]:
    """Commands that no line of the page begins with, or that no list on it names."""
    found = re.findall(r"^\.(?:It|Pq) Cm (.*)$", page, re.MULTILINE)
    lines = [re.findall(r"[a-z-]+", line) for line in found]
    campaigns = {word for line in lines for word in line}
    return {
        path
        for path, _ in commands(cli)
        if not (path[0] == "bench" and path[-1] in campaigns)
        and not any(line[0] == path[0] and path[-1] in line for line in lines)
    }


def test_the_page_names_every_command() -> None:
    assert len(list(commands(cli))) > 50
    assert untold(PAGE) == set()


def test_a_command_that_the_page_does_not_name_is_found() -> None:
    assert untold(PAGE.replace("Cm db limit", "Cm db bound")) == {("db", "limit")}
    assert untold(PAGE.replace(" functions , container", " container")) == {("bench", "functions")}


def test_every_command_and_every_option_says_what_it_does() -> None:
    for path, command in [*commands(cli), (("teemate-gateway",), gateway)]:
        assert command.help, path
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help, (path, parameter.name)


def test_the_readme_names_every_benchmark() -> None:
    chapter = README[README.index("## How fast, how small") : README.index("![Attaching takes")]
    assert {name for name in bench.commands if name != "storm" and name not in chapter} == set()


def test_the_page_of_the_gateway_tells_every_default() -> None:
    compared = 0
    for parameter in gateway.params:
        if type(parameter.default) not in (int, float, str):
            continue
        name = parameter.opts[0].removeprefix("--")
        told = re.search(rf"^\.It Fl -{name} .*\n((?:(?!\.It).*\n)+)", GATEWAY, re.MULTILINE)
        assert told is not None, name
        default = parameter.default
        expected = f"{default:g}" if isinstance(default, float) else str(default)
        assert re.search(rf"\b{re.escape(expected)}\b", told[1]), f"--{name}: {expected}"
        compared += 1
    assert compared > 8
