"""Moulds: a module is made ready once, and copied; what is ready in a slot is its holder's."""

from __future__ import annotations

from collections.abc import Iterator

import modules as wasm
import pytest
from function_enclaves import OK, Gate, Holder, functions_of, installed, owner, weakened
from images import BuiltImage, Images

from teemate.functions import FunctionLimit, FunctionLimits
from teemate.functions import _wire as wire

ALICE, BOB = 1001, 1002
MANY = [wasm.i32(number) + wasm.DROP for number in range(3_000)]


@pytest.fixture
def gate() -> Iterator[Gate]:
    with Gate(installed()) as gate:
        yield gate


@pytest.fixture(scope="module")
def careless(images: Images, tmp_path_factory: pytest.TempPathFactory) -> BuiltImage:
    """The image that makes no moulds, and does not scrub slots."""
    return weakened(images, tmp_path_factory.mktemp("careless"), "TM_TEST_NO_MOULDS", "TM_TEST_NO_SCRUB")


def constants(gate: Gate) -> bytes:
    """A command whose numbers look like addresses of the heap, of which it writes out all, twice."""
    base = gate.base
    words = [base + (at << 16) + at for at in range(32)]
    code = b"".join(wasm.i32(8 * at) + wasm.i64(word) + wasm.I64_STORE for at, word in enumerate(words))
    halves = [part for word in words for part in (word & 0xFFFFFFFF, word >> 32)]
    code += b"".join(
        wasm.i32(256 + 4 * at) + wasm.i32(half) + wasm.I32_STORE for at, half in enumerate(halves)
    )
    return wasm.command(code + wasm.write(1, 0, 512))


def corpus(gate: Gate) -> dict[str, bytes]:
    calls = b"".join(wasm.call(wasm.START + 1 + number) for number in (0, 7, 2_999))
    indirect = wasm.i32(3) + b"\x11" + wasm.leb(12) + b"\x00"
    return {
        "printing": wasm.printing(b"text", errors=b"errors"),
        "echo": wasm.echo(),
        "many": wasm.command(calls + wasm.write(1, 0, 9), data=b"some data", functions=MANY),
        "table": wasm.command(
            indirect + wasm.write(1, 5, 2), table=8, functions=[b"", b"", wasm.write(1, 0, 4)]
        ),
        "fails": wasm.printing(b"", errors=b"said", code=0),
        "constants": constants(gate),
    }


def outcomes(gate: Gate) -> tuple[dict[str, tuple[bytes, ...]], dict[str, int], int]:
    """What each module writes, twice in two slots; what fuel that takes; how large the moulds are."""
    slots = [owner(gate, 2, ALICE), owner(gate, 3, ALICE)]
    found: dict[str, tuple[bytes, ...]] = {}
    for name, module in corpus(gate).items():
        slots[0].deploy(name, module)
        found[name] = tuple(slot.invoke(name, b"payload") for slot in slots for _ in range(2))
    fuel = {info.name: info.fuel for info in slots[0].list()}
    return found, fuel, slots[0].usage().moulds


def test_what_comes_from_a_mould_is_what_the_engine_makes(careless: BuiltImage) -> None:
    with Gate(installed()) as gate:
        written, fuel, moulds = outcomes(gate)
    with Gate(careless) as gate:
        assert outcomes(gate)[1] == fuel
    for name, results in written.items():
        assert len(set(results)) == 1, name
    assert written["many"][0] == b"some data"
    assert written["constants"][0][:256] == written["constants"][0][256:] != bytes(256)
    assert moulds > 100_000


def test_every_module_has_a_mould_which_goes_with_it(gate: Gate) -> None:
    watcher, holder = owner(gate, 3, BOB), gate.assign(2, uid=ALICE)
    before = watcher.usage()
    alice = functions_of(holder)
    for name, module in corpus(gate).items():
        had = alice.usage().moulds
        alice.deploy(name, module)
        more = alice.usage().moulds - had
        assert more > 0, name
        alice.deploy(name, module, replace=True)
        assert alice.usage().moulds == had + more
    for name in corpus(gate):
        alice.remove(name)
    assert alice.usage().moulds == 0
    gate.release(holder)
    assert watcher.usage() == before


def test_without_moulds_there_are_none(careless: BuiltImage) -> None:
    with Gate(careless) as gate:
        alice = owner(gate, 2, ALICE)
        alice.deploy("echo", wasm.echo())
        assert (alice.invoke("echo", b"x"), alice.usage().moulds) == (b"x", 0)


def test_moulds_are_bounded_and_what_has_none_runs_all_the_same(gate: Gate) -> None:
    alice, bob = owner(gate, 2, ALICE), owner(gate, 3, BOB)
    bound = alice.usage().heap // 16
    sizes = []
    for number in range(28):
        alice.deploy(
            f"function-{number}",
            wasm.command(wasm.write(1, number, 1), data=bytes(range(28)), functions=MANY),
        )
        sizes.append(alice.usage().moulds)
    assert sizes[0] < sizes[1]
    assert sizes[-1] == sizes[-2] <= bound
    for number in (0, 27):
        assert alice.invoke(f"function-{number}") == bytes([number])
    bob.deploy("his", wasm.command(b"", functions=MANY))
    assert bob.usage().moulds > 0


def test_a_killed_clients_copies_go_with_its_slot(gate: Gate) -> None:
    watcher = owner(gate, 3, BOB)
    holder = gate.assign(2, uid=ALICE)
    alice = functions_of(holder)
    alice.deploy("many", corpus(gate)["many"])
    deployed = watcher.usage()
    assert alice.invoke("many") == b"some data"
    assert watcher.usage().blocks_owned > deployed.blocks_owned
    gate.release(holder)
    left = watcher.usage()
    assert left.blocks_owned == 0
    assert left.heap_used <= deployed.heap_used


def is_ready(holder: Holder, name: str) -> bool:
    """Invoke the function: was its module ready in the slot?"""
    status, reply = holder.call(b"invoke", wire.invoke(name, b"", (), None, None), wire.room_for(1 << 20))
    assert status == OK
    return reply[40] == 1  # fn_result.warm


def two_holders(gate: Gate) -> None:
    """What is ready for one holder of a slot is not for the next one."""
    first = gate.assign(2, 1, uid=ALICE)
    functions_of(first).deploy("echo", wasm.echo())
    assert [is_ready(first, "echo") for _ in range(2)] == [False, True]
    gate.release(first)
    assert not is_ready(gate.assign(2, 2, uid=ALICE), "echo")


def test_a_slots_next_holder_finds_nothing_ready(gate: Gate) -> None:
    two_holders(gate)


def test_a_slot_that_is_not_scrubbed_is_found(careless: BuiltImage) -> None:
    with Gate(careless) as gate, pytest.raises(AssertionError):
        two_holders(gate)


def test_a_module_from_a_mould_meets_its_limits(gate: Gate) -> None:
    alice = owner(gate, 2, ALICE)
    alice.deploy("endless", wasm.command(wasm.ENDLESS), limits=FunctionLimits(fuel=1_000_000))
    for _ in range(2):
        with pytest.raises(FunctionLimit) as caught:
            alice.invoke("endless")
        assert caught.value.limit == "fuel"
