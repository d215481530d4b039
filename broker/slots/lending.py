"""Descriptors of an enclave's files for its clients, where the policy has ``io = "client"``.

Which file a client may have, and how, is the enclave's code to say: it knows whose the file is.  It *lends* a
file to the holder of a slot (``tm_file_lend`` in the SDK); the broker asks the enclave, by a control ECALL of
the warden's, and not the client.  The file is opened first and asked for afterwards: what is lent now was
lent under this name to whoever opened it, so a file that took the name meanwhile is nobody's by mistake.

What was given is not taken back by the kernel.  So a revoked client is killed before its slots are repaired
(such a policy has `revoke_kill`): nothing that it was about to write comes later.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable
from typing import TYPE_CHECKING, final

import trio

from teemate import errors
from teemate.broker.connections.requests import Answer, OpenFile
from teemate.broker.enclaves.control import Lent
from teemate.broker.enclaves.storage import Storage
from teemate.broker.slots.grants import Grant
from teemate.broker.wardens.warden import WardenError

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.service import Service

__all__ = ["Lending"]


@final
class Lending:
    """The operation `files.open`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def open_file(self, client: Client, args: OpenFile) -> Awaitable[Answer]:
        """Answer with a descriptor of the file, when the enclave lends it to the holder of the slot."""
        grant = self._service.granting.grant_of(client, args.grant)
        self._require_held(grant, args.slot)
        warden = grant.enclave.warden
        storage = warden.storage if warden is not None else None
        if storage is None or not storage.lends:
            raise errors.Unsupported(
                f"clients of enclave {grant.enclave.name!r} get no descriptors of its files:"
                ' its policy has not [[enclave]] io = "client"',
                {"setting": "[[enclave]] io"},
            )
        return self._open(grant, args, storage)

    async def _open(self, grant: Grant, args: OpenFile, storage: Storage) -> Answer:
        generation = grant.enclave.slot_keys[args.slot].generation
        try:
            fd = await trio.to_thread.run_sync(lambda: storage.open_file(args.name, writable=args.writable))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise errors.LimitReached("the broker has no descriptor to spare for the file") from error
            raise self._not_lent(args) from error
        try:
            await self._require_lent(grant, args, generation)
        except BaseException:
            os.close(fd)
            raise
        return Answer({}, (fd,), after=lambda: os.close(fd), undo=lambda: os.close(fd))

    async def _require_lent(self, grant: Grant, args: OpenFile, generation: int) -> None:
        enclave, lent = grant.enclave, Lent.NOT
        if enclave.warden is not None:
            try:
                lent = await enclave.warden.lent(args.slot, args.name)
            except WardenError as error:
                raise errors.Busy(f"enclave {enclave.name!r} could not be asked: {error}") from error
        # While that was asked, the slot may have got another holder, or this client lost it.
        self._require_held(grant, args.slot)
        if enclave.slot_keys[args.slot].generation != generation:
            raise self._not_lent(args)
        if lent < (Lent.WRITE if args.writable else Lent.READ):
            raise self._not_lent(args)

    @staticmethod
    def _require_held(grant: Grant, slot: int) -> None:
        if grant.revoked or grant.over or slot not in grant.charges:
            raise errors.NotFound(f"grant {grant.number} does not hold slot {slot}")

    @staticmethod
    def _not_lent(args: OpenFile) -> errors.Error:
        how = "to write" if args.writable else "to read"
        return errors.NotFound(f"the enclave lends slot {args.slot} no file {args.name!r} {how}")
