"""Clients across a restart of the broker: suspended until they resume, or for `resume_grace` at most.

`hello` gives each client a resume token.  After a restart the clients that the last broker knew are
*suspended*: their grants are held for them, their calls inside go on, and the one of them that
presents its token from the same process (pid, start time, uid) goes on as if nothing had been.  Each resume
gives a new token; the one that was presented stays valid until the first request, because the reply that
brings the new one may have died with the broker.  For the same reason the first hello brings a token of
the client's own, `session`: what came along with that hello may have been granted already, and the
client has nothing else to show.  Only hashes of tokens are kept.

While a broker lives, the end of a connection ends what its client holds, as ever: there is nothing to
resume then.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, final

import trio

from teemate.broker.connections.identity import start_time
from teemate.broker.connections.requests import Hello
from teemate.broker.enclaves.enclave import EnclaveState

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.service import Service

__all__ = ["Resumption", "ResumptionStatistics"]

_TOKEN_SIZE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumptionStatistics:
    """Clients that wait to be resumed, that were, that ended meanwhile, and whose time ran out.

    `grants`: of those that were.
    """

    suspended: int
    resumed: int
    grants: int
    ended: int
    expired: int


@final
class Resumption:
    """Who is suspended, and the part of `hello` that is about it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._suspended: dict[int, Client] = {}
        self._by_token: dict[bytes, Client] = {}
        self._resumed = 0
        self._grants = 0
        self._ended = 0
        self._expired = 0

    def suspend(self, client: Client) -> None:
        """Hold what the client has until it resumes; its process is watched already."""
        self._suspended[client.number] = client
        for token in client.tokens:
            self._by_token[token] = client

    def greet(self, client: Client, args: Hello) -> tuple[dict[str, object], Callable[[], None] | None]:
        """Return what `hello` is answered besides, and what is to be sent behind it."""
        service = self._service
        ok: dict[str, object] = {}
        after: Callable[[], None] | None = None
        known: bytes | None = None
        if args.resume is not None:
            resumed = self._resume(client, args.resume)
            if resumed is not None:
                client, known = resumed, sha256(args.resume).digest()
                client.first_token = None
                ok["resumed"] = sorted(client.grants)
                after = _Again(service, client)
        elif args.session is not None:
            client.first_token = sha256(args.session).digest()
        if service.state.kept:
            token = secrets.token_bytes(_TOKEN_SIZE)
            client.tokens = (sha256(token).digest(), *([known] if known is not None else []))
            ok |= {"token": token, **self.kept_ok()}
            if after is not None:
                service.state.write_client(client)
        return ok, after

    def kept_ok(self) -> dict[str, object]:
        """What `hello` is answered behind its token; nothing if nobody can resume."""
        service = self._service
        return {"resume_grace": service.policy.broker.resume_grace} if service.state.kept else {}

    def _resume(self, newcomer: Client, untrusted_token: bytes) -> Client | None:
        """Give the connection of `newcomer` to the suspended client that the token is of."""
        service = self._service
        client = self._by_token.get(sha256(untrusted_token).digest())
        if client is None:
            return None
        was, now = client.identity, newcomer.identity
        if (was.pid, was.uid) != (now.pid, now.uid) or client.started != start_time(now.pid, newcomer.pidfd):
            service.log.warning(
                "client not resumed", client=client.number, pid=now.pid, uid=now.uid,
                reason="its token came from another process",
            )  # fmt: skip
            return None
        self._forget(client)
        self._resumed += 1
        self._grants += len(client.grants)
        connection = newcomer.connection
        assert connection is not None  # it has just brought the token
        del service.clients[newcomer.number]
        os.close(newcomer.pidfd)
        newcomer.connection = None
        client.name, client.counts = newcomer.name, newcomer.counts
        if not was.cgroup:  # it was not known yet when the last broker died (records.py)
            client.identity = replace(was, cgroup=now.cgroup)
        client.connection, connection.client = connection, client
        client.connected_at = trio.current_time()
        service.log.info("client resumed", client=client.number, pid=now.pid, grants=sorted(client.grants))
        return client

    def first_request(self, client: Client) -> None:
        """The client has the token of its last `hello`: the one before is not valid any more."""
        if len(client.tokens) > 1:
            client.tokens = client.tokens[:1]
            self._service.state.write_client(client)

    def _forget(self, client: Client) -> None:
        del self._suspended[client.number]
        for token in client.tokens:
            self._by_token.pop(token, None)

    def process_ended(self, client: Client) -> None:
        """A client's process is gone."""
        if client.number in self._suspended:
            self._forget(client)
            self._ended += 1
            del self._service.clients[client.number]
            self._service.client_left(client, "its process ended while the broker was restarted")
        else:
            client.close()

    async def run(self) -> None:
        """Let those who have not resumed in time go the way of the revoked."""
        service = self._service
        if not self._suspended:
            return
        grace = service.policy.broker.resume_grace
        await trio.sleep(grace)
        why = f"not resumed within {grace:g} s ([broker] resume_grace)"
        for client in list(self._suspended.values()):
            if client.number not in self._suspended:  # it has ended meanwhile
                continue
            self._forget(client)
            self._expired += 1
            service.log.warning(
                "client not resumed", client=client.number, pid=client.identity.pid, reason=why
            )
            service.reclaimer.spawn(self._expire, client, why)

    async def _expire(self, client: Client, why: str) -> None:
        service = self._service
        await service.revocation.revoke_all(list(client.grants.values()), 0.0, "the broker", why)
        if service.clients.pop(client.number, None) is not None:
            service.client_left(client, why)

    def statistics(self) -> ResumptionStatistics:
        """What became of the clients of the last broker so far."""
        return ResumptionStatistics(
            suspended=len(self._suspended),
            resumed=self._resumed,
            grants=self._grants,
            ended=self._ended,
            expired=self._expired,
        )


@final
class _Again:
    """Tells a resumed client what the last broker may have told it or not, and what still holds."""

    __slots__ = ("_client", "_service")

    def __init__(self, service: Service, client: Client) -> None:
        self._service = service
        self._client = client

    def __call__(self) -> None:
        client = self._client
        for enclave in {grant.enclave for grant in client.grants.values()}:
            if enclave.state is EnclaveState.DRAINING or enclave.retired:
                client.send({"event": "draining", "enclave": enclave.name, "generation": enclave.generation})
            elif enclave.upgrade_broke_off:
                client.send({"event": "ready", "enclave": enclave.name, "generation": enclave.generation})
        for grant in list(client.grants.values()):
            if grant.enclave.state is EnclaveState.LOST:
                client.send({"event": "lost", "grant": grant.number, "enclave": grant.enclave.name})
            elif grant.revoked:
                deadline = grant.enclave.policy.revoke_grace
                client.send(
                    {"event": "revoked", "grant": grant.number, "slots": grant.slots, "deadline": deadline}
                )
