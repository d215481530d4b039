"""Where descriptors outlive the broker: the file descriptor store of systemd, or of our keeper.

The service manager keeps what it is sent and passes it to the next broker (LISTEN_FDS), however
this one ended.  Whether there is a store says ``FDSTORE`` in the environment: how many descriptors
it takes.  The keeper sets it, and systemd from version 254 on; for older ones the unit does, beside
``FileDescriptorStoreMax=``.

sd_notify(3): FDSTORE, FDNAME, FDPOLL, FDSTOREREMOVE and BARRIER.  FDPOLL=0, because systemd throws
away what polls as an error or a hang-up, and that is nothing that it could know of an enclave.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterable, Mapping
from typing import final

import trio

from teemate import errors
from teemate.broker.restart.service_manager import notify_address

__all__ = ["BARRIER_PATIENCE", "DescriptorStore"]

BARRIER_PATIENCE = 30.0
"""Seconds that the service manager may take to confirm; it answers in its own order."""


@final
class DescriptorStore:
    """Puts descriptors into the service manager's store and takes them out again, by name.

    The descriptors stay the caller's: the store has duplicates.  Nothing is sure to be in the store,
    or out of it, before :meth:`confirm` has returned.
    """

    def __init__(self, address: str, capacity: int, names: Iterable[str] = ()) -> None:
        self._address = address
        self.capacity = capacity
        self._names = set(names)

    @classmethod
    def of_environment(
        cls, names: Iterable[str] = (), environment: Mapping[str, str] = os.environ
    ) -> DescriptorStore | None:
        """Return the store of our service manager, which has `names` in it already; None without one."""
        address, capacity = notify_address(), environment.get("FDSTORE", "")
        if not address or not capacity.isdecimal() or not int(capacity):
            return None
        return cls(address, int(capacity), names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def names(self) -> list[str]:
        """What it keeps."""
        return sorted(self._names)

    def require_room(self, count: int) -> None:
        """Refuse what the service manager would throw away without a word.

        Raises
        ------
        LimitReached
            `count` more descriptors are more than it takes.

        """
        if len(self._names) + count > self.capacity:
            raise errors.LimitReached(
                f"the service manager keeps {self.capacity} descriptors for the broker and has"
                f" {len(self._names)}: FileDescriptorStoreMax= in its unit sets how many it takes",
                {
                    "limit": "FileDescriptorStoreMax",
                    "maximum": self.capacity,
                    "used": len(self._names),
                    "setting": "FileDescriptorStoreMax= and FDSTORE= in the broker's unit",
                },
            )

    async def put(self, name: str, fd: int) -> None:
        """Have `fd` kept under `name`, which is no other's: letters, digits and dashes."""
        await self._send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", (fd,))
        self._names.add(name)

    async def remove(self, name: str) -> None:
        """Have the store close what it keeps under `name`."""
        await self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")
        self._names.discard(name)

    async def confirm(self) -> None:
        """Return when everything before has been done: the manager closes its end of a pipe then.

        Raises
        ------
        Busy
            It did not say so in time.

        """
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                await self._send("BARRIER=1", (write_end,))
            finally:
                os.close(write_end)
            with trio.move_on_after(BARRIER_PATIENCE) as scope:
                await trio.lowlevel.wait_readable(read_end)
        finally:
            os.close(read_end)
        if scope.cancelled_caught:
            raise errors.Busy(
                f"the service manager did not confirm within {BARRIER_PATIENCE:g} s that it keeps the"
                " enclave's descriptors: look at its log, and try again"
            )

    async def _send(self, state: str, fds: tuple[int, ...] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            await sock.connect(self._address)
            await sock.sendmsg([state.encode()], rights)
