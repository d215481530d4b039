"""Enclaves that connections have attached by name: one mapping for all of this process, a slot for each.

An enclave has one address, so a process maps it once; the last connection that goes detaches it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

from teemate import errors
from teemate._broker import Broker
from teemate._broker import connect as connect_broker
from teemate._enclave import SlotLease
from teemate._grant import WAIT, GrantedEnclave
from teemate._slot import Slot

__all__ = ["slot_of"]


class _Attached:
    """One enclave, while connections have slots of it or wait for one."""

    def __init__(self) -> None:
        # Held while the enclave is mapped or unmapped, and not by who waits for a slot: closing must not
        # wait for them.  Reentrant: a connection that nobody has any more is closed wherever the
        # collector finds it.
        self.lock = threading.RLock()
        self.users: set[object] = set()
        """Who counts on its staying mapped; they come and go without the lock."""
        self.broker: Broker | None = None
        self.enclave: GrantedEnclave | None = None

    def take(self, name: str, check: Callable[[], None] | None) -> tuple[GrantedEnclave, SlotLease, Slot]:
        """Return a slot, after its enclave and what gives it back."""
        deadline = time.monotonic() + WAIT
        while True:
            with self.lock:
                enclave = self._mapped(name)
                lease = enclave.slot(wait=0)
                with contextlib.suppress(errors.Busy):
                    return enclave, lease, lease.__enter__()
            left = deadline - time.monotonic()
            try:
                enclave._acquire(1, max(0.0, left), check)
            except errors.Error:
                # One that went meanwhile is attached anew, perhaps by another connection already.
                if enclave.gone is None or left <= 0:
                    raise

    def left(self, enclave: GrantedEnclave | None) -> None:
        """Give a slot of `enclave` back to the broker, or detach when nobody uses it any more."""
        if self.users and (enclave is None or enclave is not self.enclave):
            return  # it went, and its slots with it
        with self.lock:
            if not self.users:
                self._leave()
            elif enclave is not None and enclave is self.enclave:
                # One that broke has gone back already.
                with contextlib.suppress(errors.Error):
                    enclave.release()

    def _mapped(self, name: str) -> GrantedEnclave:
        if self.enclave is not None and self.enclave.gone is None:
            return self.enclave
        self._leave()
        with contextlib.ExitStack() as failed:
            broker = failed.enter_context(connect_broker(client="teemate.db"))
            enclave = broker.attach(name)
            self.broker, self.enclave = broker, enclave
            failed.pop_all()
        return enclave

    def _leave(self) -> None:
        enclave, broker = self.enclave, self.broker
        self.enclave = self.broker = None
        try:
            if enclave is not None:
                enclave.detach()
        finally:
            if broker is not None:
                broker.close()


# None is ever taken out: who comes while the last one detaches has to find the lock that is held for it.
_attached: dict[tuple[int, str, str], _Attached] = {}


@contextlib.contextmanager
def slot_of(name: str, check: Callable[[], None] | None = None) -> Iterator[Slot]:
    """Have a slot of the enclave `name`, which the broker at ``TEEMATE_SOCKET`` shares.

    `check` is called now and then while it waits for one, and ends that by raising.
    """
    # A child of fork() holds nothing of its parent's.
    key = (os.getpid(), os.environ.get("TEEMATE_SOCKET", ""), name)
    attached = _attached.setdefault(key, _Attached())
    user = object()
    attached.users.add(user)
    enclave: GrantedEnclave | None = None
    try:
        enclave, lease, slot = attached.take(name, check)
        try:
            yield slot
        finally:
            lease.__exit__(None, None, None)
    finally:
        attached.users.discard(user)
        if key[0] == os.getpid():
            attached.left(enclave or attached.enclave)
