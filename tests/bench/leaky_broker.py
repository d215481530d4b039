"""A broker that keeps something of every client that leaves: what `churn` is there to find."""

from __future__ import annotations

import os
import sys

from teemate.broker.main import main
from teemate.broker.service import Service
from teemate.broker.slots.reclaim import Reclaimer

_client_left = Service.client_left
_recycle = Reclaimer._recycle
_kept: list[bytes] = []
_forgotten: set[int] = set()
"""The slot that nobody gets again: the first that comes back, whichever that is."""


def _leave_something(self: Service, client: object, why: str) -> None:
    _kept.append(os.urandom(8192))
    os.dup(client.pidfd)  # type: ignore[attr-defined]
    _client_left(self, client, why)  # type: ignore[arg-type]


async def _forget_one(self: Reclaimer, grant: object, index: int, dead: bool) -> None:
    if not _forgotten:
        _forgotten.add(index)
    if index not in _forgotten:
        await _recycle(self, grant, index, dead)  # type: ignore[arg-type]


if __name__ == "__main__":
    Service.client_left = _leave_something  # type: ignore[method-assign, assignment]
    Reclaimer._recycle = _forget_one  # type: ignore[method-assign, assignment]
    sys.exit(main())
