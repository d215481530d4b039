"""Taking a changed policy into use while everything goes on.

The whole file is read and checked first: one with a mistake changes nothing.  What was fixed when the broker
started (where it listens, the default backend, which cgroup hierarchy) waits for the next start, and the
log says so.  Grants that were given stay given, also those that the new policy would not give any more: the
log names their clients, and ``teemate revoke`` takes them back.  Who monitors and is no administrator any
more is told so, and sees nothing from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import trio

from teemate import errors
from teemate._backend import choose_backend
from teemate.broker.connections.requests import Answer
from teemate.broker.policy.rules import Policy, PolicyError
from teemate.broker.restart.service_manager import notify_soon

if TYPE_CHECKING:
    from teemate.broker.service import Service

__all__ = ["Reloading", "ReloadingStatistics", "demand_backends"]

_FIXED = ("socket", "socket_mode", "socket_gid", "backend", "cgroup_hierarchy", "state_directory")
"""Settings of [broker] that are looked at once."""


def demand_backends(policy: Policy) -> None:
    """Refuse a policy with an enclave whose backend cannot be had here.

    Raises
    ------
    Unsupported

    """
    for enclave in policy.enclaves:
        if enclave.backend != "auto":
            try:
                choose_backend(enclave.backend)
            except errors.Unsupported as error:
                raise errors.Unsupported(f"enclave {enclave.name}: {error.message}", error.detail) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadingStatistics:
    """Policies that were taken and refused since the start."""

    taken: int
    refused: int


@final
class Reloading:
    """Reads the policy again, when it is asked to."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._one_at_a_time = trio.Lock()
        self._taken = 0
        self._refused = 0
        self.load: Callable[[], Policy] | None = None
        """Reads the file that the broker was started with, with what its command line said."""

    async def reload(self) -> None:
        """Take the file as it is now into use, or leave everything as it was.

        Raises
        ------
        Unsupported
            The new policy is refused; the message says why.

        """
        if self.load is None:
            raise errors.Unsupported("this broker was started without a policy file")
        async with self._one_at_a_time:
            notify_soon(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                # In a thread: the file may lie anywhere, and names of users may be asked of a directory.
                policy = await trio.to_thread.run_sync(self.load)
                await trio.to_thread.run_sync(demand_backends, policy)
            except (PolicyError, errors.Unsupported) as error:
                self._refused += 1
                self._service.log.warning("policy refused", reason=str(error), advice="the old one holds on")
                notify_soon(f"READY=1\nSTATUS=policy refused, the old one holds on: {error}")
                raise errors.Unsupported(f"the policy is refused, the old one holds on: {error}") from None
            self._adopt(policy)
            self._taken += 1
            await self._service.administration.start_boot_enclaves()
            notify_soon("READY=1")

    async def reload_for_client(self) -> Answer:
        """See :meth:`reload`."""
        await self.reload()
        return Answer({})

    def _adopt(self, policy: Policy) -> None:
        service = self._service
        old = service.policy
        service.attendant.start_anew()
        waiting = [name for name in _FIXED if getattr(policy.broker, name) != getattr(old.broker, name)]
        fixed = {name: getattr(old.broker, name) for name in _FIXED}
        service.policy = replace(policy, broker=replace(policy.broker, **fixed))
        service.ledger.adopt(policy.limits)
        for enclave in service.enclaves.values():
            found = policy.entry_for(enclave.policy, requested=enclave.requested)
            if found is None and not enclave.requested:
                self.warn_of_missing(enclave.name)
            enclave.policy = found or enclave.policy
        service.administration.building.adopt(policy)
        service.lifecycle.adopt(policy)
        service.monitoring.adopt(policy)
        service.state.write_enclaves()
        service.log.info("policy taken", policy=policy.source, enclaves=len(policy.enclaves))
        if policy.metrics != old.metrics:
            waiting.append("[metrics]")
        if waiting:
            service.log.warning(
                "settings wait for a restart",
                settings=[{"socket_gid": "socket_group"}.get(name, name) for name in waiting],
            )
        self._warn_of_grants()

    def warn_of_missing(self, name: str) -> None:
        """Say that an enclave outlives its entry."""
        self._service.log.warning(
            "enclave kept", enclave=name,
            reason="the policy has no entry for it any more: its old one goes on until it is destroyed",
        )  # fmt: skip

    def _warn_of_grants(self) -> None:
        """Say who holds what would not be given any more."""
        service = self._service
        clients = {
            grant.client.number
            for grant in service.grants.values()
            if service.missing_rule(grant.client, grant.enclave) is not None
        }
        if clients:
            service.log.warning(
                "grants outlive their rule", clients=sorted(clients),
                advice="`teemate revoke --client NUMBER` takes back what the policy would not give any more",
            )  # fmt: skip

    def statistics(self) -> ReloadingStatistics:
        """How often it was asked."""
        return ReloadingStatistics(taken=self._taken, refused=self._refused)
