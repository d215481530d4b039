/* SPDX-License-Identifier: Apache-2.0 */
/* Inside the heap: heap.c takes and gives blocks, owned.c knows whose they are, heap_check.c looks. */
#ifndef TMSDK_HEAP_H
#define TMSDK_HEAP_H

#include "lock.h"

/*
 * Blocks lie one after the other; each starts with its size and that of the block
 * before it.  An `owner` of 0 means kept: part of what the enclave shares.  Else it says
 * which slot allocated it, and where that slot's list of blocks has it (owned.c).
 */
struct block {
    uint64_t size;   /* with this header; a multiple of 16; bit 0: free */
    uint64_t before; /* size of the block before; 0: this is the first */
    uint64_t owner;
    uint64_t magic;
};
_Static_assert(sizeof(struct block) == TM_BLOCK_HEAD, "tmsdk.h");
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

struct heap {
    struct tm_mutex mutex;
    uint64_t start, end; /* end: the last block, a header that is always in use */
    uint64_t map;        /* bit per class with a free block */
    uint64_t step_map[CLASSES];
    struct free_block *lists[CLASSES][STEPS];
    /* Blocks whose slots gave them up without freeing them (owned.c). */
    uint64_t stale;  /* there may be some; set without the lock */
    uint64_t cursor; /* how far the search for them is; 0: none is under way */
};
extern struct heap heap __attribute__((visibility("hidden")));

/* 0 when the heap's lock is ours, or why not. */
int heap_lock(void);
/* Under the lock: which list is for blocks of that size, and is that of the block a used one? */
void heap_classify(uint64_t size, unsigned *class, unsigned *step);
struct block *heap_header(const void *memory);
/* Under the lock: free the block, and in the same step make *entry 0 (or nothing, when it is NULL). */
void heap_free_locked(struct block *block, uint64_t *entry);

static inline struct block *block_after(struct block *block, uint64_t size)
{
    return (struct block *)((uint8_t *)block + size);
}

/* owned.c: a new block becomes the running slot's in `txn`. */
void owned_enter(struct tm_txn *txn, struct block *block);
/* Where the running slot's list has a block of that owner; NULL when it is kept or not listed. */
uint64_t *owned_entry(uint64_t owner);
/* Under the lock: look on for blocks that were given up, and free them; false when there are none. */
bool owned_sweep(void);

#endif
