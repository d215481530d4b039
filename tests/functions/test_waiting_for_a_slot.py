"""How long a call of functions waits for its slot, and for who attaches; without an enclave."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from teemate import Busy
from teemate.functions import Functions

ALL = 60.0


class GivenUpError(Exception):
    """The caller has given up."""


def give_up() -> None:
    raise GivenUpError


class Taken:
    """An enclave without a free slot, which notes how long it is waited for."""

    gone = None

    def __init__(self) -> None:
        self.waits: list[float] = []

    def _take(self, wait: float, _check: object) -> object:
        self.waits.append(wait)
        raise Busy("no free slot")


def test_who_waits_for_another_to_attach_can_give_up() -> None:
    inside, go = threading.Event(), threading.Event()

    def attach(_check: object) -> Any:
        inside.set()
        assert go.wait(ALL)
        raise Busy("no slot")

    functions = Functions(attach)
    raised: list[type[BaseException]] = []

    def ask(check: Any) -> None:
        try:
            functions._list(check)
        except (Busy, GivenUpError) as error:
            raised.append(type(error))

    first = threading.Thread(target=ask, args=(lambda: None,))
    second = threading.Thread(target=ask, args=(give_up,))
    first.start()
    try:
        assert inside.wait(ALL)
        second.start()
        second.join(ALL)
        assert raised == [GivenUpError]
    finally:
        go.set()
        first.join(ALL)
    second.join(ALL)
    assert raised == [GivenUpError, Busy]


@pytest.mark.parametrize(("timeout", "wait"), [(0.5, 0.5), (1000.0, 10.0), (None, 10.0)])
def test_no_slot_is_waited_for_longer_than_the_invocation_may_take(
    timeout: float | None, wait: float
) -> None:
    enclave: Any = Taken()
    with pytest.raises(Busy):
        Functions.of(enclave).invoke("name", timeout=timeout)
    assert enclave.waits == [0, wait]
