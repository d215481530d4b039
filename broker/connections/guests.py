"""Greetings that are given without Python: who is expected is decided here, before anybody connects.

Who came twice within a while will come again, and so will others like it: processes that are the same to the
policy, by everything that the kernel tells of them but their number.  They are a **guest**, for whom a few
**places** are kept: a client's number each, paid with the tokens of a connection, and counted as if
somebody had it and had been given something (limits.py).

The attendant (native/door/greet.c) has the listeners meanwhile.  Of who connects it asks the kernel what
identity.py does.  Whom a place is for and who says a plain hello it greets, and answers like a
connection with a seat from then on; a note of it comes here, and only then there is a client.  Everybody
else it puts into the door's line, with nothing read: who is another user or in another group, who resumes,
who comes while somebody of the user waits in line, who floods.

A process that has left slots behind (reclaim.py) is not greeted so, and nothing is given so that a rule about
cgroups decides on: nobody asks for those here (``Attendant.allowed``).

After a death of the broker who was greeted stands in the cells (cells.py), written before the reply.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import trio

from teemate import wire
from teemate.broker._door import ffi, lib
from teemate.broker.connections.door import CONNECTION_COST, Door
from teemate.broker.connections.identity import (
    Identity,
    Peer,
    cgroup_of,
    groups_in,
    label_in,
    peer_bytes,
    principal,
)
from teemate.broker.connections.operations import HELLO_OK
from teemate.broker.connections.outbox import no_descriptors
from teemate.broker.policy.limits import GIVEN_AHEAD, Resource
from teemate.broker.restart.cells import PLACES
from teemate.broker.restart.records import GUEST
from teemate.errors import ConnectionLost, Error

if TYPE_CHECKING:
    from teemate.broker.connections.attendant import Attendant
    from teemate.broker.connections.connection import Connection
    from teemate.broker.policy.limits import Account
    from teemate.broker.service import Service

__all__ = ["Guests"]

_EACH = 4
"""Places of one guest."""
_GUESTS = PLACES // _EACH
_OF_ONE_USER = 4
"""Guests; else one could have all others' places by coming in many groups."""
_EXPECTED = 60.0
"""Seconds after its last visit in which a guest may come again."""
_COST = CONNECTION_COST + 2
"""Tokens: the connection, its hello, and what it asks for."""
_REMEMBERED = 256
_Key = tuple[int, int, frozenset[int], str]
Receive = Callable[[int, Peer, int, "Account"], "Connection"]


@final
class _Guest:
    """Processes that are the same to the policy."""

    __slots__ = ("account", "cells", "epoch", "groups", "identity", "label", "native", "number", "until")

    def __init__(self, identity: Identity, account: Account, groups: bytes, label: bytes) -> None:
        self.identity = identity
        """Of one of them."""
        self.account = account
        self.groups, self.label = groups, label
        self.number = 0
        self.native: Any = ffi.NULL
        self.epoch = -1
        """When it was found out what they may have."""
        self.cells: set[int] = set()
        """Of its places that nobody has."""
        self.until = 0.0


