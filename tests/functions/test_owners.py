"""What one owner has, nobody else sees; and of a client that is killed nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import modules as wasm
import pytest
from function_enclaves import (
    Gate,
    functions_of,
    installed,
    names,
    owner,
    principal,
    weakened,
)
from images import Images

import teemate
from teemate.functions import FunctionLimit, FunctionLimits

ALICE, BOB = 1001, 1002


@pytest.fixture
def gate() -> Iterator[Gate]:
    with Gate(installed()) as gate:
        yield gate


def see_each_other(gate: Gate) -> None:
    alice, bob = owner(gate, 2, ALICE), owner(gate, 3, BOB)
    alice.deploy("secret", wasm.printing(b"alice's", errors=b"alice's log"), env={"KEY": "alice's"})
    assert alice.invoke("secret") == b"alice's"
    assert alice.describe("secret").owner == principal(ALICE)
    assert names(bob) == []
    for what in (bob.invoke, bob.describe, bob.logs, bob.remove):
        with pytest.raises(teemate.NotFound):
            what("secret")
    with pytest.raises(teemate.NotFound):
        bob.limits("secret", FunctionLimits(fuel=1))
    bob.deploy("secret", wasm.printing(b"bob's"))
    assert (alice.invoke("secret"), bob.invoke("secret")) == (b"alice's", b"bob's")
    bob.remove("secret")
    assert names(alice) == ["secret"]
    assert bob.usage().functions == 0
    assert alice.usage().functions == 1


def test_functions_of_two_owners_know_nothing_of_each_other(gate: Gate) -> None:
    see_each_other(gate)


def test_who_does_not_compare_owners_is_found(images: Images, tmp_path: Path) -> None:
    with Gate(weakened(images, tmp_path, "TM_TEST_NO_OWNERS")) as gate, pytest.raises(AssertionError):
        see_each_other(gate)


def test_one_owner_with_two_slots_has_one_set_of_functions(gate: Gate) -> None:
    one, two = owner(gate, 2, ALICE), owner(gate, 3, ALICE)
    one.deploy("shared", wasm.printing(b"first"))
    assert two.invoke("shared") == b"first"
    two.deploy("shared", wasm.printing(b"second"), replace=True)
    assert one.invoke("shared") == b"second"
    one.remove("shared")
    with pytest.raises(teemate.NotFound):
        two.invoke("shared")


def test_the_next_holder_of_a_slot_finds_nothing_of_the_last(gate: Gate) -> None:
    holder = gate.assign(2, uid=ALICE)
    alice = functions_of(holder)
    alice.deploy("secret", wasm.printing(b"alice's"))
    assert alice.invoke("secret") == b"alice's"
    assert alice.usage().blocks_owned > 0
    gate.release(holder)
    bob = owner(gate, 2, BOB, generation=2)
    assert names(bob) == []
    assert bob.usage().blocks_owned == 0


def test_quotas_are_each_owners_own(gate: Gate) -> None:
    alice, bob = owner(gate, 2, ALICE), owner(gate, 3, BOB)
    for number in range(64):
        alice.deploy(f"function-{number}", wasm.printing(b"x"))
    with pytest.raises(teemate.LimitReached):
        alice.deploy("one-more", wasm.printing(b"x"))
    alice.deploy("function-3", wasm.printing(b"y"), replace=True)
    bob.deploy("first", wasm.printing(b"z"))
    assert bob.invoke("first") == b"z"
    alice.remove("function-4")
    alice.deploy("one-more", wasm.printing(b"x"))


def test_modules_fill_no_more_than_their_owners_share_of_the_heap(gate: Gate) -> None:
    alice, bob = owner(gate, 2, ALICE), owner(gate, 3, BOB)
    large = wasm.printing(b"large") + wasm.section(0, wasm.name("x") + bytes(7 << 20))
    for number in range(3):
        alice.deploy(f"large-{number}", large)
    with pytest.raises(teemate.LimitReached):
        alice.deploy("large-3", large)
    bob.deploy("large", large)
    assert bob.invoke("large") == b"large"


def test_the_limit_of_time_is_the_enclaves_clock(gate: Gate) -> None:
    alice = owner(gate, 2, ALICE)
    endless = wasm.command(wasm.ENDLESS)
    alice.deploy("endless", endless, limits=FunctionLimits(fuel=20_000_000, time=5))
    with pytest.raises(FunctionLimit) as caught:
        alice.invoke("endless")
    assert caught.value.limit == "fuel"  # nobody tells the time here: it stands still
