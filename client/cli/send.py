"""`teemate send`: one request, in order or not, and what is answered."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from ._complete import arguments, operations
from ._socket import socket_option
from ._traffic import json_lines_option

if TYPE_CHECKING:
    from ..traffic.plain import PlainConnection
    from ..wire import Packet

__all__ = ["send"]

_ID = 1


@click.command()
@click.argument("op", required=False, shell_complete=operations)
@click.argument("args", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=arguments)
@click.option(
    "--field", "fields", multiple=True, metavar="KEY=VALUE", help="Set id, op, args, or another field."
)
@click.option("--without", multiple=True, metavar="KEY", help="Leave a field out.")
@click.option(
    "--fd", "files", multiple=True, type=click.Path(), help="Send this file's descriptor along. Repeatable."
)
@click.option("--raw", metavar="HEX", help="Send these bytes instead; - takes them from standard input.")
@click.option(
    "--hello", "greeting", multiple=True, metavar="KEY=VALUE", help="Set an argument of the hello before."
)
@click.option("--no-hello", is_flag=True, help="Say no hello before.")
@click.option(
    "--wait", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Seconds for the answer."
)
@click.option(
    "--listen",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Seconds to print what else comes, afterwards.",
)
@socket_option
@json_lines_option
def send(
    op: str | None,
    args: tuple[str, ...],
    fields: tuple[str, ...],
    without: tuple[str, ...],
    files: tuple[str, ...],
    raw: str | None,
    greeting: tuple[str, ...],
    no_hello: bool,
    wait: float,
    listen: float,
    path: str | None,
    as_json: bool,
) -> int:
    """Send the broker one request and print what it answers, in CBOR diagnostic notation.

    For trying out the protocol (client/protocol.cddl), and for breaking it: nothing is checked here. VALUE is
    text, or diagnostic notation where it is that: 5, 1.5, true, null, h'00ff', [1, 2], {"a": 1}; "5" is text
    then. What was granted ends with the connection, that is, at once. Slot keys, tokens and MACs are not
    printed. An answer that is an error sets the exit status as with other commands.

    \b
    teemate send attach enclave=vault slots=2
    teemate send slots.release grant=5 slots='[2, 3]' clean=true
    teemate send ping --field id=-1
    teemate send --raw a1ff
    """
    from ..traffic.plain import PlainConnection

    data, message = _request(op, args, fields, without, raw)
    hello: dict[str, object] = {"version": 1, "client": "teemate send", **_pairs(greeting)}
    with ExitStack() as stack:
        fds = []
        for file in files:
            fds.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
            stack.callback(os.close, fds[-1])
        broker = stack.enter_context(PlainConnection(path))
        if not no_hello:
            broker.ask("hello", hello)
        talk = _Talk(as_json)
        talk.sent(message, data, tuple(fds))
        broker.send(data, tuple(fds))
        return _listen(broker, talk, message, wait, listen)


def _pairs(typed: tuple[str, ...]) -> dict[str, object]:
    pairs: dict[str, object] = {}
    for pair in typed:
        key, equals, value = pair.partition("=")
        if not equals:
            raise click.UsageError(f"{pair!r} is no KEY=VALUE")
        pairs[key] = _value(value)
    return pairs


def _value(typed: str) -> object:
    """Return what was typed: text, unless it is diagnostic notation, or begins as only that does."""
    from ..traffic.diagnostic import DiagnosticError, parse

    try:
        value: object = parse(typed)
    except DiagnosticError as error:
        if typed.startswith(('"', "[", "{", "h'")):
            raise click.UsageError(str(error)) from None
        return typed
    return value


def _request(
    op: str | None, args: tuple[str, ...], fields: tuple[str, ...], without: tuple[str, ...], raw: str | None
) -> tuple[bytes, dict[str, Any] | None]:
    """Return the request's bytes, and the message if it was not given as bytes."""
    from ..wire import encode_part

    if raw is not None:
        if op is not None or args or fields or without:
            raise click.UsageError("--raw is the whole request: give no OP, KEY=VALUE, --field or --without")
        if raw == "-":
            return sys.stdin.buffer.read(), None
        try:
            return bytes.fromhex(raw), None
        except ValueError as error:
            raise click.UsageError(f"--raw is not hexadecimal: {error}") from None
    message: dict[str, Any] = {"id": _ID}
    if op is not None:
        message["op"] = op
    if args:
        message["args"] = _pairs(args)
    message |= _pairs(fields)
    for key in without:
        message.pop(key, None)
    if not message.keys() - {"id"}:
        raise click.UsageError("give an OP, --field or --raw")
    return encode_part(message), message


