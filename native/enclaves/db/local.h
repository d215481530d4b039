/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What one slot has of its own: SQLite's global variables, its memory, its connection.
 *
 * All of it is blocks that the slot owns (tm_alloc): however its holder goes, the SDK frees them
 * before the next one comes.  The first words of tm_slot_data() say where it is.
 */
#ifndef DB_LOCAL_H
#define DB_LOCAL_H

#include "thread.h"
#include "tmsdk.h"

#define MEMORY_CLASSES 112u

struct memory {
    uint64_t limit, used, most; /* bytes taken from the enclave's heap */
    uint64_t blocks;            /* of `used`, in blocks of their own */
    bool heap_full;             /* the last that was refused: not for the limit */
    uint8_t *next, *end;        /* what is left of the last chunk */
    struct chunk *chunks;
    void *free[MEMORY_CLASSES];
};

struct connection;

struct local {
    struct memory memory;
    struct connection *connection;
    uint8_t globals[] __attribute__((aligned(64))); /* SQLite's; a copy of [__tm_local_start, __tm_local_end) */
};

/* tm_slot_data(), zeros until db_open. */
struct local_place {
    uint64_t shift; /* what to add to the address of a global variable to have the slot's own; 0: the original */
    struct local *local;
};

#define LOCAL_PLACE offsetof(struct thread, user)

/* sqlite3_wsd_find() of SQLite's: one load. */
static inline void *local_find(void *original)
{
    return (uint8_t *)original + *(const uint64_t __seg_fs *)(LOCAL_PLACE + offsetof(struct local_place, shift));
}

static inline struct local *local_self(void)
{
    return *(struct local *const __seg_fs *)(LOCAL_PLACE + offsetof(struct local_place, local));
}

/* Once, from tm_on_start(): what all slots begin with. */
int local_prepare(void);
/* Make the running slot's; TM_E_NOMEM, TM_E_BUSY.  It may take `limit` bytes. */
int local_open(uint64_t limit);
void local_close(void);

#endif
