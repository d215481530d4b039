"""Attaches that are answered without Python: what may be given away is decided here, before anybody asks.

Most of an attach is the way through this program, and nearly all attaches are alike: a client that
holds nothing wants one slot of an enclave that it may attach to.  So, ahead of any request:

- A **shelf** of each enclave that is ready holds up to ``[broker] ahead`` grants: a number, and a slot with
  its key, which is ``ahead`` in the slot table.  While anybody waits for slots there are none, and who
  wants more than is free here gets them back first, so the shares of table.py stay what they are.
- A connection that waits for its client's next message gets a **seat**, if a plain attach would be
  granted here: policy, limits (with all other seats of the user counted as if they had taken something) and
  tokens are asked now.  A seat is good for one attach.
- Who is expected to connect may have a **place** (guests.py): it is greeted, and has a seat from then on,
  before there is a client.

The attendant (native/door/attendant.c, a thread) waits for the messages of the seats.  A plain attach to
an enclave with something on its shelf it answers at once, and a **note** of it comes here; anything else it
leaves in the socket.  Either way the connection is read here again, once the note is taken: so nothing
of a client is overtaken, and what was given is known here before the client is heard again.

What anybody else must not see half done:

- Before any request is looked at all notes are taken (:meth:`Attendant.settle`), and before one that changes
  enclaves or takes grants back everything is taken from the shelves (:meth:`Attendant.call_all_in`).
- An enclave that is not `ready` any more has no shelf from before that can be seen (``Enclave.state``).
- A limit that the user is about to reach first takes its seats away (:meth:`Attendant.call_in`).

After a death of the broker what was given stands in the cells (cells.py), written before the reply; what
lay on a shelf was nobody's, and is free.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

import trio

from teemate import wire
from teemate.broker._door import ffi, lib
from teemate.broker.connections.guests import Guests
from teemate.broker.connections.identity import Identity, principal
from teemate.broker.enclaves.enclave import EnclaveState
from teemate.broker.policy.limits import GIVEN_AHEAD, Resource
from teemate.broker.restart.cells import CELLS, PLACES
from teemate.broker.slots.table import SlotState

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.connections.connection import Connection
    from teemate.broker.enclaves.enclave import Enclave
    from teemate.broker.policy.limits import Account
    from teemate.broker.service import Service

__all__ = ["Attendant", "AttendantStatistics", "Seat"]

_NOTES = 64
_SHELVES = 8
"""That one seat can take from (SEAT_SHELVES)."""
_SEATS = 16
"""Of one user; the one that waits for longest is left then.  So taking them all away costs little."""
_PASSED_ON = 4
"""Messages in a row after which no attach is expected, until a grant has ended: a seat costs something."""
_LOOKED_AT = 64
"""Enclaves that are asked about when a client is seated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendantStatistics:
    """Connections that are seated, grants that are ready, and what became of seats that somebody used.

    `given`: attaches answered without Python; `passed_on`: other messages, and attaches it could not answer.
    `places` are kept for connections to come; `greeted`: those that came so and said hello.
    """

    seats: int
    ready: int
    given: int
    passed_on: int
    places: int
    greeted: int


class _Ready(NamedTuple):
    """A grant on a shelf."""

    shelf: _Shelf
    grant: int
    slot: int


@final
class _Shelf:
    """What one enclave has ready, by cell."""

    __slots__ = ("enclave", "native", "ready")

    def __init__(self, enclave: Enclave, native: Any) -> None:
        self.enclave = enclave
        self.native = native
        self.ready: dict[int, _Ready] = {}


@final
class Seat:
    """A connection whose next message the attendant waits for."""

    __slots__ = ("account", "answered", "connection", "left", "number", "over")

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection = connection
        self.account = connection.client.account
        """Of now: a connection changes its client only when it is read."""
        self.number = number
        self.answered = False
        """Whether the message was an attach, and is answered."""
        self.left = False
        """Whether it was taken away for another connection of the user."""
        self.over = trio.Event()


