"""The operations of the protocol: what each takes, who may ask for it, what answers it.

An operation is declared once, with the type of its arguments; what a client sent is turned
into that type (requests.py) before the handler sees anything.  Handlers return an :class:`Answer`
at once, or a coroutine when they have to wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Generic, TypeVar, final

from teemate import errors, wire
from teemate.broker.connections.requests import (
    Acquire,
    Answer,
    Arguments,
    Attach,
    Clients,
    Create,
    Denials,
    Destroy,
    Detach,
    Drain,
    Hello,
    Holders,
    Monitor,
    Nothing,
    OpenFile,
    Release,
    Result,
    Revoke,
    Stats,
    Undrain,
    Upgrade,
)

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client

__all__ = ["HELLO_OK", "Method", "changes_something", "find_method"]

PROTOCOL_VERSION = 1
BROKER_NAME = f"teemate-broker {version('teemate')}"
HELLO_OK = {"version": PROTOCOL_VERSION, "broker": BROKER_NAME, "max_message": wire.MAX_MESSAGE}
"""What every hello is answered."""
T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True)
class Method(Generic[T]):
    """One operation; `fds` descriptors come with its request and belong to the handler."""

    operation: str
    parse: Callable[[Arguments], T]
    handler: Callable[[Client, T, tuple[int, ...]], Result]
    administrators: bool = False
    fds: int = 0
    changes: bool = False
    """Whether it may be done once only: asked again with the same id, it is answered as before."""
    stops: bool = False
    """Whether nothing may be given ahead (attendant.py) while it begins."""

    def run(self, client: Client, untrusted_args: dict[str, object], fds: tuple[int, ...]) -> Result:
        """Check who asks and what for, then start the handler.

        Raises
        ------
        ProtocolError, Denied
            Before the handler ran; the descriptors are closed.

        """
        try:
            args = self.parse(Arguments(self.operation, untrusted_args))
            if self.administrators:
                client.service.require_administrator(client, self.operation)
        except errors.Error:
            client.dispose(fds)
            raise
        return self.handler(client, args, fds)


@final
@dataclass(slots=True)
class _Methods:
    known: dict[str, Method[object]] = field(default_factory=dict)


_METHODS = _Methods()


def method(
    operation: str,
    parse: Callable[[Arguments], T],
    *,
    administrators: bool = False,
    fds: int = 0,
    changes: bool = False,
    stops: bool = False,
) -> Callable[
    [Callable[[Client, T, tuple[int, ...]], Result]], Callable[[Client, T, tuple[int, ...]], Result]
]:
    """Declare the decorated function as the handler of `operation`."""

    def declare(
        handler: Callable[[Client, T, tuple[int, ...]], Result],
    ) -> Callable[[Client, T, tuple[int, ...]], Result]:
        declared = Method(operation, parse, handler, administrators, fds, changes, stops)
        _METHODS.known[operation] = declared  # type: ignore[assignment]
        return handler

    return declare


def find_method(operation: str) -> Method[object] | None:
    """Return the operation's declaration, None when there is no such operation."""
    return _METHODS.known.get(operation)


def changes_something(operation: str) -> bool:
    """Whether the operation may be done once only."""
    declared = _METHODS.known.get(operation)
    return declared is not None and declared.changes


@method("hello", Hello.parse)
def hello(client: Client, args: Hello, _fds: tuple[int, ...]) -> Result:
    """Agree on the version."""
    connection = client.connection
    assert connection is not None  # it has just brought this request
    if connection.greeted:
        raise errors.ProtocolError("hello was said already")
    if args.version != PROTOCOL_VERSION:
        raise errors.Unsupported(
            f"this broker speaks version {PROTOCOL_VERSION} of the protocol, not {args.version}",
            {"version": PROTOCOL_VERSION},
        )
    connection.greeted = True
    client.name = args.client
    client.counts = args.counters
    more, after = client.service.resumption.greet(client, args)
    return Answer(HELLO_OK | more, after=after, patient=True)


@method("ping", Nothing.parse)
def ping(_client: Client, _args: Nothing, _fds: tuple[int, ...]) -> Result:
    """Say that the broker is there."""
    return Answer({})


@method("enclaves", Nothing.parse)
def enclaves(client: Client, _args: Nothing, _fds: tuple[int, ...]) -> Result:
    """List the enclaves that this client may attach to; all of them for administrators."""
    service = client.service
    choice = {"backend": service.choice.backend, "wanted": service.choice.wanted}
    return Answer({"enclaves": service.list_enclaves(client), **choice})


