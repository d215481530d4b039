"""What the broker holds together: policy, clients, enclaves, grants."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio
from structlog.typing import FilteringBoundLogger

from teemate import errors
from teemate.broker.audit import Audit
from teemate.broker.cgroups import find_tree
from teemate.broker.limits import Ledger
from teemate.broker.policy import Policy
from teemate.broker.processes import Processes

if TYPE_CHECKING:
    from teemate.broker.connection import Client


class Service:
    """The broker's state; everything runs in trio's one thread."""

    def __init__(self, policy: Policy, log: FilteringBoundLogger) -> None:
        self.policy = policy
        self.log = log
        self.audit = Audit(log)
        self.ledger = Ledger(policy.limits)
        self.cgroup_tree = find_tree(policy.broker.cgroup_hierarchy)
        self.processes = Processes()
        self.clients: dict[int, Client] = {}
        self.backend = policy.broker.backend
        self._last_client = 0

    def next_client(self) -> int:
        """Return the number of a new connection."""
        self._last_client += 1
        return self._last_client

    def release_pidfd(self, pidfd: int) -> None:
        """The connection is over: close its pidfd."""
        self.processes.forget(pidfd)
        os.close(pidfd)

    def client_left(self, client: Client, why: str) -> None:
        """The connection is over: end its grants."""

    def require_administrator(self, client: Client, operation: str) -> None:
        """Raise Denied unless the client is an administrator."""
        if not self.policy.administrators.includes(client.identity):
            self.audit.denied(
                client.identity,
                client=client.number,
                operation=operation,
                rule="[administrators] uids or gids",
            )
            raise errors.Denied(f"{operation} is for administrators: the broker's log names the missing rule")

    def list_enclaves(self, client: Client) -> list[dict[str, object]]:
        """Return what the client may see."""
        return []

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch processes, keep enclaves."""
        task_status.started()
        await self.processes.run()
