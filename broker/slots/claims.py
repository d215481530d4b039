"""What clients say of their own calls: a page per client that the broker makes, hands over and reads.

Made when somebody first looks (`clients` with `activity`), never at an attach, and for clients whose library
said in `hello` that it can count.  The page is a memfd that can be neither cut nor made longer; only this
client and the broker have it, and the broker never maps it: it is read with pread(2), so nothing that the
client does with it can be more than wrong numbers.  They are shown as the client's claim.  What a client is
charged for are the broker's own: slot time from assignment to release, and the gate's count of calls
(holders.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import time
from array import array
from typing import TYPE_CHECKING, NamedTuple, final

from teemate import errors
from teemate.broker.policy.limits import Resource

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client

__all__ = ["PAGE_SIZE", "Claim", "CounterPage", "claim_of"]

PAGE_SIZE = 4096
_WORDS = 8
"""Of a line, as struct teemate_counters has it: calls, time inside, since when a thread is inside."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MOST = (1 << 63) - 1
"""What is claimed beyond that is cut: it goes into messages."""


class Claim(NamedTuple):
    """What a client says: calls that have ended, seconds inside, threads inside now."""

    calls: int
    inside: float
    running: int


@final
class CounterPage:
    """The broker's end of a page; closed with the connection that it was made for."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("teemate-counters", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, PAGE_SIZE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self.fd)
            raise

    def read(self) -> Claim:
        """Read what the client has written, which may be anything."""
        untrusted = array("Q", os.pread(self.fd, PAGE_SIZE, 0))
        now = time.monotonic_ns()
        entered = [at for at in untrusted[2::_WORDS] if 0 < at <= now]
        inside = sum(untrusted[1::_WORDS]) + sum(now - at for at in entered)
        return Claim(min(sum(untrusted[0::_WORDS]), _MOST), min(inside, _MOST) / 1e9, len(entered))

    def close(self) -> None:
        """Close it; the client may keep its mapping, which counts for nobody then."""
        os.close(self.fd)


def claim_of(client: Client) -> Claim | None:
    """Return what the client says; the first time it is asked to count, and says nothing yet.

    None too where it cannot count, or the broker has no descriptor to spare: half of them are for clients.
    """
    if client.counters is not None:
        return client.counters.read()
    if not (client.counts and client.grants) or client.connection is None:
        return None  # who holds nothing calls nothing
    if client.connection.outbox.queued_messages:
        return None  # it does not read now
    half = client.service.policy.limits.descriptors_sent // 2
    if client.account.exhausted(Resource.DESCRIPTORS_SENT, half):
        return None  # its user's processes do not read either, and have to be able to attach
    page: CounterPage | None = None
    with contextlib.suppress(OSError):
        page = CounterPage()
    if page is None:
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit <= 2 * page.fd:
        page.close()
        return None
    try:
        client.send({"event": "counters"}, (page.fd,))
    except errors.LimitReached:  # too many descriptors are on their way already
        page.close()
        return None
    client.counters = page
    return None
