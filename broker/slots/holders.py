"""Who holds which slot, who waits for some, and who was denied what: for the operator's questions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, final

from teemate.broker.connections.requests import Answer, Denials, Holders, Result
from teemate.broker.enclaves.control import ControlOp
from teemate.broker.slots.table import SlotState
from teemate.broker.wardens.warden import EnclaveGoneError, WardenError

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.enclaves.enclave import Enclave
    from teemate.broker.service import Service
    from teemate.broker.slots.grants import Grant

__all__ = ["Looking"]

_BYTES = 40 * 1024
"""About so much of a reply is filled; who wants more asks for what comes after the last."""
_COUNTED_AT_ONCE = 64
_COUNT_SECONDS = 0.2
_NO_FRAME = 1 << 32
_ENTRY = 160
"""Bytes of an entry, without what differs most in length."""


def _process(client: Client) -> dict[str, object]:
    identity = client.identity
    return {
        "client": client.number,
        "name": client.name,
        "pid": identity.pid,
        "uid": identity.uid,
        "cgroup": identity.cgroup_text,
    }


def _size(client: Client | None, *texts: str) -> int:
    if client is not None:
        texts = (*texts, client.name, client.identity.cgroup_text)
    return _ENTRY + sum(len(text.encode()) for text in texts)


@final
class Looking:
    """Answers from what is there; nothing is kept for it."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def holders(self, args: Holders) -> Result:
        """List an enclave's slots from `first` on, and with the first of all the requests that wait."""
        if args.calls:
            return self._holders_with_calls(args)
        return Answer(self._holders(args))

    async def _holders_with_calls(self, args: Holders) -> Answer:
        """The same with the gate's count of each slot, which only the enclave's warden can read.

        It has other things to do, so it is asked about a few at a time, and those who look one after another
        get the counts of just now.
        """
        answer = self._holders(args)
        enclave = self._service.enclave(args.enclave)
        slots = answer["slots"]
        assert isinstance(slots, list)
        if len(slots) > _COUNTED_AT_ONCE:
            answer["next"] = slots[_COUNTED_AT_ONCE]["slot"]
            del slots[_COUNTED_AT_ONCE:]
        try:
            for entry in slots:
                entry["calls"] = await self._calls(enclave, entry["slot"])
        except EnclaveGoneError as error:
            self._service.reclaimer.lose(enclave, str(error))
        except WardenError:
            pass  # who needs the warden for its work finds out, too
        return Answer(answer)

    async def _calls(self, enclave: Enclave, index: int) -> int:
        now = time.monotonic()
        known = enclave.gate_calls.get(index)
        if known is None or now - known[0] > _COUNT_SECONDS:
            if enclave.warden is None:
                raise WardenError("there is none")
            # A frame that no slot has: refused, and the count comes with every answer about a slot.
            reply = await enclave.warden.control(ControlOp.SSA, index, argument=_NO_FRAME)
            known = enclave.gate_calls[index] = now, reply.result.calls
        return known[1]

    def _holders(self, args: Holders) -> dict[str, object]:
        service = self._service
        enclave = service.enclave(args.enclave)
        grants = self.every_grant()
        room = _BYTES
        waiting: list[dict[str, object]] = []
        now = time.monotonic()
        if args.first == 0:
            for ticket in enclave.slots.waiting():
                grant = grants.get(ticket.grant)
                waiter = service.reclaimer.waiters.get(ticket)
                if grant is None or waiter is None:
                    continue
                room -= _size(grant.client)
                if room < _BYTES // 2:
                    break
                waiting.append(
                    {**_process(grant.client), "slots": ticket.count, "waited": now - waiter.since}
                )
        slots: list[dict[str, object]] = []
        answer: dict[str, object] = {"slots": slots, "waiting": waiting}
        for index in sorted(index for index in enclave.slots.slots if index >= args.first):
            slot = enclave.slots.slots[index]
            entry: dict[str, object] = {"slot": index, "state": slot.state.shown}
            grant = grants.get(slot.grant) if slot.grant is not None else None
            if slot.reason and slot.state in (SlotState.WITHHELD, SlotState.QUARANTINED):
                entry["reason"] = slot.reason
            if slot.former is not None:
                entry["former"] = slot.former
            client = None
            if grant is not None and index in grant.charges:
                client = grant.client
                entry |= {**_process(client), "grant": grant.number}
            room -= _size(client, slot.reason)
            if room < 0 and slots:
                answer["next"] = index
                break
            slots.append(entry)
        return answer

    def every_grant(self) -> dict[int, Grant]:
        """Every grant with a slot that is not back: those held, and those given up with slots withheld."""
        service = self._service
        found = dict(service.grants)
        for client in service.clients.values():
            found.update((grant.number, grant) for grant in client.withheld)
        for left in service.reclaimer.left_behind.values():
            found.update((grant.number, grant) for grant in left)
        return found

    def denials(self, args: Denials) -> Answer:
        """List the newest denials, those that are alike counted once."""
        denials: list[dict[str, object]] = []
        room = _BYTES
        now = time.monotonic()
        for denial in reversed(self._service.audit.recent_denials.values()):
            if args.uid is not None and denial.uid != args.uid:
                continue
            room -= _size(None, denial.cgroup, denial.rule)
            if room < 0:
                break
            denials.append(
                {
                    "uid": denial.uid,
                    "pid": denial.pid,
                    "cgroup": denial.cgroup,
                    "operation": denial.operation,
                    "missing_rule": denial.rule,
                    "times": denial.count,
                    "ago": now - denial.at,
                }
            )
        return Answer({"denials": denials, "total": self._service.audit.denied_count})
