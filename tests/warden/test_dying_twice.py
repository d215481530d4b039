"""Deaths that meet: of a client and the warden that repairs it, of two clients one of whom has the heap."""

from __future__ import annotations

import itertools
import random

import warden_wire as wire
from backends import sim_only
from crash_operations import FULL, OPERATIONS, numbers
from crash_world import GENERATION, OTHER, VICTIM, World
from stepping import Child, Stepper, walk

BUSY = -8
NEXT_KEY = b"another key here"
NOBODY = 1 << 23
"""A number that no process has: PID_MAX_LIMIT is half of it."""
OF_A_WARDEN = 0x80000000
"""In the holder of a TCS's word (SIM_WARDEN, native/lib/sim.h)."""

pytestmark = sim_only(
    "hardware keeps a debugger's trap flag out of release enclaves; the gate's code is the same"
)


def test_a_warden_killed_at_any_instruction_of_reset_is_replaced_by_one_that_ends_it(world: World) -> None:
    """The client died with a redo record, a lock and two blocks to be freed; so does the warden, then."""
    saved = world.save()
    stepper = Stepper(world, *OPERATIONS["put over a value"])
    done_from = stepper.run().done_from
    assert done_from is not None
    stepper.leave_dead(done_from)
    world.take_over()
    world.clear_and_repair(VICTIM)
    repaired, wrong, examined, number = world.save(), [], 0, 0
    stride = 1 if FULL else 4
    offset = random.randrange(stride)

    def die(instruction: int) -> bool:
        nonlocal examined, number
        number += 1
        if number % stride == offset:
            examined += 1
            world.take_over()
            world.enclave.set_tcs_word(0, world.enclave.tcs_word(0) & 0xFFFFFFFF | NOBODY << 32)
            world.renew_warden()
            world.control(wire.RESET, VICTIM)
            if (state := world.look()) != stepper.states[1]:
                wrong.append(f"instruction {instruction}: {state} is not {stepper.states[1]}")
        return len(wrong) < 5

    world.put_back(repaired)
    with Child.warden(world, wire.RESET, VICTIM) as warden:
        length = walk(world, warden, world.ranges(0, VICTIM), die)
    world.put_back(saved)
    world.renew_warden()
    print(f"RESET: {length} instructions, examined at {examined} from {offset} by {stride}")
    assert not wrong, wrong
    assert length > 1000
    assert examined > 10


def test_a_warden_killed_at_any_instruction_of_undoing_a_call_is_replaced_by_one_that_ends_it(
    world: World,
) -> None:
    """The client had died in the middle of a call, or lives and stands at its AEP; the warden dies, too."""
    saved = world.save()
    stepper = Stepper(world, *OPERATIONS["put over a value"])
    done_from = stepper.run().done_from
    assert done_from is not None
    stepper.leave_dead(done_from)
    world.take_over()
    world.control(wire.CLEAR, VICTIM, generation=GENERATION)
    world.enclave.set_tcs_word(VICTIM, 1 << 8)  # as an interrupt would have left it
    interrupted, wrong, examined, number = world.save(), [], 0, 0
    stride = 4 if FULL else 32
    offset = random.randrange(stride)
    alive = itertools.cycle([False, True])

    def die(instruction: int) -> bool:
        nonlocal examined, number
        number += 1
        if number % stride == offset:
            examined += 1
            world.take_over()
            word = world.enclave.tcs_word(VICTIM) & 0xFFFFFFFF
            assert word == 1 << 8 | 1, "the warden is inside, above the frame of the client"
            world.enclave.set_tcs_word(VICTIM, word | (OF_A_WARDEN | NOBODY) << 32)
            reply = world.warden.repair(VICTIM, GENERATION, dead=not next(alive))
            if (reply.entered, reply.status, reply.result.cssa) != (1, 0, 2):
                wrong.append(f"instruction {instruction}: {reply.status} {reply.text!r}")
            world.control(wire.RESET, VICTIM)
            if (state := world.look()) != stepper.states[1]:
                wrong.append(f"instruction {instruction}: {state} is not {stepper.states[1]}")
        return len(wrong) < 5

    world.put_back(interrupted)
    with Child.unwinding(world, VICTIM) as warden:
        length = walk(world, warden, world.ranges(0), die, every=True)
    world.put_back(saved)
    print(f"undoing: {length} instructions, examined at {examined} from {offset} by {stride}")
    assert not wrong, wrong
    assert length > 500
    assert examined > 10


def leave_two_dead(world: World) -> None:
    """One who owned blocks, and one who had the heap's lock; the first one's slot has its next key."""
    calls = [("empty", b""), ("take", numbers(48, 100, 200))]
    world.put_back(world.save())
    with Child.client(world, VICTIM, calls, traced=False) as owner:
        owner.finish()
    with Child.client(world, OTHER, calls) as holder:
        walk(world, holder, world.ranges(OTHER), lambda _: not world.heap_is_locked())
    world.take_over()
    assert world.heap_is_locked()
    world.bury_and_repair(VICTIM)
    world.control(wire.ARM, VICTIM, generation=GENERATION + 1, key=NEXT_KEY)
    world.clear_and_repair(OTHER)


def test_blocks_of_the_dead_are_freed_though_another_dead_one_has_the_heaps_lock(world: World) -> None:
    """Whose slot is repaired first cannot have the lock; the next repair frees what that one gave up."""
    saved = world.save()
    leave_two_dead(world)
    world.control(wire.RESET, OTHER)
    state = world.look()
    world.put_back(saved)
    assert (state.owned, state.used) == (0, world.look().used)


def test_what_the_next_holder_owns_is_not_taken_for_what_the_one_before_gave_up(world: World) -> None:
    """It takes blocks while the warden that frees the others dies, at any instruction, and is replaced."""
    saved = world.save()
    empty = world.look()
    leave_two_dead(world)
    assert world.observer.call("patience", numbers(0)).status == 0
    cleared, between, taken, refused, wrong, number = world.save(), 0, 0, 0, [], 0
    stride = 2 if FULL else 12
    offset = random.randrange(stride)

    def die(instruction: int) -> bool:
        nonlocal between, taken, refused, number
        number += 1
        between += (searched := world.heap_is_to_be_searched())
        if searched or number % stride == offset:
            world.take_over()
            world.enclave.set_tcs_word(0, world.enclave.tcs_word(0) & 0xFFFFFFFF | NOBODY << 32)
            holder = world.client.slot(index=VICTIM, generation=GENERATION + 1, key=NEXT_KEY)
            status = holder.call("take", numbers(48, 100)).status
            taken, refused = taken + (status == 0), refused + (status == BUSY)
            world.renew_warden()
            world.control(wire.RESET, OTHER)
            if (owned := world.look().owned) != (2 if status == 0 else 0):
                wrong.append(f"instruction {instruction}: {owned} blocks are owned after {status}")
            assert holder.call("give", numbers(0, 1)).status == 0
            holder.close()
            if (used := world.look().used) != empty.used:
                wrong.append(f"instruction {instruction}: {used} bytes are used, and not {empty.used}")
        return len(wrong) < 5

    world.put_back(cleared)
    with Child.warden(world, wire.RESET, OTHER) as warden:
        walk(world, warden, world.ranges(0, OTHER), die)
    world.put_back(saved)
    world.renew_warden()
    print(
        f"blocks taken {taken} times, {between} of these while there were some to be found; refused {refused}"
    )
    assert not wrong, wrong
    assert between > 0
