"""What every user may use of the broker, counted at the moment of use.

One :class:`Account` per uid, so that a user with a hundred processes gets no more than a user
with one.  Whoever takes something from the account holds a :class:`Charge` until it gives it
back; releasing is never left to the garbage collector, and a charge that is forgotten is a
bug that the interpreter reports.  An account disappears with its last charge, except that it
stays for a while when its bucket of tokens is not full yet: else reconnecting would refill it;
and for as long as a client that holds nothing refers to it (one that is suspended): never are there two
accounts of one uid.

Requests cost tokens.  The bucket is asked *before* a message is received, so a client that
floods is slowed down in its own socket buffer and nothing of it is in our memory.  Large
messages cost more, since looking through them takes longer.
"""

from __future__ import annotations

import enum
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from teemate.broker.connections.turns import Rounds, Turn
from teemate.errors import LimitReached

if TYPE_CHECKING:
    from teemate.broker.connections.attendant import Seat

__all__ = [
    "GIVEN_AHEAD",
    "Account",
    "AccountStatistics",
    "Charge",
    "Ledger",
    "LedgerStatistics",
    "Limits",
    "Resource",
    "TokenBucket",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The policy's ``[limits]``: per uid, except where the name says client."""

    connections: int = 512
    handshakes: int = 64
    """Connections that have not said hello yet."""
    handshake_seconds: float = 10.0
    """How long they may take."""
    requests: int = 256
    queued_bytes: int = 4 << 20
    grants: int = 512
    slots: int = 1024
    pages: int = 4 << 20
    descriptors_received: int = 64
    """Sent to the broker and not closed yet."""
    descriptors_sent: int = 1024
    """Sent by the broker and not received yet."""
    requests_per_second: float = 5000.0
    burst: int = 20000


class Resource(enum.Enum):
    """What is counted; the value is the key of ``[limits]`` that bounds it."""

    CONNECTIONS = "connections"
    HANDSHAKES = "handshakes"
    REQUESTS = "requests"
    QUEUED_BYTES = "queued_bytes"
    GRANTS = "grants"
    SLOTS = "slots"
    PAGES = "pages"
    DESCRIPTORS_RECEIVED = "descriptors_received"
    DESCRIPTORS_SENT = "descriptors_sent"


GIVEN_AHEAD = {Resource.GRANTS: 1, Resource.SLOTS: 1, Resource.DESCRIPTORS_SENT: 2}
"""What one seat (attendant.py) may have taken that is not charged yet."""


@final
class TokenBucket:
    """Lets `rate` requests a second through on average, `burst` of them at once.

    Tokens may be taken that are not there yet; the taker then waits for as long as they take
    to come.  So several connections of a user queue up behind one another in time and none is
    overtaken.
    """

    __slots__ = ("_clock", "_last", "_tokens", "burst", "rate")

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self.burst = burst
        self._clock = clock
        self._tokens = burst
        self._last = clock()

    def take(self, amount: float = 1.0) -> float:
        """Take `amount` tokens; returns for how many seconds the taker has to wait, mostly 0."""
        now = self._clock()
        tokens = self._tokens + (now - self._last) * self.rate
        if tokens > self.burst:
            tokens = self.burst
        self._last = now
        tokens -= amount
        self._tokens = tokens
        return 0.0 if tokens >= 0.0 else -tokens / self.rate

    def take_if_there(self, amount: float = 1.0) -> bool:
        """Take `amount` tokens unless they would have to be waited for."""
        if self.take(amount):
            self._tokens += amount
            return False
        return True

    @property
    def full(self) -> bool:
        """Whether nothing is missing: then forgetting the bucket changes nothing."""
        return self._tokens + (self._clock() - self._last) * self.rate >= self.burst


@final
class Charge:
    """So much of one resource, until :meth:`release`.

    Also a context manager.  Releasing twice is an error: it would give away what somebody
    else holds.
    """

    __slots__ = ("_account", "amount", "resource")

    def __init__(self, account: Account, resource: Resource, amount: int) -> None:
        self._account: Account | None = account
        self.resource = resource
        self.amount = amount

    def release(self) -> None:
        """Give it back."""
        account, self._account = self._account, None
        if account is None:
            raise AssertionError(f"charge on {self.resource.value} released twice")
        account._give_back(self.resource, self.amount)

    def __enter__(self) -> Charge:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_account", None) is not None:
            warnings.warn(
                f"{self.amount} {self.resource.value} never released",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountStatistics:
    """What one user holds now, by the keys of ``[limits]``, and how often a limit said no."""

    uid: int
    used: dict[str, int]
    refused: int


@final
class Account:
    """What the processes of one uid hold together."""

    __slots__ = ("__weakref__", "_ledger", "bucket", "places", "refused", "seats", "turn", "uid", "used")

    def __init__(self, ledger: Ledger, uid: int) -> None:
        limits = ledger.limits
        self._ledger = ledger
        self.uid = uid
        self.used: dict[Resource, int] = dict.fromkeys(Resource, 0)
        self.refused = 0
        self.bucket = TokenBucket(limits.requests_per_second, limits.burst, ledger.clock)
        self.turn = Turn(ledger.rounds)
        self.seats: dict[Seat, None] = {}
        """Of its connections, those that can be given something at any moment, the oldest first."""
        self.places = 0
        """Connections that may come and be given something at any moment (guests.py)."""

    def charge(self, resource: Resource, amount: int = 1) -> Charge:
        """Take `amount` of `resource`; the caller releases the charge.

        Raises
        ------
        LimitReached
            Naming the limit and the setting that raises it.

        """
        limit = self._ledger.bounds[resource]
        if self.ahead and self._may_reach(resource, amount, limit):
            self._ledger.call_in(self)
        used = self.used[resource]
        if used + amount > limit:
            self.refused += 1
            self._ledger.refused[resource] += 1
            raise LimitReached(
                f"uid {self.uid} holds {used} of {limit} {resource.value.replace('_', ' ')} and asked for"
                f" {amount} more: the broker's policy sets this in [limits] {resource.value}",
                {
                    "limit": resource.value,
                    "maximum": limit,
                    "used": used,
                    "setting": f"[limits] {resource.value}",
                },
            )
        return self.owe(resource, amount)

    def _may_reach(self, resource: Resource, amount: int, limit: int) -> bool:
        """Whether nothing is left for those who are seated."""
        used = self.used[resource] + amount
        if resource is Resource.REQUESTS:  # those are answered at once, but not beside so many
            return used >= limit
        if resource is Resource.CONNECTIONS:
            return used + self.places > limit
        return used + GIVEN_AHEAD.get(resource, 0) * self.ahead > limit

    @property
    def ahead(self) -> int:
        """How many connections can be given something at any moment."""
        return len(self.seats) + self.places

    def owe(self, resource: Resource, amount: int = 1) -> Charge:
        """Take what is there already, or was before a restart, also beyond the limit."""
        self.used[resource] += amount
        self._ledger.reopen(self)
        return Charge(self, resource, amount)

    def exhausted(self, resource: Resource, amount: int = 1) -> bool:
        """Whether `amount` more of `resource` cannot be taken."""
        return self.used[resource] + amount > self._ledger.bounds[resource]

    def _give_back(self, resource: Resource, amount: int) -> None:
        self.used[resource] -= amount
        if self.used[resource] < 0:
            raise AssertionError(f"more {resource.value} given back than taken")
        if resource is Resource.CONNECTIONS:
            self._ledger.forget_unused()

    @property
    def unused(self) -> bool:
        """Whether nothing is held and nothing owed."""
        return not any(self.used.values()) and self.bucket.full

    def statistics(self) -> AccountStatistics:
        """What is held at this moment."""
        used = {resource.value: count for resource, count in self.used.items()}
        return AccountStatistics(uid=self.uid, used=used, refused=self.refused)


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerStatistics:
    """Every account that is in use, and how often each limit said no to anybody, by keys of ``[limits]``."""

    accounts: tuple[AccountStatistics, ...]
    refused: dict[str, int]


@final
class Ledger:
    """The accounts of all users."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.clock = clock
        self.bounds: dict[Resource, int] = {
            resource: getattr(limits, resource.value) for resource in Resource
        }
        self.rounds = Rounds()
        """For whoever runs the scheduler to add to it."""
        self.call_in: Callable[[Account], None] = lambda _account: None
        """Takes the seats of a user away, and charges what was given to them."""
        self.refused: dict[Resource, int] = dict.fromkeys(Resource, 0)
        self._accounts: dict[int, Account] = {}
        self._known: weakref.WeakValueDictionary[int, Account] = weakref.WeakValueDictionary()
        """Also those that are closed, while somebody refers to them: who comes back gets the same."""

    def account(self, uid: int) -> Account:
        """Return the account of `uid`, opened when it is not there yet."""
        account = self._accounts.get(uid)
        if account is None:
            account = self._known.get(uid)
            if account is None:
                account = self._known[uid] = Account(self, uid)
            self._accounts[uid] = account
        return account

    def reopen(self, account: Account) -> None:
        """Have an account that holds something among those that are open."""
        self._accounts.setdefault(account.uid, account)

    def adopt(self, limits: Limits) -> None:
        """Bound everybody by `limits` from now on; who holds more than that keeps it, and gets no more."""
        self.limits = limits
        self.bounds = {resource: getattr(limits, resource.value) for resource in Resource}
        for account in self._known.values():
            account.bucket.rate, account.bucket.burst = limits.requests_per_second, limits.burst

    def forget_unused(self) -> None:
        """Close the accounts of users that left; a handful at most are looked at per call."""
        for uid in [uid for uid, account in self._accounts.items() if account.unused]:
            del self._accounts[uid]

    def statistics(self) -> LedgerStatistics:
        """What all users hold at this moment."""
        return LedgerStatistics(
            accounts=tuple(account.statistics() for account in self._accounts.values()),
            refused=self.refusals(),
        )

    def refusals(self) -> dict[str, int]:
        """How often each limit said no to anybody, by keys of ``[limits]``."""
        return {resource.value: count for resource, count in self.refused.items()}
