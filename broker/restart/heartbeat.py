"""Word to the service manager that the loop goes round, and what there is to say of it.

sd_notify(3): WATCHDOG=1 is sent by a task of the same loop that answers clients, so a loop that is stuck is
a broker that falls silent, and the manager replaces it.  Enclaves and calls inside go on meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import trio

from teemate.broker.restart.service_manager import notify_soon

if TYPE_CHECKING:
    from teemate.broker.service import Service

__all__ = ["beat", "status_text", "watchdog_seconds"]

_STATUS_SECONDS = 10.0


def watchdog_seconds(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return after how many seconds of silence we are replaced; None when nobody listens for it.

    WATCHDOG_PID says whom it is for: a keeper's worker is not who systemd started.
    """
    if environment.get("WATCHDOG_PID") not in (None, str(os.getpid())):
        return None
    microseconds = environment.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdecimal() and int(microseconds) else None


def status_text(service: Service) -> str:
    """One line for ``systemctl status``."""
    slots = [enclave.slots.statistics() for enclave in service.enclaves.values()]
    total, used = sum(count.total for count in slots), sum(count.assigned for count in slots)
    enclaves, clients = _many(len(service.enclaves), "enclave"), _many(len(service.clients), "client")
    text = f"{enclaves} ({service.backend}), {clients}, {used} of {_many(total, 'slot')} in use"
    not_ready = sum(enclave.state.value != "ready" for enclave in service.enclaves.values())
    return f"{text}, {_many(not_ready, 'enclave')} not ready" if not_ready else text


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


async def beat(service: Service) -> None:
    """Beat until cancelled: three times in the manager's patience, since a full socket drops a beat."""
    patience = watchdog_seconds()
    pause = min(_STATUS_SECONDS, patience / 3) if patience else _STATUS_SECONDS
    told = ""
    while True:
        text = status_text(service)
        words = ["WATCHDOG=1"] if patience else []
        if text != told:
            words.append(f"STATUS={text}")
        if words and notify_soon("\n".join(words)):
            told = text
        await trio.sleep(pause)
