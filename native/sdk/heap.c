/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The heap: two-level segregated fit (Masmano et al., "TLSF", ECRTS 2004) with
 * every operation committed as one redo record (tm_txn), so that a death at any
 * instruction leaves the heap before or after it.
 */
#include "heap.h"

#define EXACT_LOOKS 8u
#define AROUND 16384u /* a part of the 64 KiB that Linux takes, aligned as these are */

struct heap heap;

static unsigned msb(uint64_t value)
{
    return 63u - (unsigned)__builtin_clzll(value);
}

void heap_classify(uint64_t size, unsigned *class, unsigned *step)
{
    unsigned power = msb(size);

    *class = power - FIRST_CLASS;
    *step = (unsigned)(size >> (power - 4)) & (STEPS - 1);
}

static void unlink_free(struct tm_txn *txn, struct free_block *block, uint64_t size)
{
    struct free_block *next = (void *)txn_get(txn, &block->next);
    struct free_block *previous = (void *)txn_get(txn, &block->previous);
    unsigned class, step;

    heap_classify(size, &class, &step);
    if (next)
        tm_txn_set_ptr(txn, &next->previous, previous);
    if (previous) {
        tm_txn_set_ptr(txn, &previous->next, next);
        return;
    }
    tm_txn_set_ptr(txn, &heap.lists[class][step], next);
    if (!next) {
        uint64_t steps = txn_get(txn, &heap.step_map[class]) & ~(1ull << step);

        tm_txn_set(txn, &heap.step_map[class], steps);
        if (!steps)
            tm_txn_set(txn, &heap.map, txn_get(txn, &heap.map) & ~(1ull << class));
    }
}

static void link_free(struct tm_txn *txn, struct free_block *block, uint64_t size)
{
    struct free_block *head;
    unsigned class, step;

    heap_classify(size, &class, &step);
    head = (void *)txn_get(txn, &heap.lists[class][step]);
    tm_txn_set_ptr(txn, &block->next, head);
    tm_txn_set_ptr(txn, &block->previous, NULL);
    if (head)
        tm_txn_set_ptr(txn, &head->previous, block);
    tm_txn_set_ptr(txn, &heap.lists[class][step], block);
    tm_txn_set(txn, &heap.step_map[class], txn_get(txn, &heap.step_map[class]) | 1ull << step);
    tm_txn_set(txn, &heap.map, txn_get(txn, &heap.map) | 1ull << class);
    txn_add(txn, &block->block.size, size | FREE_BIT);
    txn_add(txn, &block->block.magic, FREE_MAGIC);
    txn_add(txn, &block->block.owner, 0);
}

/* Once; a death in between starts over, since `end` is written last. */
void heap_start(void)
{
    struct free_block *first = (void *)(enclave_base() + header()->heap_offset);
    uint64_t size = header()->heap_size & ~15ull;
    struct block *last;
    struct tm_txn txn;

    if (heap.end || size < 4096)
        return;
    size -= sizeof(*last);
    last = block_after(&first->block, size);
    last->size = sizeof(*last);
    last->before = size;
    last->owner = 0;
    last->magic = USED_MAGIC;
    first->block.before = 0;
    tm_txn_begin(&txn);
    link_free(&txn, first, size);
    tm_txn_set(&txn, &heap.start, (uint64_t)first);
    tm_txn_set(&txn, &heap.end, (uint64_t)last);
    tm_txn_commit(&txn);
}

static struct free_block *find(uint64_t size)
{
    uint64_t wanted = size + (1ull << (msb(size) - 4)) - 1;
    struct free_block *block;
    unsigned class, step;
    uint64_t steps, classes;

    /*
     * Blocks of just this size first, looking at a few: a program that frees and takes
     * the same size again would otherwise split a larger block each time.
     */
    heap_classify(size, &class, &step);
    if (class >= CLASSES)
        return NULL;
    block = heap.lists[class][step];
    for (unsigned looks = 0; block && looks < EXACT_LOOKS; looks++, block = block->next)
        if (SIZE(&block->block) >= size)
            return block;
    /* Then round up to the next step, where any block of the list is large enough. */
    heap_classify(wanted, &class, &step);
    if (class >= CLASSES)
        return NULL;
    steps = heap.step_map[class] & (~0ull << step);
    if (!steps) {
        classes = class == 63 ? 0 : heap.map & (~0ull << (class + 1));
        if (!classes)
            return NULL;
        class = (unsigned)__builtin_ctzll(classes);
        steps = heap.step_map[class];
    }
    return heap.lists[class][__builtin_ctzll(steps)];
}

uint64_t tm_heap_room(void)
{
    uint64_t map = __atomic_load_n(&heap.map, __ATOMIC_RELAXED), steps;
    unsigned power;

    if (!map)
        return 0;
    power = msb(map) + FIRST_CLASS;
    steps = __atomic_load_n(&heap.step_map[msb(map)], __ATOMIC_RELAXED);
    return (1ull << power) + ((uint64_t)(steps ? msb(steps) : 0) << (power - 4)) - sizeof(struct block);
}

int heap_lock(void)
{
    int status = heap.end ? tm_lock(&heap.mutex) : TM_E_NOMEM;

    /* The dead one's redo record was applied before its lock was given away. */
    if (status == TM_E_OWNERDEAD) {
        tm_mutex_consistent(&heap.mutex);
        status = 0;
    }
    return status;
}

/*
 * Make zeroes of it.  One read in each stretch first: of a page that is read, Linux maps what lies around it too, of one
 * that is written it does not (mm/memory.c, do_fault_around), and in a process that has just attached every page
 * is a fault.
 */
