/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The memory that the engine works in, one arena for each slot.
 *
 * All of it lies in blocks of the SDK's heap that are the slot's own: whatever the engine was doing when its
 * client was killed, repair frees them, and the arena's head goes with the slot's data.  An arena
 * never takes more than its budget, and those of one owner together no more than ARENA_OWNER_SHARE of the heap: so
 * neither one function nor one owner can have the heap of all.
 *
 * The owner's share is of all that his calls have of the heap at once: the copy of a request and what a call
 * allocates beside the arena (share_alloc) count until the call ends.
 *
 * What is made ready in a slot before it has a holder (ready.c) is nobody's until the first call, and then the
 * caller's.
 */
#ifndef FUNCTIONS_ARENA_H
#define FUNCTIONS_ARENA_H

#include "tmsdk.h"

#define ARENA_CLASSES 36u

struct span;

struct arena {
    struct span *spans; /* every block of the heap that it has */
    uint64_t used;      /* bytes of these */
    uint64_t budget;
    uint8_t *next, *end; /* what is left of the newest span for small pieces */
    void *free[ARENA_CLASSES];
    uint32_t refused;   /* ARENA_*: why something was not to be had */
    uint32_t small_spans;
};

#define ARENA_OVER_BUDGET 1u
#define ARENA_HEAP_FULL 2u
#define ARENA_OWNER_FULL 4u
#define ARENA_OWNER_SHARE 2u

/* Aligned to 16; NULL when there is none, and `refused` says why. */
void *arena_alloc(struct arena *arena, size_t size, bool zeroed);
void *arena_realloc(struct arena *arena, void *old, size_t old_size, size_t size);
void arena_free(struct arena *arena, void *memory, size_t size);
/* Free everything. */
void arena_drop(struct arena *arena);

/* A block of the slot's own that counts in the owner's share until the call ends: TM_E_NOMEM when it is full. */
int share_alloc(size_t size, void **block);
/* Earlier than that. */
void share_free(void *block, size_t size);

/* What is made ready for the slot from now on is nobody's, until share_ready() says that the arena has all of it. */
void share_ahead(void);
void share_ready(const struct arena *arena);
/* Blocks of the heap, and their bytes as the heap counts them. */
struct share_sum {
    uint64_t blocks, bytes;
};
/* What all slots that have had no call yet have ready. */
struct share_sum share_ready_sum(void);

/* dispatch.c: before anything of a call is copied in, and when nothing of it is left. */
int tm_on_call(uint64_t in_len);
void tm_on_called(void);

#endif
