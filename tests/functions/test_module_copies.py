"""A module is copied into a slot while others go on, and what was replaced meanwhile is never run."""

from __future__ import annotations

import modules as wasm
import pytest
from function_enclaves import ERESUME, Call, Gate, Holder, functions_of, leave_inside, names, owner, weakened
from images import Images

from teemate.functions import _wire as wire

ALICE, BOB = 1001, 1002
STAY = "TM_TEST_STAY_IN_COPY"
"""Who copies the first deployment stays in the middle of it until there is another one."""
PADDING = [b"\x01" * 50_000]


def large(text: bytes) -> bytes:
    """A module that is mostly copied, and writes `text` by what is at its end."""
    return wasm.command(wasm.write(1, 0, len(text)), data=text, functions=PADDING)


def padded(size: int, text: bytes, *, pages: int) -> bytes:
    """A module of so many bytes that become nothing by being compiled, with so much memory."""
    padding = [b"\x01" * (1 << 16)] * (size >> 16)
    return wasm.command(wasm.write(1, 0, len(text)), data=text, functions=padding, pages=pages)


def copying(gate: Gate) -> tuple[Holder, Call]:
    """Alice, who invokes `hers` and stands in the middle of the copy."""
    holder = gate.assign(2, uid=ALICE)
    functions_of(holder).deploy("hers", large(b"first "))
    return holder, leave_inside(gate, holder, "hers")


def others_go_on(gate: Gate) -> None:
    _, call = copying(gate)
    bob = owner(gate, 3, BOB)
    bob.usage()
    assert names(bob) == []
    bob.deploy("his", wasm.echo())
    assert bob.invoke("his", b"payload") == b"payload"
    assert call.capacity


def replaced_meanwhile(gate: Gate) -> bytes:
    """What Alice's invocation writes when her module is replaced in the middle of its copy, and goes."""
    holder, call = copying(gate)
    alice = owner(gate, 3, ALICE)
    alice.deploy("hers", large(b"second"), replace=True)
    alice.deploy("other", large(b"other "))  # where the first one was
    left = gate.enter(holder.slot, bytes(16), function=ERESUME)
    return wire.stdout(call.output(left.length)) if not left.status else b""


def test_others_go_on_while_a_module_is_copied_and_what_is_replaced_is_not_run(
    images: Images, tmp_path_factory: pytest.TempPathFactory
) -> None:
    image = weakened(images, tmp_path_factory.mktemp("staying"), STAY)
    with Gate(image) as gate:
        others_go_on(gate)
    with Gate(image) as gate:
        assert replaced_meanwhile(gate) == b"second"


def test_what_a_copy_that_came_to_nothing_took_is_its_owners_again(
    images: Images, tmp_path_factory: pytest.TempPathFactory
) -> None:
    image = weakened(images, tmp_path_factory.mktemp("small"), STAY, heap=16 << 20)
    with Gate(image) as gate:  # 8 MiB are Alice's; and both copies and the memory are more
        holder = gate.assign(2, uid=ALICE)
        functions_of(holder).deploy("hers", padded(3 << 20, b"first ", pages=1))
        call = leave_inside(gate, holder, "hers")
        owner(gate, 3, ALICE).deploy("hers", padded(2 << 20, b"second", pages=56), replace=True)
        left = gate.enter(holder.slot, bytes(16), function=ERESUME)
        assert left.status == 0
        assert wire.stdout(call.output(left.length)) == b"second"


def test_a_copy_that_others_wait_for_is_found(
    request: pytest.FixtureRequest, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("compiles another enclave: pytest --full tests/functions")
    image = weakened(images, tmp_path_factory.mktemp("locked"), STAY, "TM_TEST_COPY_LOCKED")
    with Gate(image) as gate, pytest.raises(AssertionError):
        others_go_on(gate)


def test_a_copy_that_is_believed_unseen_is_found(
    images: Images, tmp_path_factory: pytest.TempPathFactory
) -> None:
    image = weakened(images, tmp_path_factory.mktemp("unchecked"), STAY, "TM_TEST_COPY_UNCHECKED")
    with Gate(image) as gate:
        assert replaced_meanwhile(gate) != b"second"
