"""The EPC goes under a thread that is inside: its call ends, and no process does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from backends import sgx_only
from images import Images
from losing import break_epc

import teemate

pytestmark = sgx_only("an EPC that goes under a running thread")


@pytest.fixture
def looping(images: Images) -> Iterator[teemate.Enclave]:
    """A private enclave with an ECALL that never ends."""
    with teemate.create_enclave(images.faults.sgxs, images.faults.sigstruct, backend="sgx") as enclave:
        yield enclave


def once_inside(enclave: teemate.Enclave, action: Callable[[], None]) -> threading.Thread:
    """Do `action` in another thread when a call has been paused, so that it has begun."""

    def wait() -> None:
        while enclave._pauses == 0:
            os.sched_yield()
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_call_ends_as_lost_when_the_epc_is_emptied_under_it(looping: teemate.Enclave) -> None:
    with looping.slot() as slot:
        breaker = once_inside(looping, lambda: break_epc("lose"))
        with pytest.raises(teemate.EnclaveLost):
            slot.call("loop", timeout=60)
        breaker.join()
        with pytest.raises(teemate.EnclaveLost):
            slot.call("echo", b"again")


def test_a_memory_error_under_a_running_call_ends_the_call_and_not_the_process(
    looping: teemate.Enclave,
) -> None:
    tcs = looping.base + looping._unopened[0].tcs
    with looping.slot() as slot:
        breaker = once_inside(looping, lambda: break_epc("poison", hex(tcs)))
        with pytest.raises(teemate.EnclaveLost):
            slot.call("loop", timeout=60)
        breaker.join()


def test_a_handler_for_other_bus_errors_is_still_called(looping: teemate.Enclave) -> None:
    """SIGBUS is ours for one reason only; the library puts itself before whoever was there."""
    seen: list[int] = []
    previous = signal.signal(signal.SIGBUS, lambda number, frame: seen.append(number))
    try:
        with looping.slot() as slot:
            assert slot.call("echo", b"x") == b"x"
            signal.raise_signal(signal.SIGBUS)
            assert seen == [signal.SIGBUS]
    finally:
        signal.signal(signal.SIGBUS, previous)
