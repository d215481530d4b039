"""The `teemate` command: finds the subcommand, shows errors, and sets the exit status.

Exit statuses: 0 done; 1 failed, for a reason that is none of the following; 2 wrong usage;
3 the image, its signature or key is bad; 4 not allowed; 5 no broker, or the connection
broke; 6 busy, or a limit was met; 7 drained only in part; 130 interrupted.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ..errors import Busy, ConnectionLost, Denied, Error, ImageError, LimitReached

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["COMMANDS", "cli", "main"]

# Name -> where the click command is, and its line in `teemate --help`, which must import none of them.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("teemate.cli.demo:demo", "One shared enclave against one for each program, measured."),
    "bench": ("teemate.cli.bench:bench", "Measure how fast and how small, and try what it stands."),
    "doctor": ("teemate.cli.doctor:doctor", "Check this host, and say what to do."),
    "status": ("teemate.cli.status:status", "Show the broker's enclaves, their slots and clients."),
    "top": ("teemate.cli.top:top", "Show enclaves and clients as they work."),
    "slots": ("teemate.cli.looking:slots", "Who holds which slot, and who waits for whom."),
    "usage": ("teemate.cli.looking:usage", "Enclave memory by container."),
    "denials": ("teemate.cli.looking:denials", "Who was denied what, and why."),
    "monitor": ("teemate.cli.monitor:monitor", "Show the traffic of all clients as it goes by."),
    "proxy": ("teemate.cli.proxy:proxy", "Stand between clients and a broker, and show or record."),
    "decode": ("teemate.cli.proxy:decode", "Print what a proxy has recorded."),
    "replay": ("teemate.cli.replay:replay", "Play a recording's clients against a broker, and compare."),
    "send": ("teemate.cli.send:send", "Send the broker one request, in order or not."),
    "reload": ("teemate.cli.looking:reload", "Have the broker take its changed policy into use."),
    "seccomp": ("teemate.cli.seccomp:seccomp", "A container's seccomp profile, without SGX's ioctls."),
    "call": ("teemate.cli.call:call", "Do one call into an enclave."),
    "db": ("teemate.cli.db:db", "Work with a database in an enclave."),
    "fn": ("teemate.cli.fn:fn", "Functions in WebAssembly: build, deploy and invoke them."),
    "revoke": ("teemate.cli.revoke:revoke", "Take grants back."),
    "drain": ("teemate.cli.drain:drain", "Give out no new grants, and wait for the old ones to end."),
    "undrain": ("teemate.cli.drain:undrain", "Take drained enclaves into use again."),
    "upgrade": ("teemate.cli.drain:upgrade", "Replace an enclave by one from another image."),
    "destroy": ("teemate.cli.drain:destroy", "End an enclave."),
    "image": ("teemate.cli.image:image", "Build, sign, verify and look at enclave images."),
    "enclave": ("teemate.cli.enclave:enclave", "Start writing an enclave of your own."),
    "completion": ("teemate.cli.completion:completion", "Have a shell complete these commands."),
}

EXIT_STATUS: tuple[tuple[type[Error], int], ...] = (
    (ImageError, 3),
    (Denied, 4),
    (ConnectionLost, 5),
    (Busy, 6),
    (LimitReached, 6),
)


class _Lazy(click.Group):
    """A group whose commands are imported when they are called: `teemate --help` starts at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}:{name} is no click command")
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=text) for name, (_, text) in COMMANDS.items()]
        found = [item for item in found if str(item.value).startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import version

    click.echo(f"teemate {version('teemate')}")
    ctx.exit()


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
)
def cli() -> None:
    """One Intel SGX enclave for many processes."""


def exit_status(error: Error) -> int:
    """Return the exit status that stands for `error`."""
    return next((status for kind, status in EXIT_STATUS if isinstance(error, kind)), 1)


def show_error(error: Error, *, as_json: bool) -> None:
    """Print `error`: for people to stderr, or as ``{"error": {code, message, detail}}`` to stdout."""
    if as_json:
        body = {"code": error.code, "message": error.message, "detail": error.detail}
        click.echo(json.dumps({"error": body}, default=str))
        return
    click.secho(f"teemate: {error.code}: ", err=True, nl=False, fg="red", bold=True)
    click.echo(error.message, err=True)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `args` (default: the process's own) and exit with its status."""
    sys.exit(run(list(sys.argv[1:] if args is None else args)))


def run(args: list[str], invoke: Callable[..., Any] = cli.main) -> int:
    """Run `args` and return the exit status."""
    as_json = "--json" in args
    try:
        result = invoke(args=args, prog_name="teemate", standalone_mode=False)
        sys.stdout.flush()  # here, where a closed pipe is still an answer and not a traceback
    except Error as error:
        show_error(error, as_json=as_json)
        return exit_status(error)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader has seen enough (`teemate ... | head`); nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        return 1  # as click and rich have it
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        failure = Error(f"{place}{error.strerror or error}", {"errno": error.errno})
        failure.code = "system"
        show_error(failure, as_json=as_json)
        return 1
    return result if isinstance(result, int) else 0
