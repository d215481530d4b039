"""Whose the slots are that a broker has charged for: a charge that nobody has is never given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teemate.broker.policy.limits import Resource

if TYPE_CHECKING:
    from teemate.broker.service import Service
    from teemate.broker.slots.grants import Grant

__all__ = ["charged_slots", "owned_slots"]


def charged_slots(service: Service) -> int:
    """Slots that the accounts of all users say are held or waited for."""
    return sum(account.used[Resource.SLOTS] for account in service.ledger._accounts.values())


def owned_slots(service: Service) -> int:
    """Slots of grants that are held, of those given up whose slots come back at an end, and of who waits."""
    grants: dict[int, Grant] = dict(service.grants)
    for client in service.clients.values():
        grants.update((grant.number, grant) for grant in client.withheld)
    for left in service.reclaimer.left_behind.values():
        grants.update((grant.number, grant) for grant in left)
    waiting = sum(len(waiter.charges) for waiter in service.reclaimer.waiters.values())
    return waiting + sum(len(grant.charges) for grant in grants.values())
