"""`teemate call`: one ECALL from the shell."""

from __future__ import annotations

import sys
from typing import BinaryIO

import click

from ._complete import enclaves as known_enclaves
from ._output import json_option, print_json
from ._socket import socket_option

__all__ = ["call"]


@click.command()
@click.argument("enclave", shell_complete=known_enclaves)
@click.argument("name")
@click.argument("payload", required=False)
@click.option("--file", "file", type=click.File("rb"), help="Take the payload from a file.")
@click.option("--hex", "as_hex", is_flag=True, help="PAYLOAD is hexadecimal, and so is what is printed.")
@click.option("--timeout", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Seconds.")
@click.option("--wait", type=click.FloatRange(min=0), default=10.0, show_default=True, help="For a slot.")
@click.option("--max-reply", type=click.IntRange(min=0), default=1 << 20, show_default=True, help="Bytes.")
@socket_option
@json_option
def call(
    enclave: str,
    name: str,
    payload: str | None,
    file: BinaryIO | None,
    as_hex: bool,
    timeout: float,
    wait: float,
    max_reply: int,
    path: str | None,
    as_json: bool,
) -> None:
    """Attach to ENCLAVE, do the ECALL NAME with PAYLOAD, print the answer.

    PAYLOAD is text; "-" reads it from standard input; without one it is empty.
    """
    from .. import connect

    data = _payload(payload, file, as_hex)
    with connect(path, client="teemate call") as broker, broker.attach(enclave, wait=wait) as attached:
        with attached.slot() as slot:
            answer = slot.call(name, data, timeout=timeout, max_reply=max_reply)
    if as_json:
        print_json({"enclave": enclave, "call": name, "length": len(answer), "answer_hex": answer.hex()})
    elif as_hex:
        click.echo(answer.hex())
    else:
        sys.stdout.buffer.write(answer)
        if sys.stdout.isatty() and not answer.endswith(b"\n"):
            click.echo()


def _payload(payload: str | None, file: BinaryIO | None, as_hex: bool) -> bytes:
    if file is not None:
        if payload is not None:
            raise click.UsageError("give PAYLOAD or --file, not both")
        return file.read()
    if payload is None:
        return b""
    if payload == "-":
        data = sys.stdin.buffer.read()
        if not as_hex:
            return data
        payload = data.decode(errors="replace").strip()
    if not as_hex:
        return payload.encode(errors="surrogateescape")
    try:
        return bytes.fromhex(payload)
    except ValueError as error:
        raise click.UsageError(f"PAYLOAD is not hexadecimal: {error}") from None