static void clear(uint8_t *start, size_t size)
{
#ifdef TM_TEST_NO_ZEROES /* Test build: what a block has held is there for who gets it next. */
    (void)start, (void)size;
    return;
#endif
    for (uint64_t at = (uint64_t)start, end = at + size; size >= AROUND && at < end; at = (at | (AROUND - 1)) + 1)
        (void)*(volatile uint8_t *)at;
    memset(start, 0, size);
}

int tm_try_alloc(size_t length, void **result)
{
    struct free_block *found;
    struct tm_txn txn;
    uint64_t size, have;
    int status;

    *result = NULL;
    if (length > (1ull << 39))
        return TM_E_NOMEM;
    size = (length + sizeof(struct block) + 15) & ~15ull;
    if (size < MINIMUM)
        size = MINIMUM;
    status = heap_lock();
    if (status)
        return status;
    while (!(found = find(size))) {
        bool hope = owned_sweep();

        tm_unlock(&heap.mutex);
        status = hope ? heap_lock() : TM_E_NOMEM;
        if (status)
            return status;
    }
    tm_assert(found->block.magic == FREE_MAGIC);
    have = SIZE(&found->block);
    tm_txn_begin(&txn);
    unlink_free(&txn, found, have);
    if (have - size >= MINIMUM) {
        struct block *rest = block_after(&found->block, size);

        tm_txn_set(&txn, &rest->before, size);
        tm_txn_set(&txn, &block_after(&found->block, have)->before, have - size);
        link_free(&txn, (struct free_block *)rest, have - size);
    } else {
        size = have;
    }
    txn_add(&txn, &found->block.size, size);
    txn_add(&txn, &found->block.magic, USED_MAGIC);
    owned_enter(&txn, &found->block);
    tm_txn_commit(&txn);
    tm_unlock(&heap.mutex);
    clear((uint8_t *)(&found->block + 1), size - sizeof(struct block));
    *result = &found->block + 1;
    return 0;
}

int tm_extend(void *memory, size_t length)
{
    struct block *block = heap_header(memory), *next;
    uint64_t had = block->size, have, size;
    struct tm_txn txn;
    int status;

    if (length > (1ull << 39))
        return TM_E_NOMEM;
    size = (length + sizeof(*block) + 15) & ~15ull;
    owned_entry(block->owner);
    if (size <= had)
        return 0;
    status = heap_lock();
    if (status)
        return status;
    next = block_after(block, had);
    have = next->size & FREE_BIT ? had + SIZE(next) : had;
    if (have < size) {
        tm_unlock(&heap.mutex);
        return TM_E_NOMEM;
    }
    tm_txn_begin(&txn);
    unlink_free(&txn, (struct free_block *)next, have - had);
    /* The header goes: a search that stands there begins again one block before (owned.c). */
    if (heap.cursor == (uint64_t)next)
        tm_txn_set(&txn, &heap.cursor, (uint64_t)block);
    if (have - size >= MINIMUM) {
        struct block *rest = block_after(block, size);

        tm_txn_set(&txn, &rest->before, size);
        tm_txn_set(&txn, &block_after(block, have)->before, have - size);
        link_free(&txn, (struct free_block *)rest, have - size);
    } else {
        size = have;
        tm_txn_set(&txn, &block_after(block, have)->before, size);
    }
    tm_txn_set(&txn, &block->size, size);
    tm_txn_commit(&txn);
    tm_unlock(&heap.mutex);
    clear((uint8_t *)block + had, size - had);
    return 0;
}

void *tm_alloc(size_t size)
{
    void *block;

    tm_try_alloc(size, &block);
    return block;
}

struct block *heap_header(const void *memory)
{
    struct block *block = (struct block *)memory - 1;

    tm_assert((uint64_t)block >= heap.start && (uint64_t)block < heap.end && !((uint64_t)block & 15) &&
              block->magic == USED_MAGIC);
    return block;
}

size_t tm_block_size(const void *memory)
{
    return heap_header(memory)->size - sizeof(struct block);
}

void heap_free_locked(struct block *block, uint64_t *entry)
{
    uint64_t size = block->size;
    struct block *next = block_after(block, size);
    struct tm_txn txn;

    tm_assert(block->magic == USED_MAGIC);
    tm_txn_begin(&txn);
    if (entry)
        txn_add(&txn, entry, 0);
    if (next->size & FREE_BIT) {
        unlink_free(&txn, (struct free_block *)next, SIZE(next));
        size += SIZE(next);
    }
    if (block->before) {
        struct block *before = (struct block *)((uint8_t *)block - block->before);

        if (before->size & FREE_BIT) {
            unlink_free(&txn, (struct free_block *)before, SIZE(before));
            size += SIZE(before);
            tm_txn_set(&txn, &block->magic, 0);
            block = before;
        }
    }
    tm_txn_set(&txn, &block_after(block, size)->before, size);
    link_free(&txn, (struct free_block *)block, size);
    if (heap.cursor - (uint64_t)block < size)
        tm_txn_set(&txn, &heap.cursor, (uint64_t)block);
    tm_txn_commit(&txn);
}

void tm_free(void *memory)
{
    struct block *block;
    uint64_t *entry;

    if (!memory)
        return;
    block = heap_header(memory);
    entry = owned_entry(block->owner);
    /* Without the lock the block stays its owner's: lost until repair, but not broken. */
    if (heap_lock())
        return;
    heap_free_locked(block, entry);
    tm_unlock(&heap.mutex);
}
