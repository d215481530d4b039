"""The operation `destroy`: an enclave ends with everything that is in it, whatever happens to the broker.

That it is to end is written down before anything is done, so the next broker goes on with it.  The answer
comes when the broker has nothing of the enclave any more, and neither has the descriptor store: an
operator may count on room in EPC and store from then on (holders that did not leave keep their pages).
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, final

import trio

from teemate import errors
from teemate.broker.connections.requests import Answer, Destroy
from teemate.broker.enclaves.enclave import Enclave, EnclaveState

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.enclaves.draining import StoredEnclave
    from teemate.broker.service import Service

__all__ = ["Destruction"]


@final
class Destruction:
    """The operation `destroy`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._under_way: dict[int, Enclave] = {}
        """By serial, those that are being taken down, which have no name any more or will have none."""

    def destroy(self, client: Client, args: Destroy) -> Awaitable[Answer]:
        """End an enclave: with `force` what is attached is revoked first, without it that is an error."""
        service = self._service
        enclave = service.enclaves.get(args.enclave)
        stored = service.lifecycle.stored(args.enclave)
        intent = client.intents.get(client.asking)
        if intent is not None:
            serial = intent["enclave"]
            assert isinstance(serial, int)
            begun = self._under_way.get(serial, enclave)
            if begun is not None and begun.serial == serial:
                if begun.ending:
                    return self._destroyed(begun.destroyed, intent)
            elif stored is None or stored.serial != serial:
                return self._destroyed(service.restoration.tidied, intent)
        owner = enclave.policy.owner if enclave else stored.policy.owner if stored else None
        if owner != client.identity.uid:
            service.require_administrator(client, "destroy")
        if enclave is None and stored is not None:
            return self._forget(client, stored)
        enclave = service.enclave(args.enclave)
        if enclave.grants and not args.force:
            raise errors.Busy(
                f"{len(enclave.grants)} grants on enclave {enclave.name!r} are held: force revokes them",
                {"grants": len(enclave.grants)},
            )
        if enclave.ending:
            raise errors.Draining(f"enclave {enclave.name!r} is being destroyed already")
        return self._destroy(client, enclave)

    def _destroy(self, client: Client, enclave: Enclave) -> Awaitable[Answer]:
        """Begin at once: whoever comes next, with whatever, finds an enclave that is being destroyed."""
        service = self._service
        revoked = len(enclave.grants)
        service.state.intend(client, {"enclave": enclave.serial, "revoked": revoked})
        enclave.ending = True
        enclave.state = EnclaveState.DRAINING
        enclave.reason = "being destroyed"
        service.state.write_enclaves()  # from here on it is destroyed, whatever happens to us
        service.reclaimer.refuse(
            enclave.slots.waiting(), errors.Draining(f"enclave {enclave.name!r} is being destroyed")
        )
        return self._finish_for(client, enclave, revoked)

    async def _finish_for(self, client: Client, enclave: Enclave, revoked: int) -> Answer:
        service = self._service

        async def run() -> None:
            await self.finish(enclave, f"uid {client.identity.uid}")
            service.audit.changed(
                client.identity, client=client.number, operation="destroy", enclave=enclave.name
            )

        await service.revocation.finish_in_background(run)
        return Answer({"revoked": revoked})

    async def finish(self, enclave: Enclave, by: str = "the broker") -> None:
        """Revoke what is held of an enclave that is to end, and take it down."""
        service = self._service
        self._under_way[enclave.serial] = enclave
        await service.revocation.revoke_all(
            [service.grants[number] for number in enclave.grants],
            None,
            by,
            f"enclave {enclave.name} is destroyed",
        )
        service.tell_lost(enclave)  # who has not given it up by now only keeps the memory
        service.administration.close_name(enclave)
        await service.administration.take_down(enclave)
        del self._under_way[enclave.serial]
        enclave.destroyed.set()

    async def _destroyed(self, done: trio.Event, intent: dict[str, object]) -> Answer:
        """Answer what the last broker had begun when it died, when nothing of it is left to do."""
        await done.wait()
        return Answer({"revoked": intent["revoked"]})

    async def _forget(self, client: Client, stored: StoredEnclave) -> Answer:
        """Give up an enclave that was taken down to empty the host, with the image that was kept for it."""
        service, name = self._service, stored.policy.name
        service.state.intend(client, {"enclave": stored.serial, "revoked": 0})

        async def run() -> None:
            if not await service.lifecycle.forget(stored):
                raise errors.Busy(f"enclave {name!r} is being built again: try again")
            service.audit.changed(client.identity, client=client.number, operation="destroy", enclave=name)

        await service.revocation.finish_in_background(run)
        return Answer({"revoked": 0})
