/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The heap: two-level segregated fit (Masmano et al., "TLSF", ECRTS 2004) with
 * every operation committed as one redo record (tm_txn), so that a death at any
 * instruction leaves the heap before or after it.
 *
 * Blocks lie one after the other; each starts with its size and that of the block
 * before it.  An `owner` of 0 means kept: part of what the enclave shares.  Else it is
 * the slot (and generation) that allocated it, and repair may free it.
 */
#include "lock.h"

struct block {
    uint64_t size;   /* with this header; a multiple of 16; bit 0: free */
    uint64_t before; /* size of the block before; 0: this is the first */
    uint64_t owner;  /* generation << 16 | slot + 1; 0: kept */
    uint64_t magic;
};
struct free_block {
    struct block block;
    struct free_block *next, *previous;
};

#define FREE_BIT 1ull
#define SIZE(block) ((block)->size & ~FREE_BIT)
#define USED_MAGIC 0x6465737520612d74ull
#define FREE_MAGIC 0x6565726620612d74ull
#define MINIMUM sizeof(struct free_block)
#define FIRST_CLASS 5u /* sizes from 32 */
#define CLASSES 36u    /* up to 2^40 */
#define STEPS 16u      /* per power of two */
#define EXACT_LOOKS 8u

static struct {
    struct tm_mutex mutex;
    uint64_t start, end; /* end: the last block, a header that is always in use */
    uint64_t map;        /* bit per class with a free block */
    uint64_t step_map[CLASSES];
    struct free_block *lists[CLASSES][STEPS];
} heap;

/* Words as the open transaction would leave them. */
static uint64_t get(const struct tm_txn *txn, const void *where)
{
    for (uint32_t i = 0; i < txn->count; i++)
        if (txn->writes[i].where == where)
            return txn->writes[i].value;
    return *(const uint64_t *)where;
}

static unsigned msb(uint64_t value)
{
    return 63u - (unsigned)__builtin_clzll(value);
}

static void classify(uint64_t size, unsigned *class, unsigned *step)
{
    unsigned power = msb(size);

    *class = power - FIRST_CLASS;
    *step = (unsigned)(size >> (power - 4)) & (STEPS - 1);
}

static struct block *after(struct block *block, uint64_t size)
{
    return (struct block *)((uint8_t *)block + size);
}

static void unlink_free(struct tm_txn *txn, struct free_block *block, uint64_t size)
{
    struct free_block *next = (void *)get(txn, &block->next);
    struct free_block *previous = (void *)get(txn, &block->previous);
    unsigned class, step;

    classify(size, &class, &step);
    if (next)
        tm_txn_set_ptr(txn, &next->previous, previous);
    if (previous) {
        tm_txn_set_ptr(txn, &previous->next, next);
        return;
    }
    tm_txn_set_ptr(txn, &heap.lists[class][step], next);
    if (!next) {
        uint64_t steps = get(txn, &heap.step_map[class]) & ~(1ull << step);

        tm_txn_set(txn, &heap.step_map[class], steps);
        if (!steps)
            tm_txn_set(txn, &heap.map, get(txn, &heap.map) & ~(1ull << class));
    }
}

