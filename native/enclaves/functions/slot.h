/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a slot has of the engine: its arena, and modules that are ready.
 *
 * A module is made ready when its function is first invoked through the slot, or before the slot has a holder
 * (ready.c): all of it is compiled, and stays so for the next time.  There are WARM_MAX of them at most: the oldest
 * makes room.  With more than WARM_BYTES of memory all are forgotten.  They are the slot's own, as everything that
 * the engine allocates: no lock of the engine's is ever shared, and a killed client's modules go with its slot.
 */
#ifndef FUNCTIONS_SLOT_H
#define FUNCTIONS_SLOT_H

#include "arena.h"
#include "engine.h"

#define WARM_MAX 8u
#define WARM_BYTES (4u << 20)

struct escape {
    uint64_t stack;
};

/* For one sealed upload through this slot (upload.c). */
struct offer {
    uint8_t private_key[32], key[32], nonce[32];
    uint32_t made; /* 0: none, or it was used */
};

struct slot {
    struct arena arena;
    struct offer offer;
    struct escape *escape; /* while the engine works */
    struct engine_text *why; /* where the engine's last words go */
    struct warm {
        uint64_t number;
        void *prepared;
        uint8_t owner[15]; /* of its owner's principal, as much as there is room for: no more hangs on it than memory */
        bool unused;       /* ready before anybody had the slot, and not invoked yet */
    } warm[WARM_MAX];
};
_Static_assert(sizeof(struct slot) <= TM_SLOT_DATA, "slot data");

struct slot *slot_self(void);
/* Forget what is ready when that is much: before anybody counts on one. */
void slot_trim(struct slot *slot);
/* Have `budget` bytes for what is done next, beside what is ready. */
void slot_begin(struct slot *slot, uint64_t budget);
/*
 * Do `body` with the engine: what it returns, or -1 when the engine gave up.  Then the arena is empty, and
 * `why` has its words, if any; `refused` tells whether memory was the reason (ARENA_*).
 */
int slot_engine(struct slot *slot, int (*body)(void *), void *argument, struct engine_text *why, uint32_t *refused);
/* That deployment when its module is ready, or NULL. */
struct warm *slot_warm(struct slot *slot, uint64_t number);
/* Before one is made ready: forget the oldest when there are as many as there may be.  With the engine. */
void slot_make_room(struct slot *slot);
void slot_keep(struct slot *slot, uint64_t number, void *prepared);
/* The same for whoever will have the slot. */
void slot_keep_ahead(struct slot *slot, uint64_t number, const uint8_t owner[32], void *prepared);
/* It has a holder now, whose share what is ready counts in: keep it if that `fits` and some of it is his. */
void slot_claim(struct slot *slot, const uint8_t owner[32], bool fits);
/* Forget all that is ready. */
void slot_forget(struct slot *slot);

#endif
