"""The synchronous API: a broker behind its socket."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from teemate._connection import DEFAULT_PATH, Check, Connection
from teemate._enclave import Enclave, map_enclave, new_handle
from teemate._faults import native_error, new_diag
from teemate._grant import WAIT, GrantedEnclave
from teemate._native import ffi, lib
from teemate._requests import Reply
from teemate._types import ClientInfo, Drained, EnclaveInfo, Revocation, SlotGrant, Undrained, Upgraded
from teemate.errors import ImageError, ProtocolError
from teemate.wire import close_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from teemate._looking import DenialInfo, Holders
    from teemate.functions import Functions

__all__ = ["Broker", "connect"]

_SEGMENTS = ffi.typeof("struct teemate_segment[]")
_PAGE = ffi.typeof("struct teemate_counters **")
_open = lib.teemate_open
_map_arena = lib.teemate_map_arena
DRAIN_DEADLINE = 30.0
FORCE_WAIT = 60.0
"""Seconds that revoking what is left after a deadline may take."""
UPGRADE_WAIT = 900.0
"""Seconds that building the new enclave and handing state over may take."""
_BACKENDS = {"sim": lib.TEEMATE_SIM, "sgx": lib.TEEMATE_SGX}


def connect(path: str | os.PathLike[str] | None = None, *, client: str = "") -> Broker:
    """Connect to the broker at `path`.

    Parameters
    ----------
    path
        Of its socket; None takes ``TEEMATE_SOCKET``, else ``/run/teemate/broker.sock``.
    client
        A name for ``teemate status`` and the broker's log, at most 64 bytes.

    Raises
    ------
    ConnectionLost
        Nobody listens there.

    """
    where = os.fspath(path) if path is not None else os.environ.get("TEEMATE_SOCKET") or DEFAULT_PATH
    return Broker(Connection(where, client))


@contextmanager
def _image(
    image: str | os.PathLike[str], sigstruct: bytes | str | os.PathLike[str]
) -> Iterator[tuple[int, bytes]]:
    """Yield the descriptor of an image, which is closed afterwards, and its SIGSTRUCT."""
    try:
        if not isinstance(sigstruct, bytes):
            with open(sigstruct, "rb") as file:
                sigstruct = file.read()
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"cannot read {error.filename}: {error.strerror}", {"step": "read"}) from None
    try:
        yield fd, sigstruct
    finally:
        os.close(fd)


def _unmap_counters(pid: int, page: Any) -> None:
    if os.getpid() == pid:  # a child has something else there by now, or nothing
        lib.teemate_counters_unmap(page)


class Broker:
    """A connection to the broker.  Thread safe; use it as a context manager.

    Leaving detaches every enclave that is still attached.  When the broker ends, calls in
    enclaves go on.  One that keeps grants over its restarts (under systemd, or with ``--keeper``)
    is waited for, for as long as it said (``resume_grace``): requests take longer meanwhile, and
    that is all.  If it does not come back, or does not know this process any more, its enclaves
    raise :class:`EnclaveLost`; what needs a broker that is gone raises :class:`ConnectionLost`.

    What is for administrators (and, of :meth:`create` to :meth:`undrain`, for owners of enclaves and who
    the policy lets create) raises :class:`Denied` for everybody else, and :class:`NotFound` for a name or
    number that there is not.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._grants: dict[int, GrantedEnclave] = {}
        self._attaching = 0
        self._news: list[_News] = []
        """What the broker said while attaches were under way, for grants that are not here yet."""
        self._check: Check | None = None
        self._functions: dict[str, Functions] = {}
        self._counters: Any = None
        """The page that calls are counted in for a viewer; unmapped when nobody has it any more."""
        connection.on_event = self._event
        connection.on_counters = self._count
        connection.on_resumed = self._resumed
        connection.on_forgotten = self._forgotten

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach everything and close the connection."""
        self.close()

    def close(self) -> None:
        """Detach everything and close the connection.

        Waits for a broker that is being restarted, so that it hears of it.
        """
        self._close(None)

    def _close(self, check: Check | None) -> None:
        try:
            for enclave in list(self._grants.values()):
                enclave.detach()
        finally:
            self._connection.close(check)
            self._counters = None

    @property
    def path(self) -> str:
        """Of the socket."""
        return self._connection.path

    # ---- everybody's -----------------------------------------------------------------

    def ping(self) -> None:
        """Return when the broker has answered."""
        self._request("ping")

    def enclaves(self) -> list[EnclaveInfo]:
        """Return the enclaves that this client may see."""
        return self._enclaves(None)

    def _enclaves(self, check: Check | None) -> list[EnclaveInfo]:
        return [EnclaveInfo.parse(info) for info in self._request("enclaves", check=check)["enclaves"]]

    def backend(self) -> tuple[str, str]:
        """Return the backend of new enclaves, and what the policy says of it (``auto``, or the same)."""
        ok = self._request("enclaves")
        return str(ok.get("backend", "")), str(ok.get("wanted", ""))

    def attach(self, name: str, slots: int = 1, wait: float = WAIT) -> GrantedEnclave:
        """Map the enclave `name` into this process and get `slots` of its TCSs.

        Parameters
        ----------
        slots
            How many threads of this process can be inside at once.
        wait
            Seconds to wait for slots when all are in use, or for the enclave while it is being built.

        Raises
        ------
        NotFound, Denied, LimitReached, Draining
            As the broker answers.
        Busy
            Not enough slots got free within `wait`, or the enclave was not built within it.
        AddressInUse
            Something else is mapped at the enclave's address; the message names it.

        """
        return self._attach(name, slots, wait, None)

    def _attach(self, name: str, slots: int, wait: float, check: Check | None) -> GrantedEnclave:
        with self._lock:
            self._attaching += 1
        news: list[_News] = []
        try:
            reply = self._connection.request(
                "attach",
                {"enclave": name, "slots": slots, "wait": wait},
                wait=wait,
                undo=self._undo_attach,
                check=check,
                meanwhile=self._prepare,
            )
            try:
                enclave = self._map(reply)
            except BaseException:
                self._undo_attach(reply)
                raise
            with self._lock:
                self._grants[enclave.grant] = enclave
                if self._counters is not None:
                    enclave.count_in(self._counters)
                news = [one for one in self._news if one.concerns(reply)]
        finally:
            with self._lock:
                self._attaching -= 1
                if not self._attaching:
                    self._news.clear()
        for one in news:
            one.tell(enclave)
        return enclave

    def _prepare(self) -> None:
        """Do what the first call will need, while the broker works."""
        self._connection.ready_listener()
        lib.teemate_prepare()

    def _map(self, reply: Reply) -> GrantedEnclave:
        ok, fds = reply.ok, reply.fds
        if len(fds) != 2:
            close_all(fds)
            raise ProtocolError(f"an attach reply brings 2 descriptors, this one {len(fds)}")
        enclave_fd, arena_fd = fds
        try:
            try:
                info = EnclaveInfo.parse(ok["enclave"])
                segments = ffi.new(_SEGMENTS, ok["segments"])
                backend = _BACKENDS[info.backend]
            except BaseException:
                os.close(enclave_fd)
                raise
            handle = new_handle()
            diag = new_diag()
            error = _open(backend, enclave_fd, info.base, info.size, segments, len(segments), handle, diag)
            if error:
                raise native_error(error, diag, f"opening enclave {info.name!r}")
            native = handle[0]
            map_enclave(native, info.name)
            try:
                self._map_arena(native, arena_fd, info.name)
                slots = [SlotGrant.parse(slot) for slot in ok["slots"]]
                return GrantedEnclave(
                    native, self._connection, reply.session, ok["grant"], info, slots, self._forget
                )
            except BaseException:
                lib.teemate_close(native)
                raise
        finally:
            os.close(arena_fd)

    @staticmethod
    def _map_arena(native: Any, arena_fd: int, name: str) -> None:
        diag = new_diag()
        error = _map_arena(native, arena_fd, diag)
        if error:
            raise native_error(error, diag, f"mapping the arena of {name!r}")

    def _undo_attach(self, reply: Reply) -> None:
        self._connection.post("detach", {"grant": reply.ok["grant"], "clean": True}, reply.session)

    def _forget(self, enclave: GrantedEnclave) -> None:
        with self._lock:
            if self._grants.get(enclave.grant) is enclave:  # not of another session, with the same number
                del self._grants[enclave.grant]

    def acquire(self, enclave: GrantedEnclave, count: int = 1, wait: float = WAIT) -> None:
        """Get `count` more slots for a grant: :meth:`GrantedEnclave.acquire`."""
        enclave.acquire(count, wait)

    def release(self, enclave: GrantedEnclave, count: int = 1) -> None:
        """Give `count` free slots of a grant back: :meth:`GrantedEnclave.release`."""
        enclave.release(count)

    def detach(self, enclave: Enclave) -> None:
        """Give a grant up: :meth:`Enclave.detach`."""
        enclave.detach()

    # ---- functions ---------------------------------------------------------------------

    @property
    def functions(self) -> Functions:
        """The functions in the enclave that is called ``functions``, which the first call attaches to."""
        return self.functions_of("functions")

    def functions_of(self, enclave: str) -> Functions:
        """Return the functions in another enclave with that image."""
        from teemate.functions import Functions

        with self._lock:
            found = self._functions.get(enclave)
            if found is None:
                found = Functions(lambda check: self._attach(enclave, 1, WAIT, check))
                self._functions[enclave] = found
            return found

    # ---- administrators' -------------------------------------------------------------

    def create(
        self,
        name: str,
        image: str | os.PathLike[str],
        sigstruct: bytes | str | os.PathLike[str],
        *,
        backend: str = "auto",
        debug: bool = False,
        owner: int | None = None,
    ) -> EnclaveInfo:
        """Have the broker build an enclave from an image; `sigstruct` is its bytes or a path.

        Raises :class:`ImageError` with the step and offset, :class:`Denied` when the policy does
        not let this user create it.
        """
        args: dict[str, object] = {"name": name, "backend": backend, "debug": debug}
        if owner is not None:
            args["owner"] = owner
        with _image(image, sigstruct) as (fd, signature):
            args["sigstruct"] = signature
            return EnclaveInfo.parse(self._request("create", args, fds=(fd,), wait=300.0))

    def upgrade(
        self,
        name: str,
        image: str | os.PathLike[str],
        sigstruct: bytes | str | os.PathLike[str],
        *,
        deadline: float = DRAIN_DEADLINE,
        force: bool = False,
        lose_state: bool = False,
    ) -> Upgraded:
        """Replace an enclave by one from another image, which takes over what the old one keeps.

        The old one is drained first, as :meth:`drain` does it; who attaches meanwhile waits for the new
        one.  No write to the old one comes after its state was handed over.  When its holders have not left
        at `deadline` they are revoked with `force`, else :class:`Busy` is raised and nothing was changed.
        An image without a hand-over is :class:`Unsupported`, unless `lose_state`.
        """
        args: dict[str, object] = {"enclave": name, "deadline": deadline, "force": force}
        args["lose_state"] = lose_state
        with _image(image, sigstruct) as (fd, signature):
            args["sigstruct"] = signature
            ok = self._request("upgrade", args, fds=(fd,), wait=deadline + FORCE_WAIT + UPGRADE_WAIT)
        return Upgraded.parse(ok)

    def destroy(self, name: str, *, force: bool = False) -> int:
        """Destroy an enclave; `force` revokes what is attached first.  Returns how many grants that were."""
        return int(self._request("destroy", {"enclave": name, "force": force}, wait=60.0)["revoked"])

    def drain(
        self,
        name: str | None = None,
        *,
        deadline: float = DRAIN_DEADLINE,
        force: bool = False,
        reason: str | None = None,
    ) -> list[Drained]:
        """Give out no new grants on an enclave, and wait up to `deadline` seconds for the old ones to end.

        `name` None empties the host: all enclaves are drained, and taken down where nobody holds them
        any more.  `force` revokes what is held at the deadline; without it the answer says how much that
        is.  The enclaves stay drained until :meth:`undrain`.
        """
        args: dict[str, object] = {"deadline": deadline, "force": force}
        args |= {"all": True} if name is None else {"enclave": name}
        if reason is not None:
            args["reason"] = reason
        ok = self._request("drain", args, wait=deadline + FORCE_WAIT)
        return [Drained.parse(drained) for drained in ok["enclaves"]]

    def undrain(self, name: str | None = None) -> Undrained:
        """Take a drained enclave into use again; None: all, and build again what was taken down."""
        args: dict[str, object] = {"all": True} if name is None else {"enclave": name}
        ok = self._request("undrain", args, wait=300.0)
        return Undrained(
            tuple(ok["enclaves"]), {failed["enclave"]: failed["reason"] for failed in ok["failed"]}
        )

    def revoke(
        self,
        *,
        grant: int | None = None,
        client: int | None = None,
        enclave: str | None = None,
        grace: float | None = None,
        reason: str | None = None,
    ) -> Revocation:
        """Take back one grant, all of a client, or all of an enclave.

        `grace`: seconds that the holders get to acknowledge.  `reason` goes to the audit record.
        """
        given = {"grant": grant, "client": client, "enclave": enclave, "grace": grace, "reason": reason}
        args = {key: value for key, value in given.items() if value is not None}
        ok = self._request("revoke", args, wait=60.0 + (grace or 0.0))
        return Revocation(ok["grants"], ok["cleared"], ok["quarantined"], ok["leaked"], ok.get("busy", 0))

    def clients(self, *, activity: bool = False) -> list[ClientInfo]:
        """Return everybody who is connected; with `activity` also what they do.

        Who looks for the first time has them begin to count.
        """
        found: list[ClientInfo] = []
        after: int | None = 0
        while after is not None:  # a reply has as many as fit into a message
            ok = self._request("clients", {"after": after, "activity": activity})
            found += [ClientInfo.parse(client) for client in ok["clients"]]
            after = ok.get("next")
        return found

    def holders(self, enclave: str, *, calls: bool = False) -> Holders:
        """Return who holds which slot of `enclave`, and who waits for some.

        With `calls` each slot has the gate's count too, which the enclave's warden reads.
        """
        from teemate._looking import Holders, SlotInfo, WaitingInfo  # late: only administrators ask

        slots: list[SlotInfo] = []
        waiting: list[WaitingInfo] = []
        first: int | None = 0
        while first is not None:  # a reply has as many as fit into a message
            ok = self._request("holders", {"enclave": enclave, "first": first, "calls": calls}, wait=30.0)
            slots += [SlotInfo.parse(slot) for slot in ok["slots"]]
            waiting += [WaitingInfo.parse(request) for request in ok["waiting"]]
            first = ok.get("next")
        return Holders(tuple(slots), tuple(waiting))

    def denials(self, *, uid: int | None = None) -> list[DenialInfo]:
        """Return who was denied what lately and by which missing rule, the newest first."""
        from teemate._looking import DenialInfo

        ok = self._request("denials", {} if uid is None else {"uid": uid})
        return [DenialInfo.parse(denial) for denial in ok["denials"]]

    def reload(self) -> None:
        """Have the broker take its policy's file, as it is now, into use.

        Raises
        ------
        Unsupported
            The file is refused, and the old policy holds on.

        """
        self._request("reload", wait=60.0)

    def stats(self) -> dict[str, Any]:
        """Return the broker's statistics, by part."""
        ok = self._request("stats")
        stats: dict[str, Any] = ok["stats"]
        while "next" in ok:  # a reply has as many users and enclaves as fit into a message
            ok = self._request("stats", ok["next"])
            for part in ("users", "enclaves"):
                stats[part] += ok["stats"][part]
        return stats

    # ---- inside ----------------------------------------------------------------------

    def _request(
        self,
        op: str,
        args: Mapping[str, object] | None = None,
        *,
        fds: tuple[int, ...] = (),
        wait: float = 0.0,
        check: Check | None = None,
    ) -> dict[str, Any]:
        reply = self._connection.request(op, args, fds=fds, wait=wait, check=check or self._check)
        close_all(reply.fds)
        return reply.ok

    def _cancellable(self, check: Check) -> Broker:
        """Return this connection as an object whose requests end when `check` raises."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._check = check
        return view

    # ---- in whichever thread reads the socket -------------------------------------------

    def _count(self, fd: int) -> None:
        """Count calls in the page that `fd` is: an administrator looks at this process."""
        page = ffi.new(_PAGE)
        with self._lock:
            known = self._counters
            if known is not None:  # of a broker before a restart: threads may be counting in it
                page[0] = known
            if lib.teemate_counters_map(fd, page) or known is not None:
                return  # where it cannot be mapped nothing is counted, and nothing is lost
            here = os.getpid()
            self._counters = ffi.gc(page[0], lambda old: _unmap_counters(here, old))
            for enclave in self._grants.values():
                enclave.count_in(self._counters)

    def _event(self, event: Mapping[str, Any]) -> None:
        """Handle an event."""
        kind = event["event"]
        if kind in ("draining", "ready"):
            for enclave in list(self._grants.values()):
                generation = event.get("generation", enclave.info.generation)
                if (enclave.name, enclave.info.generation) == (event["enclave"], generation):
                    enclave.draining = kind == "draining"
            return
        number = event.get("grant", -1)

        def tell(granted: GrantedEnclave) -> None:
            if kind == "revoked":
                granted.revoked(event["slots"], event["deadline"])
            elif kind == "lost":
                granted.lost()

        resumes = self._connection.resumes
        self._tell(
            _News(lambda reply: reply.resumes <= resumes and reply.ok["grant"] == number, tell), number
        )

    def _resumed(self, grants: frozenset[int]) -> None:
        """Hear which grants are left after an absence of the broker."""
        resumes = self._connection.resumes
        gone = _News(
            lambda reply: reply.resumes < resumes and reply.ok["grant"] not in grants,
            GrantedEnclave.taken_back,
        )
        self._tell(gone, *(number for number in list(self._grants) if number not in grants), forget=True)

    def _forgotten(self, why: str) -> None:
        """Hear that no broker knows any grant of this connection."""
        resumes = self._connection.resumes
        over = _News(lambda reply: reply.resumes < resumes, lambda granted: granted.forgotten(why))
        self._tell(over, *list(self._grants), forget=True)

    def _tell(self, news: _News, *numbers: int, forget: bool = False) -> None:
        """Tell the grants of these numbers, and those whose attach is under way when they come."""
        with self._lock:
            told = [self._grants[number] for number in numbers if number in self._grants]
            if forget:
                for granted in told:
                    del self._grants[granted.grant]
            if self._attaching:
                self._news.append(news)
        for granted in told:
            news.tell(granted)


class _News(NamedTuple):
    """Something about grants that came while an attach was under way."""

    concerns: Callable[[Reply], bool]
    """Whether it was said of what this answer to an attach has granted."""
    tell: Callable[[GrantedEnclave], None]
