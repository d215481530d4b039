"""What the demonstration needs before it starts: an image of the wanted size, and a broker."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import trio

from teemate.errors import InternalError
from teemate.image import (
    LayoutOptions,
    SigParams,
    generate_key,
    inspect,
    layout_image,
    shipped,
    sign_with_key,
)
from teemate.image.layout import FLAG_TIME

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

__all__ = ["ENCLAVE", "DemoImage", "prepare_image", "run_broker"]

ENCLAVE = "vault"
START_TIMEOUT = 120.0
"""Seconds for a broker to build its enclave."""


class DemoImage(NamedTuple):
    """The vault, laid out for this run and signed with a key that lives as long as it."""

    sgxs: Path
    sigstruct: Path
    mrenclave: bytes
    pages: int
    measured: int
    """Bytes that are hashed."""
    size: int
    """Bytes of ELRANGE."""


def prepare_image(
    folder: Path,
    *,
    heap: int,
    clients: int,
    elf: Path | None = None,
    name: str = ENCLAVE,
    key: RSAPrivateKey | None = None,
) -> DemoImage:
    """Lay the shipped ELF `name` out with `heap` bytes and a slot for each client; needs no compiler.

    `elf` is another one than that which is shipped; `key` signs, or one that is made now.
    """
    source = shipped(name)
    header = inspect(source.sgxs).header
    if header is None:
        raise InternalError(f"{source.sgxs} is no image of the SDK: install TeeMate anew")
    options = replace(
        LayoutOptions(),
        slots=clients,
        io_slots=header.io_slots,
        stack=header.stack_size,
        heap=heap,
        nssa=header.nssa,
        debug=header.debug,
        time=bool(header.flags & FLAG_TIME),
    )
    built = layout_image(elf or source.elf, folder / f"{name}.sgxs", options)
    sigstruct = folder / f"{name}.sig"
    signed = sign_with_key(
        SigParams(debug_allowed=header.debug).unsigned(built.mrenclave), key or generate_key()
    )
    sigstruct.write_bytes(signed.to_bytes())
    info = inspect(built.sgxs)
    return DemoImage(built.sgxs, sigstruct, info.mrenclave, info.pages, info.measured, info.size)


class DemoBroker(NamedTuple):
    """A running broker."""

    path: str
    pid: int


@asynccontextmanager
async def run_broker(
    folder: Path, image: DemoImage, *, backend: str, clients: int
) -> AsyncGenerator[DemoBroker, None]:
    """Run a broker with a policy for this user alone until the block ends."""
    uid = os.geteuid()
    policy = folder / "broker.toml"
    policy.write_text(
        f"""
[broker]
backend = "{backend}"

[administrators]
uids = [{uid}]

[limits]
connections = {clients + 8}
grants = {clients + 8}
slots = {clients + 8}

[[enclave]]
name = "{ENCLAVE}"
image = "{image.sgxs.name}"
sigstruct = "{image.sigstruct.name}"
slots_per_client = 1

[[enclave.attach]]
uid = {uid}
"""
    )
    path = folder / "broker.sock"
    log = folder / "broker.log"
    notify_path = folder / "notify.sock"
    with (
        trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
        log.open("wb") as log_file,
    ):
        await notify.bind(str(notify_path))
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "teemate.broker.main", "--config", str(policy), "--socket", str(path)],
            stdin=None,
            stdout=log_file,
            stderr=log_file,
            env={**os.environ, "NOTIFY_SOCKET": str(notify_path)},
            process_group=0,  # Ctrl-C is for the demonstration, which ends the broker
        )
        try:
            await _wait_ready(process, notify, log)
            yield DemoBroker(str(path), process.pid)
        finally:
            await end_process(process)


async def _wait_ready(process: trio.Process, notify: trio.socket.SocketType, log: Path) -> None:
    ready = False

    async def listen(scope: trio.CancelScope) -> None:
        nonlocal ready
        ready = (await notify.recv(4096)).startswith(b"READY=1")
        scope.cancel()

    with trio.move_on_after(START_TIMEOUT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, nursery.cancel_scope)
            await process.wait()
            nursery.cancel_scope.cancel()
    if not ready:
        said = (await trio.Path(log).read_text(errors="replace"))[-2000:]
        raise InternalError(f"the broker did not get ready within {START_TIMEOUT:g} s; it said:\n{said}")


async def end_process(process: trio.Process, grace: float = 10.0) -> None:
    """End a process that we started, in any case, and reap it."""
    with trio.CancelScope(shield=True):
        if process.poll() is None:
            process.terminate()
            with trio.move_on_after(grace):
                await process.wait()
        if process.poll() is None:
            process.kill()
            await process.wait()
