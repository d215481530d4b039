"""Whose grants are that the attendant gave (attendant.py), until the clients' records say so.

The attendant writes a client's number into a cell before it answers, and the cells lie in a memfd that
outlives the broker, as the snapshot does.  The next broker takes them up into the records of the snapshot
before it reads those; then the cells are empty again, and nothing else has to know of them.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Any, NamedTuple, final

from teemate.broker.restart.snapshot import DamagedSnapshotError, Name, Snapshot

__all__ = ["CELLS", "Cells"]

CELLS = 256
_CELL = struct.Struct("<6Q16s64x")  # struct attendant_cell (native/door/attendant.h)
_SIZE = CELLS * _CELL.size
_WORD = struct.Struct("<Q")
_ENCLAVE = 24
"""Where the number of the enclave is: without it a cell is empty."""


class _Given(NamedTuple):
    """What a cell tells of."""

    client: int
    request: int
    grant: int
    enclave: int
    slot: int
    generation: int
    key: bytes


@final
class Cells:
    """The memory; `fd` stays open until :meth:`close`, and is -1 where nothing is kept."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.memory = mmap.mmap(fd, _SIZE)

    @classmethod
    def create(cls, *, kept: bool) -> Cells:
        """Make empty ones, in a memfd if they are to outlive us."""
        if not kept:
            return cls(-1)
        fd = os.memfd_create("teemate-ahead", os.MFD_CLOEXEC)
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    @classmethod
    def open(cls, fd: int) -> Cells:
        """Return those that the last broker left; takes `fd` over, unless it raises.

        Raises
        ------
        DamagedSnapshotError

        """
        if os.fstat(fd).st_size != _SIZE:
            raise DamagedSnapshotError(f"what was kept of grants given ahead has not {_SIZE} bytes")
        return cls(fd)

    def take_up(self, snapshot: Snapshot) -> set[int]:
        """Write what was given into the records of the clients, and empty the cells.

        Returns the grants that only a cell told of: nobody has noted them in the audit records either.

        It may be in there already, and all of this may be done again: a broker can die at any point.

        Raises
        ------
        DamagedSnapshotError
            There is no record of a client that got something: one is written before it can.

        """
        taken = set()
        for number in range(CELLS):
            given = _Given(*_CELL.unpack_from(self.memory, number * _CELL.size))
            if given.enclave and given.client and self._record(snapshot, given):
                taken.add(given.grant)
            _WORD.pack_into(self.memory, number * _CELL.size + _ENCLAVE, 0)
        return taken

    @staticmethod
    def _record(snapshot: Snapshot, given: _Given) -> bool:
        """Whether it was in no record yet."""
        name = Name("client", given.client)
        content: dict[str, Any] | None = snapshot.contents.get(name)
        if content is None:
            raise DamagedSnapshotError(
                f"grant {given.grant} was given to client {given.client}, of which nothing is known"
            )
        try:
            if any(grant[0] == given.grant for grant in content["grants"]):
                return False
            slots = [[given.slot, given.generation, given.key, ""]]
            content["grants"].append([given.grant, given.enclave, False, False, slots])
            outcome = {"grant": given.grant, "slots": [given.slot]}
            content["outcomes"][given.request] = ["attach", outcome]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise DamagedSnapshotError(
                f"the record of client {given.client} is not as this broker writes it"
            ) from error
        snapshot.write(name, content)
        return True

    def close(self) -> None:
        """Forget them; the store keeps what it has."""
        self.memory.close()
        if self.fd >= 0:
            os.close(self.fd)
