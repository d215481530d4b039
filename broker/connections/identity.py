"""Who is at the other end of a connection, as the kernel tells it.

Everything but the process's cgroup was fixed by the kernel when the connection
was made (SO_PEERCRED, SO_PEERGROUPS, SO_PEERSEC).  That one is read from /proc by number,
and a number can be given to another process in between.  Hence the order: take the
pidfd, read, then confirm through the pidfd that the process still lives; if it does, its
number was never free and what was read is its own.  If not, nothing of it is used.

SO_PEERPIDFD (Linux 6.5) is the process that connected.  On older kernels pidfd_open(pid)
may already open a successor (fork, exit, reuse of the number), so there cgroups are believed
only with ``trust_pid = true``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import final

from teemate.broker.connections.cgroups import CgroupTree
from teemate.errors import ConnectionLost

__all__ = [
    "Identity",
    "Peer",
    "cgroup_of",
    "command_of",
    "groups_in",
    "identify",
    "label_in",
    "peer_bytes",
    "peer_uid",
    "process_ended",
    "reopen_process",
    "start_time",
]

# asm-generic/socket.h; Python's socket module has none of them yet.
_SO_PEERSEC = 31
_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77
_UCRED = struct.Struct("iII")
_GROUPS_GUESS = 64 * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One process: what rules are matched against and what audit records name."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int]
    label: str
    """LSM label, empty when no security module gives one."""
    cgroup: str
    """Path in the hierarchy that the policy reads; empty when it may not be believed."""

    @property
    def cgroup_text(self) -> str:
        """`cgroup` for messages and logs: what its user put into it that cannot be printed is escaped."""
        return "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode() for char in self.cgroup
        )

    def principal_text(self, *, with_cgroup: bool, tree: CgroupTree) -> str:
        """Return the canonical text whose SHA-256 the enclave knows this client by."""
        if not with_cgroup:
            return f"uid={self.uid}"
        return f"uid={self.uid}\ncgroup={tree.trusted(self.cgroup) or ''}"


@lru_cache(maxsize=4096)
def principal(text: str) -> bytes:
    """Return the SHA-256 of a principal's canonical text (struct tm_identity)."""
    return sha256(text.encode("utf-8", "surrogateescape")).digest()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A process's identity and the pidfd that stands for it; the holder closes `pidfd`."""

    identity: Identity
    pidfd: int


def _pidfd(sock: socket.socket, pid: int) -> tuple[int, bool]:
    try:
        fd = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]
    except OSError as error:
        # Only where the kernel has no such option: else the peer was reaped (its number may be
        # another's by now) or there is no descriptor left.
        if error.errno != errno.ENOPROTOOPT:
            raise
        return os.pidfd_open(pid), False
    return fd, True


def _groups(sock: socket.socket) -> frozenset[int]:
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_GUESS)
    except OSError:  # ERANGE: more groups than expected; NGROUPS_MAX is 65536
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1 << 18)
    return groups_in(raw)


def groups_in(told: bytes) -> frozenset[int]:
    """Return the groups that the kernel tells so (SO_PEERGROUPS)."""
    return frozenset(struct.unpack(f"{len(told) // 4}I", told))


def label_in(told: bytes) -> str:
    """Return the label that the kernel tells so (SO_PEERSEC)."""
    return told.rstrip(b"\0").decode("utf-8", "replace")


def _label(sock: socket.socket) -> str:
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERSEC, 1024)
    except OSError:  # no security module gives labels
        return ""
    return label_in(raw)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 16384)
    finally:
        os.close(fd)


def start_time(pid: int, pidfd: int) -> int | None:
    """Return when the process behind `pidfd`, whose number is `pid`, started; None when it has ended.

    In ticks since the host's start (proc(5), stat).  With it the number names one process for ever, so a
    pidfd can be had again.
    """
    try:
        stat = _read(f"/proc/{pid}/stat")
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return None
    started = int(stat.rpartition(b")")[2].split()[19])
    return None if process_ended(pidfd) else started


def command_of(pid: int, pidfd: int) -> str:
    """Return what the process behind `pidfd` runs (proc(5), comm); empty when that cannot be told."""
    try:
        command = _read(f"/proc/{pid}/comm")
    except OSError:
        return ""
    return "" if process_ended(pidfd) else command.decode("utf-8", "backslashreplace").rstrip("\n")


def reopen_process(pid: int, started: int) -> int | None:
    """Return a pidfd of the process with that number and start time; None when it has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if start_time(pid, pidfd) == started:
        return pidfd
    os.close(pidfd)
    return None


def process_ended(pidfd: int) -> bool:
    """Whether the process has ended, be it reaped or not: a pidfd is readable from then on."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def peer_bytes(sock: socket.socket) -> tuple[bytes, bytes] | None:
    """Return groups and label of the process that connected `sock` as the kernel tells them.

    None where no other thread can find out that much: without SO_PEERPIDFD, or with many groups.
    """
    try:
        os.close(struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0])
        groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_GUESS)
    except OSError:
        return None
    try:
        return groups, sock.getsockopt(socket.SOL_SOCKET, _SO_PEERSEC, 1024)
    except OSError:
        return groups, b""


def cgroup_of(pid: int, pidfd: int, tree: CgroupTree) -> str:
    """Return the cgroup of the process behind `pidfd`.

    Raises
    ------
    ConnectionLost
        The process ended before that was known.
    OSError
        EMFILE or ENFILE: there are no descriptors for it.

    """
    try:
        membership = _read(f"/proc/{pid}/cgroup")
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise ConnectionLost(f"process {pid} ended before it was identified") from error
    if process_ended(pidfd):
        raise ConnectionLost(f"process {pid} ended before it was identified")
    return tree.path_of(membership)


def peer_uid(sock: socket.socket) -> int:
    """Return whom the process that connected `sock` belonged to then; takes no descriptor."""
    uid: int = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
    return uid


def identify(sock: socket.socket, tree: CgroupTree, *, trust_pid: bool = False) -> Peer:
    """Return who connected `sock`; the caller owns the pidfd in the result.

    Raises
    ------
    ConnectionLost
        The process ended before it was known: whatever it sent is not answered.
    OSError
        EMFILE or ENFILE: there are no descriptors for it.

    """
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        pidfd, certain = _pidfd(sock, pid)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise ConnectionLost(f"process {pid} ended before it was identified") from error
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(os.close, pidfd)
        cgroup = cgroup_of(pid, pidfd, tree)
        identity = Identity(
            pid=pid,
            uid=uid,
            gid=gid,
            groups=_groups(sock),
            label=_label(sock),
            cgroup=cgroup if certain or trust_pid else "",
        )
        cleanup.pop_all()
    return Peer(identity=identity, pidfd=pidfd)
