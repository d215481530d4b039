"""A world whose broker expects processes of a user, and what they do."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from modelled_process import ModelledProcess, Reply
from modelled_restart import MortalWorld, ResumingProcess

from teemate import wire

__all__ = ["come", "end", "expect", "expecting_world", "granted", "greeted", "new_process", "said_last"]


def expecting_world(slots: int) -> Iterator[MortalWorld]:
    """For a fixture: the user 1000 is expected; nothing may be left at the end."""
    world = MortalWorld(slots, kill=False)
    for _ in range(2):  # who came twice will come again
        guest = world.start_process(1000)
        guest.hear()
        world.step(guest.end)
    yield world
    for process in list(world.living()):
        world.step(process.end)
    world.pass_time(40)
    assert not world.errors()
    world.close()


def greeted(world: MortalWorld) -> int:
    return world.service.attendant.statistics().greeted


def new_process(
    world: MortalWorld, uid: int = 1000, groups: bytes = b"", label: bytes = b""
) -> ResumingProcess:
    process = world.new_process(uid)
    assert isinstance(process, ResumingProcess)
    process.groups, process.label = groups, label
    return process


def expect(world: MortalWorld, groups: bytes, label: bytes) -> None:
    """Have such processes of the user expected."""
    for _ in range(2):
        guest = new_process(world, 1000, groups, label)
        world.reconnect(guest)
        guest.hear()
        world.step(guest.end)


def come(world: MortalWorld, process: ResumingProcess) -> Reply:
    world.step(lambda: world.come(process))
    reply = process.waiting[max(process.waiting)]
    process.hear()
    return reply


def granted(reply: Reply) -> tuple[int, int, bytes]:
    """Grant, slot and key."""
    assert reply.ok is not None, reply.error
    (slot,) = reply.ok["slots"]
    return reply.ok["grant"], slot["slot"], slot["key"]


def end(world: MortalWorld, process: ModelledProcess, grant: int) -> None:
    world.step(lambda: process.post("detach", grant=grant, clean=True))
    process.hear()
    assert process.answered[-1].ok is not None


def said_last(sock: socket.socket) -> list[dict[str, Any]]:
    """What was sent that answers nothing."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(BlockingIOError):
        while (packet := wire.receive(sock)).data:
            wire.close_all(packet.fds)
            found.append(wire.decode(packet.data))
    return [message for message in found if message["id"] is None]
