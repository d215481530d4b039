"""Building an enclave again when the one that there is cannot be used any more.

An enclave is replaced by its *next generation*, built from the same image, when its memory is gone, when
no warden can be had for it, or when all of its slots are in quarantine.  Nothing is carried over:
what was in the old one is lost, or stays with who still holds it.  The old one is *retired*: it
is not attached to any more, and taken down when nobody holds anything of it.  Whose clients have descriptors
of its files (``io = "client"``) is revoked before that, as the files are the new one's.

An image that breaks its enclaves must not keep the host busy for ever: the first rebuild comes at
once, each further one after a pause twice as long, and after `rebuild_limit` of them within `rebuild_window`
seconds there are no more, which the log says with the settings.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import trio

from teemate import errors
from teemate.broker.enclaves.enclave import Enclave, EnclaveState
from teemate.broker.wardens.warden import WardenError

if TYPE_CHECKING:
    from teemate.broker.service import Service

__all__ = ["GenerationStatistics", "Generations"]

_LONGEST_PAUSE = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStatistics:
    """How often enclaves were built again, how often that failed or was given up; and what is left."""

    rebuilt: int
    failed: int
    given_up: int
    pending: int
    retired: int


@final
class Generations:
    """Replaces enclaves; the operations of clients see only that a name has a new enclave."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._pending: dict[Enclave, trio.Event] = {}
        self._builds: dict[str, deque[float]] = {}
        self.retired: set[Enclave] = set()
        """Enclaves without a name that somebody still holds something of."""
        self._rebuilt = 0
        self._failed = 0
        self._given_up = 0

    def pending(self, enclave: Enclave) -> trio.Event | None:
        """Return what is set when its next generation is there or was given up; None when none is due."""
        return self._pending.get(enclave)

    @staticmethod
    def late(enclave: Enclave, waited: float) -> errors.EnclaveLost:
        """Return the error for who has waited so many seconds for its next generation."""
        return errors.EnclaveLost(
            f"enclave {enclave.name!r} is {enclave.state.value}: {enclave.reason}; its next generation was"
            f" not there within {waited:g} s, which [[enclave]] wait bounds: attach again later"
        )

    def begin(self, enclave: Enclave) -> trio.Event:
        """Have attaches wait while an upgrade builds the next generation; :meth:`finish` ends that."""
        self._pending[enclave] = done = trio.Event()
        return done

    def finish(self, enclave: Enclave, done: trio.Event) -> None:
        """The upgrade is over: those that wait attach to what there is."""
        del self._pending[enclave]
        done.set()

    def replace(self, enclave: Enclave) -> None:
        """Have the next generation built; the enclave's `reason` says why it has to be."""
        if not self._wanted(enclave) or enclave in self._pending:
            return
        self._pending[enclave] = trio.Event()
        self._service.reclaimer.spawn(self._replace, enclave)

    async def _replace(self, enclave: Enclave) -> None:
        try:
            while self._allowed(enclave):
                if await self._build_next(enclave):
                    break
        finally:
            self._pending.pop(enclave).set()

    def _allowed(self, enclave: Enclave) -> bool:
        """Count one more build, unless the policy allows none; logs why not."""
        policy = enclave.policy
        builds = self._builds.setdefault(enclave.name, deque())
        now = trio.current_time()
        while builds and builds[0] <= now - policy.rebuild_window:
            builds.popleft()
        if enclave.source is not None and len(builds) < policy.rebuild_limit:
            builds.append(now)
            return True
        why = (
            f"{len(builds)} times within {policy.rebuild_window:g} s is what [[enclave]] rebuild_limit and"
            " rebuild_window allow"
            if enclave.source is not None
            else "its image was not kept"
        )
        enclave.reason = f"{enclave.reason}; not built again: {why}"
        self._given_up += 1
        self._service.log.warning(
            "enclave not rebuilt", enclave=enclave.name, generation=enclave.generation, reason=why,
            limit=policy.rebuild_limit, window=policy.rebuild_window,
        )  # fmt: skip
        return False

    async def _build_next(self, enclave: Enclave) -> bool:
        """Build the next generation after its pause; returns whether there is nothing left to do."""
        service, policy = self._service, enclave.policy
        tries = len(self._builds[enclave.name])
        if tries > 1:
            with trio.move_on_after(min(policy.rebuild_pause * 2 ** (tries - 2), _LONGEST_PAUSE)):
                await enclave.destroyed.wait()
        if not self._wanted(enclave):
            return True
        source = enclave.source
        assert source is not None  # _allowed() has looked, and an enclave that is wanted was not taken down
        try:
            built = await service.administration.build(
                policy, enclave.backend, source, None, generation=enclave.generation + 1
            )
        except (OSError, errors.Error, WardenError) as error:
            self._failed += 1
            service.log.warning(
                "next generation not built", enclave=enclave.name, generation=enclave.generation + 1,
                image=source.origin, reason=str(error),
            )  # fmt: skip
            return not self._wanted(enclave)
        if policy.io == "client":
            # Who has descriptors of the old one's files could go on writing them beside the new one.
            grants = [service.grants[number] for number in enclave.grants]
            await service.revocation.revoke_all(grants, None, "the broker", "its enclave was built anew")
        if not self._wanted(enclave):
            await service.administration.take_down(built)
            return True
        self._rebuilt += 1
        self.succeed(enclave, built)
        return True

    def _wanted(self, enclave: Enclave) -> bool:
        """Whether it was not destroyed meanwhile."""
        return self._service.enclaves.get(enclave.name) is enclave and not enclave.ending

    def succeed(self, old: Enclave, new: Enclave) -> None:
        """Put `new` in the place of `old`, with what keeps the old one's account and image."""
        if new.charge is None:
            new.charge, old.charge = old.charge, None
        if new.payer is None:
            new.payer, new.maker, new.requested = old.payer, old.maker, old.requested
        new.drained = old.drained
        if new.retired:  # it has everything now: written down before the old one is given up
            new.retired = False
            new.on_change(new)
            self._service.state.write_enclaves()
        if new.source is None:
            new.source, old.source = old.source, None
        self._service.administration.open(new, instead_of=old)
        self._service.log.info(
            "next generation", enclave=new.name, generation=new.generation, reason=old.reason,
            mrenclave=new.built.mrenclave.hex(),
        )  # fmt: skip
        if old.state is not EnclaveState.LOST:  # who holds a lost one knows already
            self._service.tell_holders(old, "draining")
        self.retire(old)

    def retire(self, old: Enclave) -> None:
        """Take an enclave down when nobody holds anything of it; its name has a newer generation."""
        old.on_unready()
        old.retired = True
        old.on_change(old)
        self.retired.add(old)
        if old.warden is not None:
            self._service.reclaimer.spawn(old.warden.end_storage)
        self._service.reclaimer.spawn(self._retire, old)

    async def _retire(self, enclave: Enclave) -> None:
        """Take it down when nobody holds anything of it; of a lost one only the address is waited for."""
        if enclave.state is EnclaveState.LOST and enclave.warden is not None:
            await enclave.warden.close()
        await enclave.wait_unused()
        self.retired.discard(enclave)
        await self._service.administration.take_down(enclave)

    def statistics(self) -> GenerationStatistics:
        """What was built again so far."""
        return GenerationStatistics(
            rebuilt=self._rebuilt,
            failed=self._failed,
            given_up=self._given_up,
            pending=len(self._pending),
            retired=len(self.retired),
        )
