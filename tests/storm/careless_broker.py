"""A broker that forgets slots whose holders have died: what the storm is there to find."""

from __future__ import annotations

import sys

from teemate.broker.main import main
from teemate.broker.slots.reclaim import Reclaimer

_recycle = Reclaimer._recycle


async def _forget_the_dead(self: Reclaimer, grant: object, index: int, dead: bool) -> None:
    if not dead:
        await _recycle(self, grant, index, dead)  # type: ignore[arg-type]


if __name__ == "__main__":
    Reclaimer._recycle = _forget_the_dead  # type: ignore[method-assign, assignment]
    sys.exit(main())