@final
class Guests:
    """Who is expected, and the places that are kept for them."""

    def __init__(self, service: Service, attendant: Attendant) -> None:
        self._service = service
        self._attendant = attendant
        self._door: Door | None = None
        self._receive: Receive | None = None
        self._guests: OrderedDict[_Key, _Guest] = OrderedDict()
        self._places: dict[int, _Guest] = {}
        self._unused = list(range(PLACES))
        self._seen: OrderedDict[_Key, float] = OrderedDict()
        """Who came once, and when."""
        self._unbarred: set[int] = set()
        """Those to bar for which there was no room (BARRED_MAX): while there are any nobody is expected."""
        self._short: set[_Guest] = set()
        self._greeting = ffi.new("struct attendant_greeting *")
        self.greeted_count = 0
        service.reclaimer.on_left_behind = self.bar

    @property
    def places(self) -> int:
        """How many are kept."""
        return len(self._places)

    async def run(self, door: Door, receive: Receive) -> None:
        """Expect guests until cancelled: at the door, and handed over to `receive`."""
        self._door, self._receive = door, receive
        try:
            while True:
                await trio.sleep(_EXPECTED)
                now = trio.current_time()
                for guest in [guest for guest in self._guests.values() if guest.until <= now]:
                    self._dismiss(guest)
                if not self._guests:
                    door.take_back()
        finally:
            self.end()

    def end(self) -> None:
        """Who was greeted until now is a client; nobody else is."""
        door, self._door = self._door, None
        if door is not None:
            door.take_back()
        self.dismiss_all()
        self._attendant.settle()
        self._receive = None

    def bar(self, pid: int) -> None:
        """What the process may have depends on what it has left behind: Python greets it, while it does."""
        native = self._attendant.native
        if native == ffi.NULL:
            return
        if pid not in self._service.reclaimer.left_behind:
            lib.attendant_unbar(native, pid)
            self._unbarred.discard(pid)
            self._unbarred = {other for other in self._unbarred if lib.attendant_bar(native, other)}
            return
        self._attendant.call_in_process(pid)
        if lib.attendant_bar(native, pid):
            self._unbarred.add(pid)
            self.dismiss_all()  # there are too many of them

    # -- who is expected ---------------------------------------------------------

    def came(self, connection: Connection) -> None:
        """Somebody came who was greeted here, and did not resume: its identity is that of its connection."""
        if self._door is None or not self._service.policy.broker.ahead:
            return
        identity = connection.client.identity
        key = (identity.uid, identity.gid, identity.groups, identity.label)
        now = trio.current_time()
        guest = self._guests.get(key)
        if guest is None:
            last = self._seen.pop(key, None)
            self._seen[key] = now
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
            if last is None or last + _EXPECTED <= now:
                return
            guest = self._make(key, connection)
        if guest is not None:
            guest.until = now + _EXPECTED
            self._short.add(guest)
            trio.lowlevel.current_trio_token().run_sync_soon(self.restock, idempotent=True)

    def _make(self, key: _Key, connection: Connection) -> _Guest | None:
        client, known = connection.client, peer_bytes(connection.socket)
        if known is None:
            return None
        groups, label = known
        if (groups_in(groups), label_in(label)) != (client.identity.groups, client.identity.label):
            return None  # else others like its process now would have the rights that it had once
        mine = [guest for guest in self._guests.values() if guest.account is client.account]
        if len(mine) >= _OF_ONE_USER:
            self._dismiss(mine[0])
        elif len(self._guests) >= _GUESTS:
            self._dismiss(next(iter(self._guests.values())))
        guest = self._guests[key] = _Guest(client.identity, client.account, groups, label)
        return guest

    # -- places --------------------------------------------------------------------

    def restock(self) -> None:
        """Keep as many places for those who came as they may have now."""
        short, self._short = self._short, set()
        for key, guest in list(self._guests.items()):
            if guest not in short:
                continue
            self._guests.move_to_end(key)  # who did not come for longest has to make room
            try:
                self._fill(guest)
            except Exception as error:
                self._service.log.exception("internal error", task="guests", exc_info=error)
                self._dismiss(guest)

    def _fill(self, guest: _Guest) -> None:
        if not self._may_come():
            self._dismiss(guest)
            return
        shelves = self._attendant.allowed(guest.identity)
        if guest.epoch != self._attendant.epoch:
            self._take_places(guest)
            self._invite(guest, [shelf.native for shelf in shelves])
        if guest.native == ffi.NULL:
            return
        account, bucket = guest.account, guest.account.bucket
        while len(guest.cells) < _EACH and self._unused:
            ahead = account.ahead + 1
            if (
                account.exhausted(Resource.REQUESTS, 2)
                or account.exhausted(Resource.DESCRIPTORS_RECEIVED)
                or account.exhausted(Resource.CONNECTIONS, account.places + 1)
                or any(account.exhausted(resource, ahead * each) for resource, each in GIVEN_AHEAD.items())
                or not all(self._attendant.has_room(shelf, account.uid, ahead) for shelf in shelves)
                or not bucket.take_if_there(_COST)
            ):
                break
            cell = self._unused.pop()
            number = self._service.next_client()
            if lib.attendant_place(self._attendant.native, guest.native, cell, number):
                self._unused.append(cell)
                break
            guest.cells.add(cell)
            self._places[cell] = guest
            account.places += 1
        for shelf in shelves:
            self._attendant.restock(shelf.enclave)
        if guest.cells and self._door is not None:
            self._door.lend(self._attendant.native)

    def _may_come(self) -> bool:
        service = self._service
        return (
            self._door is not None
            and self._attendant.native != ffi.NULL
            and bool(service.policy.broker.ahead)
            and not service.leaving
            and service.disposal.is_caught_up
            and not self._unbarred
        )

    def _invite(self, guest: _Guest, shelves: list[Any]) -> None:
        service, identity = self._service, guest.identity
        guest.number = service.state.next_number("guest")
        service.state.write_guest(guest.number, identity)
        kept = service.resumption.kept_ok()
        before, behind = wire.encode(HELLO_OK), wire.encode(kept)
        host = ffi.new("struct attendant_host *")
        texts = [
            ffi.from_buffer("uint8_t[]", text) for text in (guest.groups, guest.label, before[1:], behind[1:])
        ]
        host.number, host.uid, host.gid = guest.number, identity.uid, identity.gid
        host.groups, host.label, host.before, host.behind = texts
        host.groups_size, host.label_size, host.before_size, host.behind_size = map(len, texts)
        text = identity.principal_text(with_cgroup=False, tree=service.cgroup_tree)
        ffi.memmove(host.principal, principal(text), 32)
        host.token = service.state.kept
        host.pairs = len(HELLO_OK) + len(kept) + host.token
        natives = ffi.new("struct attendant_shelf *[]", shelves)
        guest.native = lib.attendant_expect(self._attendant.native, host, natives, len(shelves))
        guest.epoch = self._attendant.epoch

    def _take_places(self, guest: _Guest) -> None:
        """Who was greeted until now is a client afterwards."""
        native, guest.native = guest.native, ffi.NULL
        if native == ffi.NULL:
            return
        if self._attendant.native != ffi.NULL:
            lib.attendant_dismiss(self._attendant.native, native)
            self._attendant.settle()
        for cell in guest.cells:
            del self._places[cell]
            self._unused.append(cell)
        guest.account.places -= len(guest.cells)
        guest.account.bucket.take(-_COST * len(guest.cells))  # nobody used what they were paid with
        guest.cells.clear()
        self._service.state.erase(GUEST, guest.number)

    def _dismiss(self, guest: _Guest) -> None:
        self._take_places(guest)
        for key in [key for key, other in self._guests.items() if other is guest]:
            del self._guests[key]

    def dismiss_all(self) -> None:
        """Greet nobody until somebody has come again."""
        for guest in list(self._guests.values()):
            self._dismiss(guest)

    def call_in(self, account: Account) -> None:
        """Greet nobody of this user; afterwards everybody who was is a client."""
        for guest in [guest for guest in self._guests.values() if guest.account is account]:
            self._dismiss(guest)

    # -- notes ---------------------------------------------------------------------

    def greeted(self, seat: int, place: int) -> Connection:
        """Have as a client whom the attendant greeted; :meth:`written` ends this."""
        guest = self._places.pop(place)
        guest.cells.discard(place)
        guest.account.places -= 1
        guest.until = trio.current_time() + _EXPECTED
        self._short.add(guest)
        self.greeted_count += 1
        lib.attendant_take(self._attendant.native, seat, self._greeting)
        try:
            return self._take_over(guest)
        finally:
            ffi.buffer(self._greeting)[:] = bytes(ffi.sizeof(self._greeting[0]))  # there was a token in it

    def _take_over(self, guest: _Guest) -> Connection:
        """Have as a client of whom the greeting tells; if that fails its connection ends."""
        greeting, service = self._greeting, self._service
        told, fd, pidfd = greeting.told, greeting.fd, greeting.pidfd
        with contextlib.ExitStack() as failed:
            failed.callback(wire.close_all, [fd, pidfd])
            cgroup, failure = self._cgroup(told.pid, pidfd, guest.account.uid)
            identity = replace(guest.identity, pid=told.pid, cgroup=cgroup)
            assert self._receive is not None  # since end() settles
            connection = self._receive(fd, Peer(identity=identity, pidfd=pidfd), told.client, guest.account)
            failed.pop_all()
            failed.callback(connection.close)
            client = connection.client
            connection.greeted = True
            client.name = bytes(told.name[0 : told.name_size]).decode("ascii")
            client.counts = bool(told.flags & lib.ATTENDANT_COUNTS)
            client.requests = 1
            if told.flags & lib.ATTENDANT_TOKEN:
                client.tokens = (bytes(told.token),)
                client.started = told.started
            if told.flags & lib.ATTENDANT_SESSION:
                client.first_token = bytes(told.session)
            if service.monitoring.viewers:
                self._show(connection)
            if greeting.unsent:
                connection.outbox.unsent(greeting.unsent)
            if failure is not None:
                connection.dismiss(failure)
            failed.pop_all()
        return connection

    def _show(self, connection: Connection) -> None:
        greeting, monitoring = self._greeting, self._service.monitoring
        try:
            monitoring.received(connection, bytes(greeting.hello[0 : greeting.hello_size]), ())
            if not greeting.unsent:
                monitoring.sent(connection, bytes(greeting.reply[0 : greeting.reply_size]), ())
        except Exception as error:  # the client has nothing to do with it
            self._service.log.exception("internal error", task="guests", exc_info=error)

    def _cgroup(self, pid: int, pidfd: int, uid: int) -> tuple[str, Error | None]:
        """Find out its cgroup; with the reason why it is refused, as at its connection, if that cannot be."""
        service = self._service
        try:
            return cgroup_of(pid, pidfd, service.cgroup_tree), None
        except ConnectionLost as lost:
            service.complaints.warning("client was gone before it was identified", uid, reason=lost.message)
            return "", lost
        except OSError as error:
            refused = no_descriptors("the broker has none left to find out who connected", error)
            service.complaints.warning("connection refused", uid, reason=refused.message)
            return "", refused

    def written(self, connection: Connection | None, place: int) -> None:
        """Its record says what the cell does, or the connection ends."""
        try:
            if connection is not None and not connection.client.recorded:
                self._service.state.write_client(connection.client)
        except BaseException:
            assert connection is not None
            connection.close()
            raise
        finally:
            lib.attendant_clear_place(self._attendant.native, place)
            self._unused.append(place)
