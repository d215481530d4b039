"""Whom the attendant greeted and what it gave (attendant.py), until the clients' records say so.

The attendant writes a client's number into a cell before it answers, and the cells lie in a memfd that
outlives the broker, as the snapshot does.  The next broker takes them up into the records of the snapshot
before it reads those; then the cells are empty again, and nothing else has to know of them.

What is the same of all clients that a place was kept for (their user, groups and label) is in a record of
their *guest*, which is there before the first of them comes and is of no use to the next broker.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Any, NamedTuple, final

from teemate.broker._door import lib
from teemate.broker.restart.records import GUEST, greeted_content
from teemate.broker.restart.snapshot import DamagedSnapshotError, Name, Snapshot

__all__ = ["CELLS", "PLACES", "Cells"]

CELLS = 256
PLACES = 64
_CELL = struct.Struct("<6Q16s64x")  # struct attendant_cell (native/door/attendant.h)
_PLACE = struct.Struct("<3Q2I32s32s64sQ24x")  # struct attendant_greeted
_PLACES_AT = CELLS * _CELL.size
_SIZE = _PLACES_AT + PLACES * _PLACE.size
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


class _Greeted(NamedTuple):
    """What a place tells of."""

    client: int
    guest: int
    started: int
    pid: int
    flags: int
    token: bytes
    session: bytes
    name: bytes
    name_size: int


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
        size = os.fstat(fd).st_size
        if size == _PLACES_AT:  # of a broker that greeted nobody ahead
            os.ftruncate(fd, _SIZE)
        elif size != _SIZE:
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
        self._take_up_greeted(snapshot)
        taken = set()
        for number in range(CELLS):
            given = _Given(*_CELL.unpack_from(self.memory, number * _CELL.size))
            if given.enclave and given.client and self._record(snapshot, given):
                taken.add(given.grant)
            _WORD.pack_into(self.memory, number * _CELL.size + _ENCLAVE, 0)
        return taken

    def _take_up_greeted(self, snapshot: Snapshot) -> None:
        for number in range(PLACES):
            offset = _PLACES_AT + number * _PLACE.size
            greeted = _Greeted(*_PLACE.unpack_from(self.memory, offset))
            name = Name("client", greeted.client)
            if greeted.client and name not in snapshot.contents:
                guest = snapshot.contents.get(Name(GUEST, greeted.guest))
                if guest is None:
                    raise DamagedSnapshotError(
                        f"client {greeted.client} was greeted, of whose user nothing is known"
                    )
                content = greeted_content(
                    guest, pid=greeted.pid, started=greeted.started,
                    name=greeted.name[: greeted.name_size].decode("ascii", "replace"),
                    token=greeted.token if greeted.flags & lib.ATTENDANT_TOKEN else None,
                    session=greeted.session if greeted.flags & lib.ATTENDANT_SESSION else None,
                )  # fmt: skip
                snapshot.write(name, content)
                snapshot.contents[name] = content
            _WORD.pack_into(self.memory, offset, 0)
        for name in [name for name in snapshot.contents if name.kind == GUEST]:
            snapshot.erase(name)
            del snapshot.contents[name]

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
