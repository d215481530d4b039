"""The enclave's heap against a model, and its check."""

from __future__ import annotations

import struct

from gate import OK, Holder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FREE, ALLOCATE, KEEP, EXTEND = 0, 1, 2, 3

sizes = st.one_of(st.integers(0, 200), st.integers(0, 20_000), st.sampled_from([1 << 19, 1 << 20, 1 << 40]))
steps = st.lists(
    st.tuples(st.sampled_from([FREE, ALLOCATE, ALLOCATE, KEEP, EXTEND]), st.integers(0, 63), sizes),
    min_size=1,
    max_size=60,
)


def script(steps: list[tuple[int, int, int]]) -> bytes:
    return b"".join(struct.pack("<QQQ", *step) for step in steps)


def run(holder: Holder, steps: list[tuple[int, int, int]]) -> tuple[int, ...]:
    """Allocated in this script, then size, used, blocks, free blocks, largest free, owned."""
    status, reply = holder.call(b"heap", script(steps))
    assert status == OK
    return struct.unpack("<7Q", reply)


def free_all(holder: Holder) -> tuple[int, ...]:
    return run(holder, [(FREE, handle, 0) for handle in range(64)])


@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])
@given(scripts=st.lists(steps, min_size=1, max_size=4))
def test_blocks_do_not_overlap_and_all_memory_comes_back(
    holder: Holder, scripts: list[list[tuple[int, int, int]]]
) -> None:
    empty = free_all(holder)
    live: dict[int, tuple[int, int]] = {}
    for steps_ in scripts:
        for operation, handle, size in steps_:
            if operation == EXTEND:  # as large as that, or as it was: no more
                if handle in live and size < 1 << 18:
                    live[handle] = (live[handle][0], max(live[handle][1], size))
                continue
            live.pop(handle, None)
            if operation != FREE and size < 1 << 18:
                live[handle] = (operation, size)
        told = run(holder, steps_)
        assert told[1] == empty[1]
        if max((size for _, size in live.values()), default=0) < 10_000 and len(live) < 40:
            # All of that fits: then it is there, and no more than its headers beside it.
            expected = sum(size for _, size in live.values())
            assert expected <= told[2] - empty[2] + 24 * len(steps_) + 48
    again = free_all(holder)
    assert again[2:] == empty[2:]


def test_what_is_kept_is_nobodys_own(holder: Holder) -> None:
    before = free_all(holder)
    told = run(holder, [(KEEP, 1, 100), (ALLOCATE, 2, 100), (KEEP, 3, 100)])
    assert told[0] == 3
    assert told[3] - before[3] == 3
    assert told[6] - before[6] == 1
    assert free_all(holder)[2:] == before[2:]


def test_freed_neighbours_become_one_block(holder: Holder) -> None:
    before = free_all(holder)
    run(holder, [(ALLOCATE, handle, 1000) for handle in range(8)])
    told = run(holder, [(FREE, handle, 0) for handle in (1, 3, 5, 7, 2, 6, 4, 0)])
    assert told[4:6] == before[4:6]


def test_a_block_is_zeroes_whatever_was_there_before(holder: Holder) -> None:
    free_all(holder)
    for size in (24, 1000, 200_000):  # filled, freed, and looked at when it is given out again
        assert run(holder, [(ALLOCATE, 1, size), (FREE, 1, 0), (ALLOCATE, 2, size), (FREE, 2, 0)])[0] == 2


def test_a_block_grows_into_the_free_one_behind_it(holder: Holder) -> None:
    before = free_all(holder)
    some = [(ALLOCATE, handle, 1000) for handle in range(4)]
    run(holder, some)
    assert run(holder, [(EXTEND, 1, 2000)])[0] == 0  # the third lies behind it
    for size in (1016, 1024, 1500, 2000):
        assert run(holder, [(FREE, 2, 0), (EXTEND, 1, size)])[0] == 1
    assert run(holder, [(EXTEND, 1, 2100)])[0] == 0  # the fourth
    assert run(holder, [(FREE, 3, 0), (EXTEND, 1, 1 << 62), (EXTEND, 1, 300_000)])[0] == 1
    assert free_all(holder)[2:] == before[2:]


def test_a_full_heap_refuses_and_goes_on(holder: Holder) -> None:
    free_all(holder)
    told = run(holder, [(ALLOCATE, handle, 100_000) for handle in range(12)])
    assert 0 < told[0] < 12
    assert run(holder, [(ALLOCATE, 63, 1 << 62)])[0] == 0
    free_all(holder)
    assert run(holder, [(ALLOCATE, 1, 100_000)])[0] == 1


def test_a_payload_that_the_heap_cannot_hold_is_refused(holder: Holder) -> None:
    assert holder.call(b"echo", bytes(2 << 20))[0] == -6
    assert holder.call(b"echo", b"fine") == (OK, b"fine")
