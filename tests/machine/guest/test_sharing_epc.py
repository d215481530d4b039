"""The EPC of an enclave is paid for once, however many map it, and is free when the last one has gone.

Linux 6.1 tells how much EPC there is and not how much of it is free.  But what does not fit is evicted into
shared memory, which /proc/meminfo counts (arch/x86/kernel/cpu/sgx/main.c, sgx_reclaim_pages: EWB writes to
the enclave's shmem file).  So: where everything is paid for once, it all fits and nothing is evicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from images import BuiltImage, Images
from sharing import (
    DEVICE,
    PROT_READ,
    PROT_WRITE,
    Raw,
    Stranger,
    epc_size,
    restrict,
    swapped,
    touch,
)

pytestmark = pytest.mark.skipif(
    not DEVICE.exists(), reason=f"no {DEVICE} here: tests/machine/run boots a machine that has it"
)

RW = PROT_READ | PROT_WRITE
MIB = 1 << 20
SHARERS = 4
NOISE = MIB
"""Bytes of shared memory that may come and go for other reasons."""


@pytest.fixture(scope="module")
def heap() -> int:
    """So large that two enclaves fit the EPC and three do not."""
    return epc_size() * 2 // 5 // MIB * MIB


@pytest.fixture(scope="module")
def image(images: Images, heap: int) -> BuiltImage:
    return images.build("raw", heap=f"{heap // MIB}M")


@pytest.fixture
def raw(image: BuiltImage) -> Iterator[Raw]:
    with Raw.create(image) as raw:
        yield raw.map()


def touch_heap(raw: Raw) -> None:
    part = raw.geometry.part(RW)
    touch(raw.geometry.base + part.offset, part.size)


def test_enclaves_that_do_not_fit_together_are_evicted_and_that_is_seen(image: BuiltImage, heap: int) -> None:
    """The control of all the others: the measure rises when there is too little EPC."""
    with ExitStack() as enclaves:
        before = swapped()
        for _ in range(2):
            touch_heap(enclaves.enter_context(Raw.create(image)).map())
        assert swapped() - before < NOISE
        touch_heap(enclaves.enter_context(Raw.create(image)).map())
        assert swapped() - before > 3 * heap - epc_size() - NOISE
    assert swapped() - before < NOISE


def test_the_pages_of_an_enclave_are_counted_once_however_many_map_it(
    raw: Raw, image: BuiltImage, heap: int
) -> None:
    part = raw.geometry.part(RW)
    before = swapped()
    with ExitStack() as strangers:
        for _ in range(SHARERS):
            stranger = strangers.enter_context(Stranger(raw))
            stranger.do("touch", offset=part.offset, size=part.size)
        touch_heap(raw)
        # As much again still fits beside it, so the five mappings hold one enclave's worth.
        with Raw.create(image) as other:
            touch_heap(other.map())
            assert swapped() - before < NOISE
    assert SHARERS * heap > epc_size()


def test_when_the_last_one_is_gone_the_epc_is_free_again(image: BuiltImage, heap: int) -> None:
    before = swapped()
    for _ in range(4):
        with Raw.create(image) as first, Raw.create(image) as second:
            touch_heap(first.map())
            touch_heap(second.map())
    assert swapped() - before < NOISE


def test_one_leaked_mapping_keeps_it_all(image: BuiltImage, heap: int) -> None:
    before = swapped()
    with Stranger() as leaker:
        with Raw.create(image) as leaked:
            leaker.give(leaked)
        with Raw.create(image) as first:
            touch_heap(first.map())
            with Raw.create(image) as second:
                touch_heap(second.map())
                assert swapped() - before > 3 * heap - epc_size() - NOISE
        # Killed, not closed: its mapping goes with it.
        leaker.kill()
    with Raw.create(image) as first, Raw.create(image) as second:
        middle = swapped()
        touch_heap(first.map())
        touch_heap(second.map())
        assert swapped() - middle < NOISE


def test_two_programs_ioctls_at_once_make_one_of_them_busy(raw: Raw) -> None:
    """SGX-FACTS: one ioctl at a time; the other one gets EBUSY without waiting."""
    part = raw.geometry.part(RW)
    with Stranger(raw) as stranger:
        where = {"offset": part.offset, "length": part.size}
        stranger.start("restrict_until_busy", **where, permissions=3, rounds=1000)
        seen = set()
        while not stranger.answered():
            seen.add(restrict(raw.fd, part.offset, part.size, 3)[0])
        seen |= set(stranger.answer())
    assert seen == {0, 16}
