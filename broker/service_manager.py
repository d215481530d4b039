"""What a service manager gives and wants: sockets by number, and word that we are ready.

The protocols of systemd's sd_listen_fds(3) and sd_notify(3), which other managers speak too.
"""

from __future__ import annotations

import os
import socket

__all__ = ["inherited_sockets", "notify"]

_FIRST_FD = 3


def inherited_sockets() -> list[socket.socket]:
    """Return the sockets that we were started with; none when they are meant for another process."""
    if os.environ.get("LISTEN_PID") not in (None, str(os.getpid())) or not os.environ.get("LISTEN_FDS"):
        return []
    count = int(os.environ["LISTEN_FDS"])
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    found = []
    for fd in range(_FIRST_FD, _FIRST_FD + count):
        os.set_inheritable(fd, False)
        found.append(socket.socket(fileno=fd))
    return found


def notify(state: str) -> bool:
    """Send `state` ("READY=1") to the service manager; False when there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        sock.sendall(state.encode())
    return True
