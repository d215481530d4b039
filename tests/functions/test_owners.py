"""What one owner has, nobody else sees; and of a client that is killed nothing is left."""

from __future__ import annotations

from collections.abc import Iterator

import modules as wasm
import pytest
from function_enclaves import (
    ARGUMENT,
    OK,
    Call,
    Gate,
    Holder,
    functions_of,
    installed,
    kill,
    leave_inside,
    names,
    owner,
    principal,
    weakened,
)
from images import BuiltImage, Images

import teemate
from teemate.functions import FunctionLimit, FunctionLimits
from teemate.functions import _wire as wire

ALICE, BOB = 1001, 1002
STAY_IN_LOG = "TM_TEST_STAY_IN_LOG=5"
"""Who has invoked a function for the fifth time stays where its log has just become the function's."""


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


@pytest.fixture(scope="module")
def careless(images: Images, tmp_path_factory: pytest.TempPathFactory) -> BuiltImage:
    """The image without what the tests of this file guard."""
    weak = ("TM_TEST_NO_OWNERS", "TM_TEST_NO_SHARE", "TM_TEST_TRIM_LATE", STAY_IN_LOG)
    return weakened(images, tmp_path_factory.mktemp("careless"), *weak)


def test_who_does_not_compare_owners_is_found(careless: BuiltImage) -> None:
    with Gate(careless) as gate, pytest.raises(AssertionError):
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


def test_more_modules_than_are_kept_ready_run_all_the_same(gate: Gate) -> None:
    alice = owner(gate, 2, ALICE)
    # They have little memory, and are large once they are ready.
    code = [wasm.i32(number) + wasm.DROP for number in range(8_000)]
    for number in range(20):
        module = wasm.command(wasm.write(1, number, 1), data=bytes(range(20)), functions=code)
        limits = FunctionLimits(memory=1 << 16, output=1)
        alice.deploy(f"function-{number}", module, limits=limits, env={"SOME": "thing"})
    for _ in range(2):
        for number in range(20):
            for _ in range(2):
                assert alice.invoke(f"function-{number}") == bytes([number])
    assert alice.usage().heap_used < 32 << 20


def test_logs_go_with_their_function(gate: Gate) -> None:
    bob = owner(gate, 3, BOB)
    before = bob.usage()
    holder = gate.assign(2, uid=ALICE)
    alice = functions_of(holder)
    for _ in range(3):
        alice.deploy("writes", wasm.printing(b"", errors=b"x" * 5_000), replace=True)
        for _ in range(20):
            alice.invoke("writes")
        assert len(alice.logs("writes")) == 13  # what fits
    alice.remove("writes")
    gate.release(holder)
    assert bob.usage() == before


def test_versions_do_not_tell_what_others_deploy(gate: Gate) -> None:
    alice, bob = owner(gate, 2, ALICE), owner(gate, 3, BOB)
    for number in range(5):
        text = wasm.printing(b"%d" % number)
        assert alice.deploy("replaced", text, replace=True).version == number + 1
        assert alice.invoke("replaced") == b"%d" % number  # what was ready is not taken for it
    assert bob.deploy("first", wasm.printing(b"x")).version == 1
    alice.remove("replaced")
    assert alice.deploy("replaced", wasm.printing(b"new")).version == 1
    assert alice.invoke("replaced") == b"new"
    assert [log.invocation for log in alice.logs("replaced")] == []


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


def stay_inside(gate: Gate, slot: int, uid: int, *, generation: int = 1) -> tuple[Holder, Call]:
    """Interrupt an invocation that has 20 MiB of memory, and leave it where it is: in its loop."""
    holder = gate.assign(slot, generation, uid=uid)
    module = wasm.command(wasm.ENDLESS, pages=320)
    limits = FunctionLimits(memory=20 << 20, fuel=1 << 60)
    functions_of(holder).deploy("endless", module, limits=limits, replace=True)
    return holder, leave_inside(gate, holder, "endless")


def half_is_left(gate: Gate) -> None:
    inside = [stay_inside(gate, slot, ALICE) for slot in (2, 3)]
    alice, bob = owner(gate, 4, ALICE), owner(gate, 5, BOB)
    large = wasm.command(wasm.write(1, 0, 1), pages=320)
    alice.deploy("large", large, limits=FunctionLimits(memory=20 << 20))
    with pytest.raises(FunctionLimit) as caught:
        alice.invoke("large")
    assert caught.value.limit == "heap"
    bob.deploy("large", large, limits=FunctionLimits(memory=20 << 20))
    assert bob.invoke("large") == b"\0"
    assert len(inside) == 2


def test_all_invocations_of_an_owner_have_half_of_the_heap(gate: Gate) -> None:
    half_is_left(gate)


