"""Enclaves that connections have attached by name: one mapping for all of this process, a slot for each.

An enclave has one address, so a process maps it once; the last connection that goes detaches it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from teemate import errors
from teemate._broker import Broker
from teemate._broker import connect as connect_broker
from teemate._enclave import SlotLease
from teemate._grant import GrantedEnclave
from teemate._slot import Slot

__all__ = ["slot_of"]


class _Attached:
    """One enclave, and how many connections have slots of it or wait for one."""

    def __init__(self) -> None:
        self.users = 0
        self.lock = threading.RLock()
        self.broker: Broker | None = None
        self.enclave: GrantedEnclave | None = None

    def take(self, name: str) -> tuple[SlotLease, Slot]:
        """Return a slot, and what gives it back."""
        with self.lock:
            if self.enclave is not None and self.enclave.gone is not None:
                self.leave()
            if self.enclave is None:
                with contextlib.ExitStack() as failed:
                    self.broker = failed.enter_context(connect_broker(client="teemate.db"))
                    self.enclave = self.broker.attach(name)
                    failed.pop_all()
            elif not self.enclave.statistics().free:
                self.enclave.acquire()
            lease = self.enclave.slot()
            return lease, lease.__enter__()

    def leave(self) -> None:
        """Detach."""
        enclave, broker = self.enclave, self.broker
        self.enclave = self.broker = None
        try:
            if enclave is not None:
                enclave.detach()
        finally:
            if broker is not None:
                broker.close()


# Reentrant: a connection that nobody has any more is closed wherever the collector finds it.
_lock = threading.RLock()
_attached: dict[tuple[int, str, str], _Attached] = {}


def _enter(key: tuple[int, str, str]) -> _Attached:
    with _lock:
        while True:
            found = _attached.setdefault(key, _Attached())
            found.users += 1
            if _attached.get(key) is found:
                return found


@contextlib.contextmanager
def slot_of(name: str) -> Iterator[Slot]:
    """Have a slot of the enclave `name`, which the broker at ``TEEMATE_SOCKET`` shares."""
    # A child of fork() holds nothing of its parent's.
    key = (os.getpid(), os.environ.get("TEEMATE_SOCKET", ""), name)
    attached = _enter(key)
    try:
        lease, slot = attached.take(name)
        try:
            yield slot
        finally:
            lease.__exit__(None, None, None)
    finally:
        with _lock:
            attached.users -= 1
            last = not attached.users
            if last:
                _attached.pop(key, None)
        if key[0] == os.getpid():
            with attached.lock:
                if last:
                    attached.leave()
                elif attached.enclave is not None:
                    # One that broke has gone back already.
                    with contextlib.suppress(errors.Error):
                        attached.enclave.release()
