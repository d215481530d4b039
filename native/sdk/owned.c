/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whose a block is, and what becomes of it when its slot's holder is gone.
 *
 * Each slot lists the blocks that it owns in its thread data; an entry is written
 * and taken away by the same tm_txn as the block's owner, so list and heap agree at
 * every instruction.  Only the slot's own thread changes the list, and whoever repairs
 * the slot, or makes something ready in it before it has a holder: a block of another slot's can be neither freed
 * nor kept.
 *
 * Repair frees what the list names.  Where it cannot, because somebody has the
 * heap's lock (perhaps dead himself) or the list was too short, it gives the blocks
 * up: whoever next has time and the lock searches the heap for them, a few blocks at a
 * time.  They are known by their generation, which no later holder's blocks have.
 */
#include "heap.h"

#define SLOT_BITS 16
#define PLACE_SHIFT 56 /* above the generation, which has 40 bits (control.c, ARM) */
#define PLACE(owner) ((owner) >> PLACE_SHIFT)
#define HOLDER(owner) ((owner) & ((1ull << PLACE_SHIFT) - 1))
_Static_assert(TD_OWNED < 1u << (64 - PLACE_SHIFT), "places are counted from 1");

#define WAIT_SPINS (1u << 15) /* of a warden for the heap's lock: a few ms */
#define SWEEP_STEP 256u       /* blocks looked at while others wait for the lock */
#define SWEEP_STEPS 256u      /* in one control ECALL */

/* A warden's slot has no generation of its own: what it gave up counts. */
static uint64_t generation_of(const struct thread *thread)
{
    return thread->fixed.index < TM_WARDEN_SLOTS ? thread->given_up + 1 : TM_WORD_GENERATION(thread->word);
}

static uint64_t holder_of(const struct thread *thread)
{
    return generation_of(thread) << SLOT_BITS | (thread->fixed.index + 1);
}

void owned_enter(struct tm_txn *txn, struct block *block)
{
    struct thread *self = thread_served();
    uint64_t place = 0;

    while (place < TD_OWNED && (self->owned[place] || txn_get(txn, &self->owned[place])))
        place++;
    if (place < TD_OWNED) {
        tm_txn_set(txn, &self->owned[place], (uint64_t)block);
        place++;
    } else {
        self->unlisted = 1; /* before the block is ours */
        place = 0;
    }
    tm_txn_set(txn, &block->owner, place << PLACE_SHIFT | holder_of(self));
}

static uint64_t *entry_of(struct thread *thread, uint64_t owner)
{
    return PLACE(owner) ? &thread->owned[PLACE(owner) - 1] : NULL;
}

uint64_t *owned_entry(uint64_t owner)
{
    struct thread *self = thread_served();

    tm_assert(!owner || HOLDER(owner) == holder_of(self)); /* another slot's own */
    return entry_of(self, owner);
}

void tm_txn_keep(struct tm_txn *txn, void *memory)
{
    struct block *block = heap_header(memory);
    uint64_t *entry = owned_entry(txn_get(txn, &block->owner));

    if (entry)
        tm_txn_set(txn, entry, 0);
    tm_txn_set(txn, &block->owner, 0);
}

void tm_txn_own(struct tm_txn *txn, void *memory)
{
    struct block *block = heap_header(memory);
    uint64_t owner = txn_get(txn, &block->owner);

    owned_entry(owner);
    if (!owner)
        owned_enter(txn, block);
}

static bool given_up(const struct block *block)
{
    uint64_t slot = (block->owner & ((1u << SLOT_BITS) - 1)) - 1;

    return block->owner && slot < slot_count() && HOLDER(block->owner) >> SLOT_BITS <= thread_of(slot)->given_up;
}

/*
 * The cursor before the mark: a death in between searches once more.  And the cursor
 * in every free (heap.c): its block may become part of the one before it.
 */
bool owned_sweep(void)
{
    struct block *block = (struct block *)heap.cursor;

    if (!block && !__atomic_load_n(&heap.stale, __ATOMIC_SEQ_CST))
        return false;
    if (!block) {
        block = (struct block *)heap.start;
        __atomic_store_n(&heap.cursor, (uint64_t)block, __ATOMIC_SEQ_CST);
        __atomic_store_n(&heap.stale, 0, __ATOMIC_SEQ_CST);
    }
    for (unsigned looks = 0; looks < SWEEP_STEP && (uint64_t)block != heap.end; looks++) {
        if (!(block->size & FREE_BIT) && given_up(block)) {
            __atomic_store_n(&heap.cursor, (uint64_t)block, __ATOMIC_RELEASE);
            heap_free_locked(block, NULL);
            block = (struct block *)heap.cursor;
        }
        block = block_after(block, SIZE(block));
    }
    __atomic_store_n(&heap.cursor, (uint64_t)block == heap.end ? 0 : (uint64_t)block, __ATOMIC_RELEASE);
    return true;
}

/* Which generation, then that there is something to look for, then the list. */
static void give_up(struct thread *dead)
{
    __atomic_store_n(&dead->given_up, generation_of(dead), __ATOMIC_SEQ_CST);
    __atomic_store_n(&heap.stale, 1, __ATOMIC_SEQ_CST);
    dead->unlisted = 0;
    for (uint64_t place = 0; place < TD_OWNED; place++)
        dead->owned[place] = 0;
}

static bool lock_briefly(void)
{
    int status = lock_spin(&heap.mutex, WAIT_SPINS);

    if (status == TM_E_OWNERDEAD)
        tm_mutex_consistent(&heap.mutex);
    return !status || status == TM_E_OWNERDEAD;
}

void owned_release(struct thread *dead)
{
    bool owns = dead->unlisted;

    if (!heap.end)
        return;
    for (uint64_t place = 0; place < TD_OWNED; place++)
        owns |= dead->owned[place] != 0;
#ifdef TM_TEST_NO_OWNED
    /* Test build: what the dead owned is lost. */
    memset(dead->owned, 0, sizeof(dead->owned));
    return;
#endif
    if (!owns && !heap.stale && !heap.cursor)
        return;
    if (!lock_briefly()) {
        if (owns)
            give_up(dead);
        return;
    }
    for (uint64_t place = 0; place < TD_OWNED; place++)
        if (dead->owned[place])
            heap_free_locked((struct block *)dead->owned[place], &dead->owned[place]);
    if (dead->unlisted)
        give_up(dead);
    for (unsigned steps = 1; owned_sweep() && steps < SWEEP_STEPS; steps++) {
        tm_unlock(&heap.mutex);
        if (!lock_briefly())
            return;
    }
    tm_unlock(&heap.mutex);
}
