"""What a service manager gives and wants: descriptors by number, and word that we are ready.

The protocols of systemd's sd_listen_fds(3) and sd_notify(3), which other managers speak too, and
our own keeper (keeper.py).
"""

from __future__ import annotations

import array
import json
import os
import socket
from typing import NamedTuple

from teemate.broker.restart.kept import FIRST_FD, MAX_FDS

__all__ = ["Inherited", "await_turn", "inherited_descriptors", "notify", "notify_address", "notify_soon"]


class Inherited(NamedTuple):
    """A descriptor that we were started with; whoever takes it out of the list owns it."""

    name: str
    fd: int


def inherited_descriptors() -> list[Inherited]:
    """Return what we were started with; nothing when that was meant for another process."""
    if os.environ.get("LISTEN_PID") not in (None, str(os.getpid())) or not os.environ.get("LISTEN_FDS"):
        return []
    count = int(os.environ["LISTEN_FDS"])
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    found = []
    for index in range(count):
        os.set_inheritable(FIRST_FD + index, False)
        found.append(Inherited(names[index] if len(names) == count else "", FIRST_FD + index))
    return found


def await_turn(sock: socket.socket) -> list[Inherited]:
    """Wait until the keeper hands over what its last worker had; it closes the socket when it never will.

    Returns nothing then: a worker always gets something.
    """
    found: list[Inherited] = []
    while True:
        data, ancillary, _, _ = sock.recvmsg(65536, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC)
        if not data:
            return []
        message = json.loads(data)
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload)
        found += [Inherited(name, fd) for name, fd in zip(message["names"], fds, strict=True)]
        if not message["more"]:
            return found


def notify_address() -> str:
    """Where the service manager listens, as connect() takes it; empty when there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    return "\0" + address[1:] if address.startswith("@") else address


def notify(state: str) -> bool:
    """Send `state` ("READY=1") to the service manager; False when there is none."""
    address = notify_address()
    if not address:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        sock.sendall(state.encode())
    return True


def notify_soon(state: str) -> bool:
    """Send `state` without waiting; False when there is no manager, or it has too much to read just now."""
    address = notify_address()
    if not address:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            sock.send(state.encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True
