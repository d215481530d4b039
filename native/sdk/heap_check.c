/* SPDX-License-Identifier: Apache-2.0 */
/* Is the heap whole? */
#include "heap.h"

static bool listed(const struct free_block *block)
{
    unsigned class, step;

    heap_classify(SIZE(&block->block), &class, &step);
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
            if (!listed((struct free_block *)block) || block_after(block, size)->size & FREE_BIT)
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
        block = block_after(block, size);
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
    /* What the dead gave up is free, though nobody has wanted it yet. */
    while (owned_sweep())
        ;
    status = check(stats);
    tm_unlock(&heap.mutex);
    return status;
}