def test_who_does_not_add_up_what_an_owner_has_is_found(careless: BuiltImage) -> None:
    with Gate(careless) as gate, pytest.raises(pytest.fail.Exception, match="FunctionLimit"):
        half_is_left(gate)


def test_what_a_killed_clients_invocation_had_is_freed_by_the_repair(gate: Gate) -> None:
    bob = owner(gate, 5, BOB)
    before = bob.usage()
    for generation in (1, 2):
        holder, _call = stay_inside(gate, 2, ALICE, generation=generation)
        assert bob.usage().heap_used > before.heap_used + (20 << 20)
        kill(gate, holder)
        assert bob.usage().heap_used < before.heap_used + 4096
        assert bob.usage().blocks_owned == before.blocks_owned
        assert holder.generation == generation


def test_what_a_request_takes_is_its_owners_share_too(gate: Gate) -> None:
    inside = [stay_inside(gate, slot, ALICE) for slot in (2, 3)]
    alice, bob = owner(gate, 4, ALICE), owner(gate, 5, BOB)
    for functions in (alice, bob):
        functions.deploy("echo", wasm.echo(1000))
    large = bytes(12 << 20)
    with pytest.raises(teemate.LimitReached):
        alice.invoke("echo", large)
    assert alice.invoke("echo", large[:1000]) == bytes(1000)
    assert bob.invoke("echo", large) == bytes(1000)
    assert bob.invoke("echo", large) == bytes(1000)  # the first is counted no longer
    assert len(inside) == 2


def test_a_request_that_is_longer_than_any_may_be_is_not_copied_in(gate: Gate) -> None:
    holder = gate.assign(2, uid=ALICE)
    assert holder.call(b"empty", bytes(16 << 20)) == (OK, b"")
    assert holder.call(b"empty", bytes(17 << 20)) == (ARGUMENT, b"")


def test_who_finds_not_even_room_to_begin_in_meets_the_limit(gate: Gate) -> None:
    bob = owner(gate, 7, BOB)
    before = bob.usage()
    inside = [stay_inside(gate, slot, ALICE) for slot in (2, 3)]
    owner(gate, 4, ALICE).deploy("small", wasm.echo(1000))
    alice = owner(gate, 5, ALICE)
    half = before.heap // 2
    left = half - (bob.usage().heap_used - before.heap_used)
    with pytest.raises(FunctionLimit) as caught:
        alice.invoke("small", bytes(left - (40 << 10)))  # less than the engine's first step is left
    assert caught.value.limit == "heap"
    assert alice.invoke("small", b"x") == b"x"
    assert len(inside) == 2


def logged(gate: Gate) -> list[int]:
    """Numbers of the invocations whose logs are there after somebody was killed as the fifth was written."""
    holder = gate.assign(2, uid=ALICE)
    alice = functions_of(holder)
    alice.deploy("writes", wasm.printing(b"", errors=b"x" * 16_384))
    for _ in range(4):
        alice.invoke("writes")
    assert len(alice.logs("writes")) == 4  # as many as fit
    call = leave_inside(gate, holder, "writes")
    kill(gate, holder)
    assert call.capacity
    return [log.invocation for log in owner(gate, 3, ALICE).logs("writes")]


def test_logs_are_never_more_than_fit_whoever_dies(
    images: Images, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Gate(weakened(images, tmp_path_factory.mktemp("staying"), STAY_IN_LOG)) as gate:
        assert logged(gate) == [2, 3, 4, 5]


def test_who_makes_room_for_a_log_too_late_is_found(careless: BuiltImage) -> None:
    with Gate(careless) as gate:
        assert logged(gate) == [1, 2, 3, 4]  # the fifth does not fit


def test_of_modules_that_are_ready_the_oldest_makes_room(gate: Gate) -> None:
    holder = gate.assign(2, uid=ALICE)
    alice = functions_of(holder)
    for number in range(9):
        alice.deploy(f"function-{number}", wasm.printing(bytes([number])))

    def is_ready(number: int) -> bool:
        call = wire.invoke(f"function-{number}", b"", (), None, None)
        status, reply = holder.call(b"invoke", call, wire.room_for(1 << 20))
        assert status == OK
        return reply[40] == 1  # fn_result.warm

    assert [is_ready(number) for number in range(8)] == [False] * 8
    assert [is_ready(number) for number in range(8)] == [True] * 8
    assert not is_ready(8)
    assert [is_ready(number) for number in range(1, 9)] == [True] * 8
    assert not is_ready(0)


def test_the_limit_of_time_is_the_enclaves_clock(gate: Gate) -> None:
    alice = owner(gate, 2, ALICE)
    endless = wasm.command(wasm.ENDLESS)
    alice.deploy("endless", endless, limits=FunctionLimits(fuel=20_000_000, time=5))
    with pytest.raises(FunctionLimit) as caught:
        alice.invoke("endless")
    assert caught.value.limit == "fuel"  # nobody tells the time here: it stands still
