"""`teemate fn` with an enclave: deploy functions, invoke them, look at them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from ._complete import enclaves as known_enclaves
from ._output import NUMBER, SIZE, json_option, print_json
from ._socket import socket_option

if TYPE_CHECKING:
    from ..functions import FunctionInfo, FunctionLimits, FunctionLog, Functions, Sealing

__all__ = ["COMMANDS"]

_F = TypeVar("_F", bound=Callable[..., Any])
_EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)


def enclave_option(command: _F) -> _F:
    """Add --enclave and --socket."""
    option = click.option(
        "--enclave",
        default="functions",
        show_default=True,
        shell_complete=known_enclaves,
        help="The enclave that the functions are in.",
    )
    return socket_option(option(command))


def limit_options(command: _F) -> _F:
    """Add an option for each limit."""
    options = [
        click.option("--memory", type=SIZE, help="Linear memory: bytes, or 16M."),
        click.option("--fuel", type=NUMBER, help="Work: about one for each instruction."),
        click.option("--time", type=click.FloatRange(min=0, min_open=True), help="Seconds."),
        click.option("--output", type=SIZE, help="What may be written to stdout: bytes, or 1M."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


class _functions:  # noqa: N801 (used as a function)
    """``with _functions(socket, enclave) as functions``."""

    def __init__(self, path: str | None, enclave: str) -> None:
        from .. import connect

        self._broker = connect(path, client="teemate fn")
        self._enclave = enclave

    def __enter__(self) -> Functions:
        return self._broker.functions_of(self._enclave)

    def __exit__(self, *_: object) -> None:
        self._broker.close()


@contextlib.contextmanager
def _sealing(
    path: str | None, sealed: bool, mrenclave: str | None, vault: str | None
) -> Iterator[bool | Sealing]:
    """Yield for which enclave an upload is sealed, if it is."""
    if not sealed:
        if mrenclave or vault:
            raise click.UsageError("--mrenclave and --vault say whom to seal for: give --sealed too")
        yield False
        return
    from ..functions import Sealing

    try:
        wanted = None if mrenclave is None else bytes.fromhex(mrenclave)
    except ValueError:
        wanted = b""
    if wanted is not None and len(wanted) != 32:
        raise click.UsageError("--mrenclave takes 64 hexadecimal digits (`teemate image info` shows them)")
    if vault is None:
        yield Sealing(mrenclave=wanted)
        return
    from .. import connect
    from ..vault import Vault

    with (
        connect(path, client="teemate fn") as broker,
        broker.attach(vault) as enclave,
        enclave.slot() as slot,
    ):
        yield Sealing(mrenclave=wanted, verifier=Vault(slot))


def _limits(memory: int | None, fuel: int | None, time: float | None, output: int | None) -> FunctionLimits:
    from ..functions import FunctionLimits

    return FunctionLimits(memory=memory, fuel=fuel, time=time, output=output)


def _environment(settings: Sequence[str]) -> dict[str, str]:
    env = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise click.UsageError(f"--env takes NAME=VALUE, not {setting!r}")
        env[name] = value
    return env


@click.command()
@click.argument("name")
@click.argument("module", type=_EXISTING)
@limit_options
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="For every invocation; may be repeated.")
@click.option("--replace", is_flag=True, help="Take the place of a function of that name.")
@click.option("--grant", "grants", multiple=True, type=click.Choice(["keys"]), help="What it may do besides.")
@click.option("--sealed", is_flag=True, help="Encrypt MODULE and its environment to the enclave.")
@click.option("--mrenclave", metavar="HEX", help="With --sealed: of the enclave that may have it.")
@click.option("--vault", metavar="NAME", help="With --sealed: the enclave that verifies the report.")
@enclave_option
@json_option
def deploy(
    name: str,
    module: Path,
    memory: int | None,
    fuel: int | None,
    time: float | None,
    output: int | None,
    env: tuple[str, ...],
    replace: bool,
    grants: tuple[str, ...],
    sealed: bool,
    mrenclave: str | None,
    vault: str | None,
    enclave: str,
    path: str | None,
    as_json: bool,
) -> None:
    """Check MODULE, a WebAssembly command for WASI, and keep it in the enclave as NAME."""
    environment, limits = _environment(env), _limits(memory, fuel, time, output)
    with _functions(path, enclave) as functions, _sealing(path, sealed, mrenclave, vault) as sealing:
        info = functions.deploy(
            name,
            module.read_bytes(),
            limits=limits,
            env=environment,
            replace=replace,
            sealed=sealing,
            grants=grants,
        )
    if as_json:
        print_json(asdict(info))
    else:
        click.echo(f"{info.name}: {info.size:,} bytes, sha256 {info.digest}")


@click.command()
@click.argument("name")
@click.argument("payload", required=False)
@click.option(
    "--file", "file", type=click.File("rb"), help="Take the payload from a file; - is standard input."
)
@click.option("--arg", "args", multiple=True, help="An argument for the function; may be repeated.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="May be repeated.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds.")
@enclave_option
def invoke(
    name: str,
    payload: str | None,
    file: BinaryIO | None,
    args: tuple[str, ...],
    env: tuple[str, ...],
    timeout: float | None,
    enclave: str,
    path: str | None,
) -> None:
    """Run the function NAME with PAYLOAD (text) as its standard input, and print what it writes."""
    if file is not None and payload is not None:
        raise click.UsageError("give PAYLOAD or --file, not both")
    data = file.read() if file is not None else (payload or "").encode(errors="surrogateescape")
    environment = _environment(env)
    with _functions(path, enclave) as functions:
        answer = functions.invoke(name, data, args=args, env=environment, timeout=timeout)
    sys.stdout.buffer.write(answer)
    if sys.stdout.isatty() and answer and not answer.endswith(b"\n"):
        click.echo()


@click.command("list")
@enclave_option
@json_option
def list_(enclave: str, path: str | None, as_json: bool) -> None:
    """Show this user's functions."""
    with _functions(path, enclave) as functions:
        found = functions.list()
        usage = functions.usage()
    if as_json:
        print_json({"functions": [asdict(info) for info in found], "usage": asdict(usage)})
        return
    rows = [
        (
            info.name,
            info.digest[:12],
            f"{info.size:,}",
            f"{info.invocations:,}",
            f"{info.failures:,}",
            _size(info.limits.memory or 0),
            f"{info.limits.time:g} s",
            _when(info.deployed),
        )
        for info in found
    ]
    headings = ("name", "sha256", "bytes", "invoked", "failed", "memory", "time", "deployed")
    _print(headings, rows, right=range(2, 7))
    click.echo(
        f"{len(found)} functions, {_size(usage.size)} of {_size(usage.maximum)} for modules; "
        f"{usage.keys} key{'' if usage.keys == 1 else 's'}, {_size(usage.keys_size)} of "
        f"{_size(usage.keys_maximum)}; "
        f"the enclave's heap: {_size(usage.heap_used)} of {_size(usage.heap)} used, "
        f"{_size(usage.heap_ready)} for modules that are ready in free slots"
    )