@final
class Attendant:
    """Seats and shelves, and the notes that come from the thread."""

    threaded = True
    """Off in tests that do everything in one thread, and call :meth:`step`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.native: Any = ffi.NULL
        self._memory: Any = None
        self._notes = ffi.new("struct attendant_note[]", _NOTES)
        self._client = ffi.new("struct attendant_client *")
        self._shelves: dict[Enclave, _Shelf] = {}
        self._ready: dict[int, _Ready] = {}
        self._unused = list(range(CELLS))
        self._seats: dict[int, Seat] = {}
        self._short: set[Enclave] = set()
        """Something was taken from their shelves."""
        self._given_count = 0
        self._passed_on = 0
        self.epoch = 0
        """Counts what makes a client's shelves others."""
        self.guests = Guests(service, self)
        service.ledger.call_in = self.call_in

    # -- running ---------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take notes until cancelled."""
        self._memory = ffi.from_buffer("uint8_t[]", self._service.state.cells.memory)
        cells = ffi.cast("struct attendant_cell *", self._memory)
        places = ffi.cast("struct attendant_greeted *", cells + CELLS)
        self.native = lib.attendant_new(cells, CELLS, places, PLACES, self.threaded)
        if self.native == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        try:
            for pid in self._service.reclaimer.left_behind:
                self.guests.bar(pid)
            task_status.started()
            bell = lib.attendant_bell(self.native)
            while True:
                await trio.lowlevel.wait_readable(bell)
                lib.attendant_collect(self.native, self._notes, 0)  # it is quiet again
                self.settle()
                self._restock_all()
                self.guests.restock()
        finally:
            self._end()

    def _end(self) -> None:
        try:
            self.guests.end()
            for enclave in list(self._shelves):
                self.close(enclave)
            self._recall(list(self._seats.values()))
        finally:
            native, self.native = self.native, ffi.NULL
            lib.attendant_free(native)
            ffi.release(self._memory)

    def step(self) -> bool:
        """Do what the thread would; whether that was anything."""
        return bool(self.native != ffi.NULL and lib.attendant_step(self.native))

    # -- shelves ---------------------------------------------------------------

    def _suits(self, enclave: Enclave) -> bool:
        return (
            self.native != ffi.NULL
            and enclave.state is EnclaveState.READY
            and self._service.generations.pending(enclave) is None  # who asks for it waits for the next one
            and self._service.enclaves.get(enclave.name) is enclave
            and enclave.warden is not None
            and not enclave.policy.with_cgroup  # a group's rights may change at any moment
            and not enclave.retired
            and not enclave.ending
            and not self._service.leaving
        )

    def _shelf(self, enclave: Enclave) -> _Shelf | None:
        """Return the enclave's shelf, made when it may have one."""
        shelf = self._shelves.get(enclave)
        if shelf is not None or not self._service.policy.broker.ahead or not self._suits(enclave):
            return shelf
        built = enclave.built
        info, rest = enclave.attach_parts()
        name = enclave.name.encode()
        described = ffi.new("struct attendant_enclave *")
        texts = [ffi.from_buffer(part) for part in (name, info.data, rest)]
        described.name, described.info, described.rest = (
            ffi.cast("char *", texts[0]),
            ffi.cast("uint8_t *", texts[1]),
            ffi.cast("uint8_t *", texts[2]),
        )
        described.name_size, described.info_size, described.rest_size = len(name), len(info.data), len(rest)
        described.info_pairs = info.pairs
        ffi.memmove(described.mac_key, enclave.key.mac_key(), 32)
        described.number = enclave.serial or 1
        described.fd, described.arena = built.fd, built.arena
        native = lib.attendant_open(self.native, described)
        ffi.memmove(described.mac_key, bytes(32), 32)
        if native == ffi.NULL:
            return None
        shelf = self._shelves[enclave] = _Shelf(enclave, native)
        self.epoch += 1
        enclave.slots.call_in = lambda: self.withdraw(enclave)
        enclave.slots.on_move = lambda: self.count(enclave)
        enclave.on_unready = lambda: self.close(enclave)
        enclave.on_armed = lambda: self.restock(enclave)
        return shelf

    def restock(self, enclave: Enclave) -> None:
        """Put what is missing on the enclave's shelf, as far as slots are free."""
        wanted = self._service.policy.broker.ahead
        shelf = self._shelf(enclave) if wanted else None
        if shelf is None or not self._suits(enclave):
            return
        while len(shelf.ready) < wanted and self._unused:
            slot = enclave.slots.put_ahead()
            if slot is None:
                return
            key, grant = enclave.slot_keys[slot], self._service.state.next_number("grant")
            cell = self._unused.pop()
            tcs = enclave.built.tcs[slot]
            if lib.attendant_stock(
                self.native, shelf.native, cell, grant, slot, tcs, key.generation, key.key
            ):
                self._unused.append(cell)
                enclave.slots.put_back(slot)
                return
            shelf.ready[cell] = self._ready[cell] = _Ready(shelf, grant, slot)

    def withdraw(self, enclave: Enclave) -> None:
        """Take everything from the enclave's shelf: what was given until now is known afterwards."""
        shelf = self._shelves.get(enclave)
        if shelf is None or self.native == ffi.NULL:
            return
        lib.attendant_withdraw(self.native, shelf.native)
        self.settle()
        for cell, ready in list(shelf.ready.items()):
            self._take(cell)
            self._clear(cell)
            enclave.slots.put_back(ready.slot)

    def close(self, enclave: Enclave) -> None:
        """As :meth:`withdraw`, and the shelf is no more."""
        if self.native == ffi.NULL:  # all were, with the attendant
            return
        self.withdraw(enclave)
        shelf = self._shelves.pop(enclave, None)
        if shelf is not None:
            enclave.slots.call_in = enclave.slots.on_move = lambda: None
            enclave.on_unready = enclave.on_armed = lambda: None
            lib.attendant_close(self.native, shelf.native)
            self.epoch += 1

    def call_all_in(self) -> None:
        """Let nothing be given until the other tasks have had their turn, and know what was."""
        for enclave in self._shelves:
            self.withdraw(enclave)
            self._short.add(enclave)
        if self._short:
            trio.lowlevel.current_trio_token().run_sync_soon(self._restock_all, idempotent=True)

    def _restock_all(self) -> None:
        for enclave in self._short:
            self.restock(enclave)
        self._short.clear()

    def start_anew(self) -> None:
        """The policy is another: who may have what is asked again."""
        self.guests.dismiss_all()
        for enclave in list(self._shelves):
            self.close(enclave)
        self._recall(list(self._seats.values()))
        self.epoch += 1

    def count(self, enclave: Enclave) -> None:
        """Tell what replies say of the enclave's slots now."""
        shelf = self._shelves.get(enclave)
        if shelf is not None and self.native != ffi.NULL:
            lib.attendant_count(self.native, shelf.native, enclave.counts())

    def _take(self, cell: int) -> _Ready:
        ready = self._ready.pop(cell)
        del ready.shelf.ready[cell]
        return ready

    def _clear(self, cell: int) -> None:
        lib.attendant_clear(self.native, cell)
        self._unused.append(cell)

    # -- seats -----------------------------------------------------------------

    async def attend(self, connection: Connection) -> bool | None:
        """Wait for the client's next message: whether it is answered, else it is there to be read.

        None: this connection has no seat (any more), and is to be waited for as any other.
        """
        seat = self._take_seat(connection)
        if seat is None:
            return None
        try:
            await seat.over.wait()
        finally:
            if not seat.over.is_set():
                self._recall([seat])
        return None if seat.left and not seat.answered else seat.answered

    def _take_seat(self, connection: Connection) -> Seat | None:
        client, account = connection.client, connection.client.account
        if (
            self.native == ffi.NULL
            or not self._service.policy.broker.ahead
            or client.grants
            or client.withheld
            or connection.waits  # maybe for a grant
            or len(client.tokens) > 1  # its next request ends the older one
            or connection.outbox.queued_messages
            or connection.closing
            or not connection.greeted
            or self._service.leaving
            or connection.passed_on >= _PASSED_ON
            or client.identity.pid in self._service.reclaimer.left_behind
        ):
            return None
        if connection.brief:  # who comes, calls once and leaves would pay for a seat and not use it
            connection.brief = False
            return None
        if len(account.seats) >= _SEATS:  # first, as it may have been given something
            oldest = next(iter(account.seats))
            oldest.left = True
            self._recall([oldest])
        taken = account.ahead + 1
        if account.exhausted(Resource.REQUESTS, 2) or any(
            account.exhausted(resource, taken * each) for resource, each in GIVEN_AHEAD.items()
        ):
            return None
        uid = client.identity.uid
        shelves = [shelf for shelf in self._allowed(client) if self.has_room(shelf, uid, taken)]
        if not shelves or not self._service.state.has_written(client):
            return None
        for shelf in shelves:
            self.restock(shelf.enclave)
        mine = self._client
        mine.number, mine.uid, mine.gid = client.number, uid, client.identity.gid
        mine.least_id = max(client.recalled) + 1 if client.recalled else 0
        text = client.identity.principal_text(with_cgroup=False, tree=self._service.cgroup_tree)
        ffi.memmove(mine.principal, principal(text), 32)
        natives = ffi.new("struct attendant_shelf *[]", [shelf.native for shelf in shelves])
        number = lib.attendant_seat(self.native, connection.fileno(), mine, natives, len(shelves))
        if number < 0:  # no memory or thread for it
            return None
        seat = self._seats[number] = Seat(connection, number)
        account.seats[seat] = None
        return seat

    @staticmethod
    def has_room(shelf: _Shelf, uid: int, clients: int) -> bool:
        """Whether so many more clients of the user may attach to the shelf's enclave."""
        enclave = shelf.enclave
        return enclave.clients_by_uid.get(uid, 0) + clients <= enclave.policy.clients_per_uid

    def _allowed(self, client: Client) -> list[_Shelf]:
        """The shelves of the enclaves that the client may attach to."""
        self._open_shelves()
        if client.shelves[0] != self.epoch:
            client.shelves = (self.epoch, self.allowed(client.identity))
        found: list[_Shelf] = client.shelves[1]
        return found

    def _open_shelves(self) -> None:
        for enclave in list(self._service.enclaves.values())[:_LOOKED_AT]:
            self._shelf(enclave)

    def allowed(self, identity: Identity) -> list[_Shelf]:
        """The shelves of the enclaves that whoever is that may attach to, whatever its cgroup."""
        self._open_shelves()
        allowed = [
            shelf
            for shelf in list(self._shelves.values())[:_LOOKED_AT]
            if shelf.enclave.policy.slots_per_client
            and not any(rule.cgroups for rule in shelf.enclave.policy.attach)
            and self._service.missing_for(identity, shelf.enclave) is None
        ]
        return allowed[:_SHELVES]

    def call_in(self, account: Account) -> None:
        """Let nothing more be given to this user: afterwards all that was is charged."""
        self._recall(list(account.seats))
        self.guests.call_in(account)

    def call_in_process(self, pid: int) -> None:
        """Let nothing more be given to this process: what was is known afterwards."""
        self._recall([seat for seat in self._seats.values() if seat.connection.client.identity.pid == pid])

    def _recall(self, seats: list[Seat]) -> None:
        if self.native == ffi.NULL:
            return
        for seat in seats:
            if lib.attendant_recall(self.native, seat.number):
                self._leave(seat)
        self.settle()

    def _leave(self, seat: Seat) -> None:
        del self._seats[seat.number]
        del seat.account.seats[seat]
        seat.over.set()

    # -- notes -----------------------------------------------------------------

    def settle(self) -> None:
        """Take all notes: what was given until now is known afterwards."""
        if self.native == ffi.NULL or not lib.attendant_has_notes(self.native):
            return
        count = _NOTES
        while count == _NOTES:
            count = lib.attendant_collect(self.native, self._notes, _NOTES)
            notes = [
                (note.seat, note.cell, note.place, note.request, (note.answered_ns - note.asked_ns) / 1e9)
                for note in self._notes[0:count]
            ]
            for number, cell, place, request, seconds in notes:
                seat = self._seats.get(number)  # None: of a client that is not known here yet
                try:
                    if seat is None:
                        self._greeted(number, cell, place, request, seconds)
                    elif cell >= 0:
                        seat.answered = True
                        self._given(seat.connection, number, cell, request, seconds)
                        seat.connection.passed_on = 0
                    else:
                        self._passed_on += 1
                        seat.connection.passed_on += 1
                except Exception as error:
                    self._service.log.exception("internal error", task="attendant", exc_info=error)
                finally:
                    lib.attendant_leave(self.native, number)
                    if seat is not None:
                        self._leave(seat)

    def _greeted(self, number: int, cell: int, place: int, request: int, seconds: float) -> None:
        connection: Connection | None = None
        try:
            connection = self.guests.greeted(number, place)
            if cell >= 0:
                self._given(connection, number, cell, request, seconds)
                connection.brief = True
        except BaseException:
            if connection is None and cell >= 0:
                self._put_away(self._take(cell))
                self._clear(cell)
            raise
        finally:
            self.guests.written(connection, place)

    def _given(self, connection: Connection, number: int, cell: int, request: int, seconds: float) -> None:
        ready, client = self._take(cell), connection.client
        enclave = ready.shelf.enclave
        self._given_count += 1
        self._short.add(enclave)
        try:
            self._service.granting.given(client, enclave, ready.grant, ready.slot, request, seconds)
        except BaseException:
            connection.close()  # what it was given ends with it
            if enclave.slots.slots[ready.slot].state is SlotState.AHEAD:  # nothing was
                self._put_away(ready)
            raise
        finally:
            self._clear(cell)  # not before: the client's record says it now
        connection.outbox.note_sent(2)
        monitoring = self._service.monitoring
        if monitoring.viewers:
            asked, told = self._messages(number)
            monitoring.received(connection, asked, ())
            monitoring.sent(connection, told, (enclave.built.fd, enclave.built.arena))

    def _put_away(self, ready: _Ready) -> None:
        """Somebody has the key of the slot, who has no grant: take it away, and let nobody have the slot."""
        enclave, slot, reclaimer = ready.shelf.enclave, ready.slot, self._service.reclaimer
        enclave.slots.put_back(slot)
        reclaimer.quarantine(enclave, slot, "the broker failed when it was given")
        reclaimer.spawn(reclaimer.clear, enclave, slot, enclave.slot_keys[slot].generation)

    def _messages(self, number: int) -> tuple[bytes, bytes]:
        """What was asked, and what was answered."""
        buffers = [ffi.new("uint8_t[]", wire.MAX_MESSAGE) for _ in range(2)]
        sizes = [ffi.new("size_t *", wire.MAX_MESSAGE) for _ in range(2)]
        lib.attendant_messages(self.native, number, buffers[0], sizes[0], buffers[1], sizes[1])
        return bytes(ffi.buffer(buffers[0], sizes[0][0])), bytes(ffi.buffer(buffers[1], sizes[1][0]))

    def statistics(self) -> AttendantStatistics:
        """What was given so far."""
        return AttendantStatistics(
            seats=len(self._seats),
            ready=len(self._ready),
            given=self._given_count,
            passed_on=self._passed_on,
            places=self.guests.places,
            greeted=self.guests.greeted_count,
        )