def _listen(
    broker: PlainConnection, talk: _Talk, request: dict[str, Any] | None, wait: float, listen: float
) -> int:
    """Print what comes; returns the exit status that the answer stands for."""
    from ..errors import CallTimeout
    from ..wire import close_all

    status, answered = 0, False
    end = time.monotonic() + wait
    while True:
        packet = broker.receive(end - time.monotonic())
        if packet is None:
            if not answered:
                raise CallTimeout(f"the broker gave no answer within {wait:g} s (--wait)", {"wait": wait})
            return status
        try:
            if not packet.data:
                talk.ended()
                if not answered:
                    raise broker.ended()
                return status
            message = talk.received(packet)
        finally:
            close_all(packet.fds)
        if not answered and "event" not in message and message.get("id") in (None, (request or {}).get("id")):
            answered, status = True, _status(message)
            end = time.monotonic() + listen


def _status(message: dict[str, Any]) -> int:
    from ..errors import from_code
    from .main import exit_status

    error = message.get("error")
    if not isinstance(error, dict):
        return 0
    return exit_status(from_code(str(error.get("code")), str(error.get("message"))))


class _Talk:
    """Prints what goes and comes, without its secrets."""

    def __init__(self, as_json: bool) -> None:
        from ..traffic.concealing import Concealer
        from ..traffic.description import Conversation

        self._as_json = as_json
        self._concealer = Concealer()
        self._conversation = Conversation()

    def sent(self, message: dict[str, Any] | None, data: bytes, fds: tuple[int, ...]) -> None:
        """Print the request."""
        if message is not None:
            self._print("client", message, data, fds)
        elif self._as_json:
            self._line({"from": "client", "size": len(data)})
        else:
            click.echo(f"-> {len(data)} bytes")

    def received(self, packet: Packet) -> dict[str, Any]:
        """Print an answer or event, and return it."""
        from ..wire import decode_trusted

        message = decode_trusted(packet.data)
        self._print("broker", message, packet.data, packet.fds)
        return message

    def ended(self) -> None:
        """Print that the broker has ended the connection."""
        if self._as_json:
            self._line({"closed": "broker"})
        else:
            click.echo("<- (the broker ended the connection)")

    def _print(self, sender: str, message: dict[str, Any], data: bytes, fds: tuple[int, ...]) -> None:
        import cbor2

        from ..traffic.description import Described, Peer, plain
        from ..traffic.descriptors import describe_fd

        shown = cbor2.loads(self._concealer.conceal(message, data))
        facts = self._conversation.follow(time.monotonic(), sender, message)
        described = tuple(describe_fd(fd) for fd in fds)
        if self._as_json:
            told = {"from": sender, "size": len(data), "fds": [fd.as_map() for fd in described]}
            self._line({**told, "message": plain(shown)})
            return
        nobody = Peer(0, 0, "", "")
        body = Described(0.0, 0, nobody, sender, len(data), facts, described, shown).body()
        along = f" with {'; '.join(map(str, described))}" if described else ""
        click.echo(f"{'->' if sender == 'client' else '<-'} {body}{along}")

    @staticmethod
    def _line(told: dict[str, object]) -> None:
        sys.stdout.write(json.dumps(told) + "\n")
