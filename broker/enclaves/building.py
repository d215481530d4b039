"""Names whose enclave is being built: who attaches to one waits until it is there, or could not be built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import trio

from teemate import errors

if TYPE_CHECKING:
    from teemate.broker.connections.cgroups import CgroupTree
    from teemate.broker.connections.identity import Identity
    from teemate.broker.policy.rules import EnclavePolicy, Missing, Policy

__all__ = ["Build", "Builds"]


@final
@dataclass(slots=True, eq=False)
class Build:
    """An enclave that is on its way."""

    policy: EnclavePolicy
    backend: str
    requested: bool
    """Whether a client has it made, and not the policy's file."""
    over: trio.Event = field(default_factory=trio.Event)
    """Set when it is there or could not be built."""

    def missing_rule(self, identity: Identity, tree: CgroupTree) -> Missing | None:
        """As :meth:`EnclavePolicy.missing_for_attach`: who may not have it is not let wait for it."""
        return self.policy.missing_for_attach(identity, tree, backend=self.backend, debug=self.policy.debug)

    def late(self, waited: float) -> errors.Busy:
        """Return the error for who has waited so many seconds for it."""
        maximum = self.policy.wait
        return errors.Busy(
            f"enclave {self.policy.name!r} is being built and was not there within {waited:g} s: try again,"
            f" or wait longer ([[enclave]] wait bounds the waiting, {maximum:g} s)",
            {"limit": "wait", "maximum": maximum, "setting": "[[enclave]] wait", "waited": waited},
        )


@final
class Builds:
    """What is being built, or will be before the broker is ready; nobody else takes these names."""

    def __init__(self) -> None:
        self._builds: dict[str, Build] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._builds

    def __len__(self) -> int:
        return len(self._builds)

    def get(self, name: str) -> Build | None:
        """Return what is under way for that name."""
        return self._builds.get(name)

    def begin(self, policy: EnclavePolicy, backend: str, *, requested: bool) -> None:
        """From now on its name is taken; :meth:`end` ends that."""
        assert policy.name not in self._builds
        self._builds[policy.name] = Build(policy, backend, requested)

    def end(self, name: str) -> None:
        """It is built or not: who waits for it looks again, and others may use the name."""
        self._builds.pop(name).over.set()

    def adopt(self, policy: Policy) -> None:
        """Who may wait is what the changed policy says."""
        for build in self._builds.values():
            build.policy = policy.entry_for(build.policy, requested=build.requested) or build.policy

    async def wait_all(self) -> None:
        """Return when nothing is being built."""
        while self._builds:
            await next(iter(self._builds.values())).over.wait()
