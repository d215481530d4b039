"""The database's page cache: who dies in it at any instruction leaves whole pages, or none."""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from backends import sim_only
from crash_operations import FULL, numbers
from crash_world import World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import ENCLAVES, Images
from stepping import Outcome, Stepper

from teemate.image import LayoutOptions, SigParams, build_elf, layout_image, sign_with_key

HERE = Path(__file__).resolve().parent
SMALL = ("CACHE_RECORD_MOST=40u", "CHUNK_FRAMES=4u")
PLACES, TAGS = 160, 4
"""More places than there are frames."""

CacheMaker = Callable[..., tuple[Path, Path]]
stepped = sim_only(
    "hardware keeps a debugger's trap flag out of release enclaves; the cache's code is the same"
)


@pytest.fixture(scope="module")
def make_cache(images: Images, tmp_path_factory: pytest.TempPathFactory) -> CacheMaker:
    """Build cache_frames.c, with a hole or without."""
    folder = tmp_path_factory.mktemp("cache")

    def make(*holes: str) -> tuple[Path, Path]:
        stem = folder / "-".join(("cache", *holes))
        elf, sgxs, sigstruct = (stem.with_suffix(end) for end in (".elf", ".sgxs", ".sig"))
        if not elf.exists():
            source = HERE / "cache_frames.c"
            defines = (*SMALL, *holes)
            build_elf([source], elf, defines=defines, includes=[ENCLAVES / "db"], objects_kept=folder)
            built = layout_image(elf, sgxs, LayoutOptions(slots=3, stack=16 << 10, heap=64 << 10))
            unsigned = SigParams().unsigned(built.mrenclave)
            sigstruct.write_bytes(sign_with_key(unsigned, images.key).to_bytes())
        return sgxs, sigstruct

    return make


class Seen(NamedTuple):
    """What is left when a slot was repaired; any page that is there is right, or :meth:`look` says so."""

    claimed: int
    owned: int


class CacheWorld(World):
    """The enclave of cache_frames.c, looked at from another slot."""

    def ask(self, name: str, *arguments: int) -> tuple[int, ...]:
        """Make one call as the observer."""
        result = self.observer.call(name, numbers(*arguments))
        assert result.status == 0, (name, result.status)
        return struct.unpack(f"<{len(result.out) // 8}Q", result.out)

    def look(self) -> Seen:  # type: ignore[override]
        """See that every page that is found is whole, and that the cache still takes new ones."""
        _, wrong, claimed, owned = self.ask("look", PLACES, TAGS)
        assert not wrong, f"{wrong} pages are not what they have to be"
        self.ask("put", 1, 3)
        assert self.ask("get", 1, 3) == (1,)
        return Seen(claimed, owned)


OPERATIONS = {
    "another version of a page": ([("put", numbers(1, 1))], ("put", numbers(1, 2))),
    "a page in another's place": ([("fill", numbers(10, 150))], ("put", numbers(2, 1))),
}
if FULL:
    # Each byte that is cleared in a new block of the heap is one more state.
    OPERATIONS["the first page of all"] = ([], ("put", numbers(2, 1)))


def step(world: CacheWorld, operation: str, *, kills: tuple[int, ...] = ()) -> Outcome:
    before, call = OPERATIONS[operation]
    world.ask("empty")  # who looks is known from here on
    saved = world.save()
    try:
        return Stepper(world, before, call).run(every=FULL, kills=kills)
    finally:
        world.put_back(saved)


@stepped
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_death_at_any_instruction_of_filling_leaves_whole_pages(
    operation: str, make_cache: CacheMaker, stepping: ctypes.CDLL
) -> None:
    kills = tuple(random.sample(range(1 << 20), 50 if FULL else 2))
    with CacheWorld(*make_cache(), stepping) as world:
        outcome = step(world, operation, kills=kills)
    assert not outcome.wrong, outcome.wrong[:5]
    assert outcome.instructions > 300
    assert outcome.examined >= (outcome.instructions if FULL else 20)


@stepped
@pytest.mark.parametrize("hole", ["DB_TEST_PUBLISH_FIRST", "KEEP_CLAIMS"])
def test_without_its_order_or_its_resets_the_same_deaths_leave_damage(
    hole: str, make_cache: CacheMaker, stepping: ctypes.CDLL
) -> None:
    with CacheWorld(*make_cache(hole), stepping) as world:
        assert step(world, "another version of a page").wrong


@stepped
def test_a_page_that_is_replaced_while_it_is_copied_is_not_taken_for_whole(
    make_cache: CacheMaker, stepping: ctypes.CDLL
) -> None:
    with CacheWorld(*make_cache(), stepping) as world:
        assert world.ask("replaced") == (0, 1)
    with CacheWorld(*make_cache("DB_TEST_NO_SECOND_LOOK"), stepping) as world:
        assert world.ask("replaced") == (2, 1)


@pytest.fixture(scope="module")
def filled(make_cache: CacheMaker, stepping: ctypes.CDLL) -> Iterator[CacheWorld]:
    with CacheWorld(*make_cache(), stepping) as world:
        yield world


@stepped
@settings(max_examples=40, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    puts=st.lists(st.tuples(st.integers(0, PLACES - 1), st.integers(1, TAGS - 1)), min_size=1, max_size=80)
)
def test_only_the_version_that_was_put_last_is_found(filled: CacheWorld, puts: list[tuple[int, int]]) -> None:
    filled.ask("drop")
    assert filled.ask("look", PLACES, TAGS)[0] == 0
    filled.ask("put", *(number for put in puts for number in put))
    last = dict(puts)
    found = {
        (place, tag)
        for place in range(PLACES)
        for tag in range(1, TAGS)
        if place in last and filled.ask("get", place, tag) == (1,)
    }
    assert found == set(last.items())  # there is room for all of them


@stepped
def test_a_full_cache_stays_full_and_within_its_limit(filled: CacheWorld) -> None:
    filled.ask("fill", 0, PLACES)
    frames, limit, size = filled.ask("frames")
    assert size <= limit < size + 1024
    assert frames * 9 // 10 < filled.ask("look", PLACES, TAGS)[0] <= frames < PLACES
    assert filled.ask("get", PLACES - 1, 1) == (1,)
