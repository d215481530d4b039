"""The sockets that a supervisor makes, or is given by the service manager, and its workers accept from."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from .settings import GatewayError, parse_listen

__all__ = ["inherited", "listen"]

BACKLOG = 512
_FIRST = 3
"""The first descriptor that a service manager passes (sd_listen_fds(3))."""


def inherited() -> list[socket.socket]:
    """Return the listening sockets that this process was started with."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    return [socket.socket(fileno=fd) for fd in range(_FIRST, _FIRST + count)]


def listen(where: str, mode: int) -> socket.socket:
    """Listen at `where` (:func:`parse_listen`); a socket in the file system gets `mode`.

    A socket that a dead gateway has left is replaced, one at which somebody listens is not.
    """
    address = parse_listen(where)
    if isinstance(address, tuple):
        sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    else:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _remove_stale(address)
    try:
        if isinstance(address, tuple):
            sock.bind(address)
        else:
            before = os.umask(0o777 & ~mode)
            try:
                sock.bind(address)
            finally:
                os.umask(before)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise GatewayError(f"cannot listen at {where}: {error.strerror}") from error
    return sock


def _remove_stale(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise GatewayError(f"{path} is there and not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(path)
            except TimeoutError:
                pass
            except OSError as error:
                if error.errno != errno.ECONNREFUSED:
                    raise GatewayError(f"cannot use {path}: {error.strerror}") from error
                os.unlink(path)
                return
        raise GatewayError(f"somebody listens at {path}")