static void link_free(struct tm_txn *txn, struct free_block *block, uint64_t size)
{
    struct free_block *head;
    unsigned class, step;

    classify(size, &class, &step);
    head = (void *)get(txn, &heap.lists[class][step]);
    tm_txn_set_ptr(txn, &block->next, head);
    tm_txn_set_ptr(txn, &block->previous, NULL);
    if (head)
        tm_txn_set_ptr(txn, &head->previous, block);
    tm_txn_set_ptr(txn, &heap.lists[class][step], block);
    tm_txn_set(txn, &heap.step_map[class], get(txn, &heap.step_map[class]) | 1ull << step);
    tm_txn_set(txn, &heap.map, get(txn, &heap.map) | 1ull << class);
    tm_txn_set(txn, &block->block.size, size | FREE_BIT);
    tm_txn_set(txn, &block->block.magic, FREE_MAGIC);
    tm_txn_set(txn, &block->block.owner, 0);
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
    last = after(&first->block, size);
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
    classify(size, &class, &step);
    if (class >= CLASSES)
        return NULL;
    block = heap.lists[class][step];
    for (unsigned looks = 0; block && looks < EXACT_LOOKS; looks++, block = block->next)
        if (SIZE(&block->block) >= size)
            return block;
    /* Then round up to the next step, where any block of the list is large enough. */
    classify(wanted, &class, &step);
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

static int heap_lock(void)
{
    int status = heap.end ? tm_lock(&heap.mutex) : TM_E_NOMEM;

    /* The dead one's redo record was applied before its lock was given away. */
    if (status == TM_E_OWNERDEAD) {
        tm_mutex_consistent(&heap.mutex);
        status = 0;
    }
    return status;
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
    found = find(size);
    if (!found) {
        tm_unlock(&heap.mutex);
        return TM_E_NOMEM;
    }
    tm_assert(found->block.magic == FREE_MAGIC);
    have = SIZE(&found->block);
    tm_txn_begin(&txn);
    unlink_free(&txn, found, have);
    if (have - size >= MINIMUM) {
        struct block *rest = after(&found->block, size);

        tm_txn_set(&txn, &rest->before, size);
        tm_txn_set(&txn, &after(&found->block, have)->before, have - size);
        link_free(&txn, (struct free_block *)rest, have - size);
    } else {
        size = have;
    }
    tm_txn_set(&txn, &found->block.size, size);
    tm_txn_set(&txn, &found->block.magic, USED_MAGIC);
    tm_txn_set(&txn, &found->block.owner, thread_owner());
    tm_txn_commit(&txn);
    tm_unlock(&heap.mutex);
    memset(&found->block + 1, 0, size - sizeof(struct block));
    *result = &found->block + 1;
    return 0;
}

void *tm_alloc(size_t size)
{
    void *block;

    tm_try_alloc(size, &block);
    return block;
}

static struct block *header_of(const void *memory)
{
    struct block *block = (struct block *)memory - 1;

    tm_assert((uint64_t)block >= heap.start && (uint64_t)block < heap.end && !((uint64_t)block & 15) &&
              block->magic == USED_MAGIC);
    return block;
}

size_t tm_block_size(const void *memory)
{
    return header_of(memory)->size - sizeof(struct block);
}

void tm_free(void *memory)
{
    struct block *block, *next;
    struct tm_txn txn;
    uint64_t size;

    /* Without the lock the block stays its owner's: lost until repair, but not broken. */
    if (!memory || heap_lock())
        return;
    block = header_of(memory);
    size = block->size;
    next = after(block, size);
    tm_txn_begin(&txn);
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
    tm_txn_set(&txn, &after(block, size)->before, size);
    link_free(&txn, (struct free_block *)block, size);
    tm_txn_commit(&txn);
    tm_unlock(&heap.mutex);
}

void tm_txn_keep(struct tm_txn *txn, void *memory)
{
    tm_txn_set(txn, &header_of(memory)->owner, 0);
}

void tm_txn_own(struct tm_txn *txn, void *memory)
{
    tm_txn_set(txn, &header_of(memory)->owner, thread_owner());
}

static bool listed(const struct free_block *block)
{
    unsigned class, step;

    classify(SIZE(&block->block), &class, &step);
    if (!(heap.map >> class & 1) || !(heap.step_map[class] >> step & 1))
        return false;
    if (block->next && block->next->previous != block)
        return false;
    return block->previous ? block->previous->next == block : heap.lists[class][step] == block;
}

/* Every block in its place, no two free neighbours, every free one on its list. */
static int check(struct tm_heap_stats *stats)
{
    uint64_t before = 0, lists = 0;
    struct block *block = (void *)heap.start;

    stats->size = heap.end - heap.start;
    while ((uint64_t)block != heap.end) {
        uint64_t size = SIZE(block);
        bool free = block->size & FREE_BIT;

        if (size < MINIMUM || size & 15 || (uint64_t)block + size > heap.end || block->before != before ||
            block->magic != (free ? FREE_MAGIC : USED_MAGIC))
            return TM_E_STATE;
        if (free) {
            if (!listed((struct free_block *)block) || after(block, size)->size & FREE_BIT)
                return TM_E_STATE;
            stats->free_blocks++;
            if (size - sizeof(*block) > stats->largest_free)
                stats->largest_free = size - sizeof(*block);
        } else {
            stats->blocks++;
            stats->used += size;
            stats->owned += block->owner != 0;
        }
        before = size;
        block = after(block, size);
    }
    if (block->before != before || block->magic != USED_MAGIC)
        return TM_E_STATE;
    for (unsigned class = 0; class < CLASSES; class++) {
        for (unsigned step = 0; step < STEPS; step++) {
            struct free_block *entry = heap.lists[class][step];

            if (!!entry != (heap.step_map[class] >> step & 1))
                return TM_E_STATE;
            for (; entry; entry = entry->next)
                if (++lists > stats->free_blocks)
                    return TM_E_STATE;
        }
        if (!!heap.step_map[class] != (heap.map >> class & 1))
            return TM_E_STATE;
    }
    return lists == stats->free_blocks ? 0 : TM_E_STATE;
}

int tm_heap_check(struct tm_heap_stats *stats)
{
    int status = heap_lock();

    memset(stats, 0, sizeof(*stats));
    if (status)
        return status;
    status = check(stats);
    tm_unlock(&heap.mutex);
    return status;
}