@method("attach", Attach.parse, changes=True)
def attach(client: Client, args: Attach, _fds: tuple[int, ...]) -> Result:
    """Give a grant: the enclave's fd, its arena, and slots."""
    return client.service.granting.attach(client, args)


@method("slots.acquire", Acquire.parse, changes=True)
def slots_acquire(client: Client, args: Acquire, _fds: tuple[int, ...]) -> Result:
    """Give more slots for a grant."""
    return client.service.granting.acquire(client, args)


@method("slots.release", Release.parse, changes=True)
def slots_release(client: Client, args: Release, _fds: tuple[int, ...]) -> Result:
    """Take slots of a grant back."""
    return client.service.granting.release(client, args)


@method("files.open", OpenFile.parse)
def files_open(client: Client, args: OpenFile, _fds: tuple[int, ...]) -> Result:
    """Give a descriptor of a file that the enclave's code lends the holder of a slot."""
    return client.service.lending.open_file(client, args)


@method("detach", Detach.parse, changes=True)
def detach(client: Client, args: Detach, _fds: tuple[int, ...]) -> Result:
    """End a grant."""
    return client.service.granting.detach(client, args)


@method("create", Create.parse, changes=True, fds=1, stops=True)
def create(client: Client, args: Create, fds: tuple[int, ...]) -> Result:
    """Build an enclave from the image that came along."""
    return client.service.administration.create(client, args, fds[0])


@method("destroy", Destroy.parse, changes=True, stops=True)
def destroy(client: Client, args: Destroy, _fds: tuple[int, ...]) -> Result:
    """End an enclave; its owner may, and administrators."""
    return client.service.destruction.destroy(client, args)


@method("drain", Drain.parse, changes=True, stops=True)
def drain(client: Client, args: Drain, _fds: tuple[int, ...]) -> Result:
    """No new grants, and wait for the old ones; the enclave's owner may, and administrators."""
    return client.service.lifecycle.drain(client, args)


@method("undrain", Undrain.parse, changes=True, stops=True)
def undrain(client: Client, args: Undrain, _fds: tuple[int, ...]) -> Result:
    """Take drained enclaves into use again; the enclave's owner may, and administrators."""
    return client.service.lifecycle.undrain(client, args)


@method("upgrade", Upgrade.parse, changes=True, fds=1, stops=True)
def upgrade(client: Client, args: Upgrade, fds: tuple[int, ...]) -> Result:
    """Replace an enclave by one from another image; its owner may, and administrators."""
    return client.service.upgrades.upgrade(client, args, fds[0])


@method("revoke", Revoke.parse, changes=True, administrators=True, stops=True)
def revoke(client: Client, args: Revoke, _fds: tuple[int, ...]) -> Result:
    """Take grants back."""
    return client.service.revocation.revoke(client, args)


@method("clients", Clients.parse, administrators=True)
def clients(client: Client, args: Clients, _fds: tuple[int, ...]) -> Result:
    """List who is connected and what they hold."""
    return client.service.administration.list_clients(args)


@method("holders", Holders.parse, administrators=True)
def holders(client: Client, args: Holders, _fds: tuple[int, ...]) -> Result:
    """List who holds which slot of an enclave, and who waits for some."""
    return client.service.looking.holders(args)


@method("denials", Denials.parse, administrators=True)
def denials(client: Client, args: Denials, _fds: tuple[int, ...]) -> Result:
    """List who was denied what lately, and by which missing rule."""
    return client.service.looking.denials(args)


@method("monitor", Monitor.parse, administrators=True)
def monitor(client: Client, args: Monitor, _fds: tuple[int, ...]) -> Result:
    """Show the traffic from now on, by events."""
    return client.service.monitoring.begin(client, args)


@method("reload", Nothing.parse, administrators=True, stops=True)
def reload(client: Client, _args: Nothing, _fds: tuple[int, ...]) -> Result:
    """Take the policy's file as it is now into use."""
    return client.service.reloading.reload_for_client()


@method("stats", Stats.parse, administrators=True)
def stats(client: Client, args: Stats, _fds: tuple[int, ...]) -> Result:
    """Tell what every part counts."""
    return client.service.stats(args)
