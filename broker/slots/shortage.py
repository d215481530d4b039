"""Who holds what somebody is refused, so that the error says whom to ask.

Everybody hears how many slots are in use and for what reason the rest is not free.  *Who* has them is told to
administrators and to the enclave's owner; everybody else hears of its own user's processes, and of the others
how many they have together.

Looking through the slots takes longer than refusing: the refused user pays for it in tokens (limits.py), so
that asking in vain again and again slows nobody else down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from teemate._containers import container_name
from teemate.broker.slots.table import SlotState

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.enclaves.enclave import Enclave
    from teemate.broker.service import Service
    from teemate.broker.slots.grants import Grant

__all__ = ["Shortage", "grants_text", "shortage"]

_LOOKED_AT_PER_TOKEN = 64
_USERS = 4
_GROUPS = 3


def _where(client: Client) -> str:
    """What people know a process by: its container or unit, or its name and number."""
    group = container_name(client.identity.cgroup_text)
    return group or f"pid {client.identity.pid}"


def _groups_text(counts: Counter[str]) -> str:
    """Name the largest of them: ``web-3 8, batch.service 4, 2 more``."""
    told = [f"{where} {count}" for where, count in counts.most_common(_GROUPS)]
    if len(counts) > _GROUPS:
        told.append(f"{len(counts) - _GROUPS} more")
    return ", ".join(told)


class Shortage(NamedTuple):
    """What is to be said of an enclave's slots to one client; `text` for people, `detail` for programs."""

    text: str
    detail: dict[str, object]


def shortage(service: Service, client: Client, enclave: Enclave) -> Shortage:
    """Look who has the slots of `enclave`."""
    slots = enclave.slots.slots
    client.account.bucket.take(len(slots) / _LOOKED_AT_PER_TOKEN)
    uid = client.identity.uid
    sees_all = uid == enclave.policy.owner or service.policy.administrators.includes(client.identity)
    counts = enclave.slots.statistics()
    by_user: dict[int, Counter[str]] = {}
    hidden = 0
    for slot in slots.values():
        if slot.state is not SlotState.ASSIGNED or slot.uid is None:
            continue
        if slot.uid != uid and not sees_all:
            hidden += 1
            continue
        grant = service.grants.get(slot.grant) if slot.grant is not None else None
        by_user.setdefault(slot.uid, Counter())[_where(grant.client) if grant is not None else "?"] += 1
    text = _head(enclave.name, counts.total, counts.assigned)
    parts = _users(by_user, hidden)
    for count, what in (
        (counts.withheld, "withheld from processes that may still use them"),
        (counts.arming, "on their way back"),
        (counts.quarantined, "in quarantine"),
    ):
        if count:
            parts.append(f"{count} {what}")
    if parts:
        text += ": " + ", ".join(parts)
    detail: dict[str, object] = {
        "limit": "slots of the image",
        "maximum": enclave.slots.usable,
        "used": counts.assigned,
        "withheld": counts.withheld,
        "quarantined": counts.quarantined,
    }
    if by_user:
        detail["holders"] = [
            {"uid": user, "slots": held.total(), "where": dict(held.most_common(_GROUPS))}
            for user, held in sorted(by_user.items(), key=lambda item: -item[1].total())[:_USERS]
        ]
    return Shortage(text, detail)


def _head(name: str, total: int, used: int) -> str:
    if used == total:
        return f"{name}: all {total} slots in use"
    return f"{name}: {used} of {total} slots in use"


def _users(by_user: dict[int, Counter[str]], hidden: int) -> list[str]:
    ranked = sorted(by_user.items(), key=lambda item: -item[1].total())
    parts = [f"{held.total()} by uid {user} ({_groups_text(held)})" for user, held in ranked[:_USERS]]
    if len(ranked) > _USERS:
        rest = sum(held.total() for _, held in ranked[_USERS:])
        parts.append(f"{rest} by {len(ranked) - _USERS} other users")
    if hidden:
        parts.append(f"{hidden} by other users")
    return parts


def grants_text(grants: Iterable[Grant]) -> str:
    """Say where grants of one user are, for that user."""
    return _groups_text(Counter(_where(grant.client) for grant in grants))