def _describe(info: FunctionInfo, as_json: bool) -> None:
    if as_json:
        print_json(asdict(info))
        return
    limits = info.limits
    for what, value in (
        ("name", info.name),
        ("owner", info.owner),
        ("sha256", info.digest),
        ("size", f"{info.size:,} bytes"),
        ("deployed", _when(info.deployed)),
        ("version", str(info.version)),
        ("invocations", f"{info.invocations:,}, of which {info.failures:,} failed"),
        ("fuel used", f"{info.fuel:,}"),
        ("grants", ", ".join(info.grants) or "none"),
        ("limits", f"memory {_size(limits.memory or 0)}, fuel {limits.fuel:,}, time {limits.time:g} s, "
                   f"output {_size(limits.output or 0)}"),
    ):  # fmt: skip
        click.echo(f"{what + ':':<13}{value}")


@click.command()
@click.argument("name")
@enclave_option
@json_option
def describe(name: str, enclave: str, path: str | None, as_json: bool) -> None:
    """Show what is known of the function NAME."""
    with _functions(path, enclave) as functions:
        info = functions.describe(name)
    _describe(info, as_json)


@click.command()
@click.argument("name")
@limit_options
@enclave_option
@json_option
def limits(
    name: str,
    memory: int | None,
    fuel: int | None,
    time: float | None,
    output: int | None,
    enclave: str,
    path: str | None,
    as_json: bool,
) -> None:
    """Change limits of the function NAME, those that are given, and show what they are."""
    wanted = _limits(memory, fuel, time, output)
    with _functions(path, enclave) as functions:
        info = functions.limits(name, wanted)
    _describe(info, as_json)


@click.command()
@click.argument("name")
@click.option("--after", type=click.IntRange(min=0), default=0, help="Only later invocations than this one.")
@enclave_option
@json_option
def logs(name: str, after: int, enclave: str, path: str | None, as_json: bool) -> None:
    """Show what invocations of the function NAME wrote to stderr, and how those that failed ended."""
    with _functions(path, enclave) as functions:
        found = functions.logs(name, after=after)
    if as_json:
        entries = [{**asdict(entry), "text": entry.text.decode(errors="replace")} for entry in found]
        print_json({"logs": entries})
        return
    for entry in found:
        _show_log(entry)


def _show_log(entry: FunctionLog) -> None:
    how = entry.outcome
    if how == "failed":
        how = f"exit code {entry.exit_code}"
    elif how == "limit":
        how = f"limit of {entry.limit}"
    click.secho(f"{entry.invocation}  {_when(entry.time)}  {how}", bold=True)
    if entry.dropped:
        click.echo(f"  ({entry.dropped:,} bytes before this were not kept)")
    # A function's text is its owner's, but no command for this terminal.
    for line in entry.text.decode(errors="replace").splitlines():
        click.echo("  " + "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in line))


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@enclave_option
def remove(names: tuple[str, ...], enclave: str, path: str | None) -> None:
    """Forget functions, and their logs."""
    with _functions(path, enclave) as functions:
        for name in names:
            functions.remove(name)


@click.command("clear-keys")
@enclave_option
def clear_keys(enclave: str, path: str | None) -> None:
    """Delete all that this user's functions with the grant "keys" have put."""
    with _functions(path, enclave) as functions:
        functions.clear_keys()


def _size(size: int) -> str:
    from .._sizes import format_size

    return format_size(size)


def _when(seconds: float) -> str:
    if not seconds:
        return "(unknown)"
    return datetime.fromtimestamp(seconds, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _print(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


COMMANDS = (deploy, invoke, list_, describe, limits, logs, remove, clear_keys)
