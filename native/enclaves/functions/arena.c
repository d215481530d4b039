/* SPDX-License-Identifier: Apache-2.0 */
#include "arena.h"

#include "functions.h"
#include "keys.h"
#include "slot.h"

#define SMALL_MAX 16384u
#define SPAN_MIN 65536u
#define SHARES 256u /* slots, the warden's too: the image has fewer (images.toml) */
#define REQUEST_ON_STACK 2048u /* dispatch.c copies no longer one to the heap */
/* The longest request: an invocation's. */
#define REQUEST_MAX (sizeof(struct fn_invoke) + FN_NAME_MAX + 2 * FN_STRINGS_MAX + (uint64_t)FN_PAYLOAD_MAX)
_Static_assert(sizeof(struct fn_deploy) + FN_NAME_MAX + FN_STRINGS_MAX + FN_MODULE_MAX < REQUEST_MAX, "request");

/* At the start of each block of the heap; what it holds follows, aligned to 16. */
struct span {
    struct span *next, *previous;
    uint64_t size; /* of the block */
    uint64_t reserved;
};

/* Steps of 16 to 64, then four to each power of two. */
static unsigned class_of(size_t size, size_t *rounded)
{
    unsigned power;
    size_t step;

    if (size <= 64) {
        *rounded = size ? (size + 15) & ~15ull : 16;
        return (unsigned)(*rounded / 16 - 1);
    }
    power = 63u - (unsigned)__builtin_clzll(size - 1); /* 2^power < size <= 2^(power + 1) */
    step = 1ull << (power - 2);
    *rounded = (size + step - 1) & ~(step - 1);
    return 4 + (power - 6) * 4 + (unsigned)((*rounded - (1ull << power)) / step) - 1;
}

/*
 * What the arena of each slot has, and what its call has beside, for everybody to add up.  Written by the
 * slot's own thread, and before it has a holder by whoever makes something ready in it; of a holder that is gone it is
 * forgotten when the slot is reset, after its blocks were freed.
 */
static struct share {
    uint8_t owner[32];
    _Atomic uint64_t used, beside;
    _Atomic uint64_t ready, ready_bytes; /* blocks that were there before anybody had the slot; 0 from its first call on */
} shares[SHARES];

static uint32_t slots(void)
{
    const volatile struct tm_image_header *image = tm_enclave_base();

    return TM_WARDEN_SLOTS + image->io_slots + image->client_slots;
}

int tm_on_start(void)
{
    return slots() <= SHARES ? keys_start() : TM_E_ARGUMENT;
}

void tm_on_slot_reset(uint32_t slot)
{
    shares[slot].used = 0;
    shares[slot].beside = 0;
    shares[slot].ready = 0;
}

static struct share *own_share(void)
{
    return &shares[tm_caller().slot];
}

static bool owner_fits(const struct share *own)
{
#ifdef TM_TEST_NO_SHARE
    /* Test build: who comes first has the whole heap. */
    (void)own;
    return true;
#else
    const volatile struct tm_image_header *image = tm_enclave_base();
    uint64_t all = 0;

    for (uint32_t slot = 0; slot < slots(); slot++) {
        uint64_t has = shares[slot].used + shares[slot].beside;

        if (has && !memcmp(shares[slot].owner, own->owner, sizeof(own->owner)))
            all += has;
    }
    return all <= image->heap_size / ARENA_OWNER_SHARE;
#endif
}

/*
 * Counted first and looked at then: of two that take the last at once none may have it, but never both.  And before
 * it is had: a death in between counts too much, until the slot is reset.
 */
static bool share_take(_Atomic uint64_t *part, uint64_t more)
{
    *part += more;
    if (owner_fits(own_share()))
        return true;
    *part -= more;
    return false;
}

int tm_on_call(uint64_t in_len)
{
    struct tm_caller caller = tm_caller();
    struct share *share = &shares[caller.slot];

    if (share->ready || !share->used) /* else what is kept ready is its owner's already */
        memcpy(share->owner, caller.identity.principal, sizeof(share->owner));
    share->beside = 0;
    if (share->ready) {
        share->ready = 0;
        slot_claim(slot_self(), caller.identity.principal, owner_fits(share));
    }
    if (in_len > REQUEST_MAX)
        return TM_E_ARGUMENT;
    return in_len <= REQUEST_ON_STACK || share_take(&share->beside, in_len) ? 0 : TM_E_NOMEM;
}

void tm_on_called(void)
{
    own_share()->beside = 0;
}

int share_alloc(size_t size, void **block)
{
    _Atomic uint64_t *beside = &own_share()->beside;
    int status;

    *block = NULL;
    if (!share_take(beside, size))
        return TM_E_NOMEM;
    status = tm_try_alloc(size, block);
    if (status)
        *beside -= size;
    return status;
}

void share_free(void *block, size_t size)
{
    tm_free(block);
    own_share()->beside -= size;
}

void share_ahead(void)
{
    memset(own_share()->owner, 0, sizeof(own_share()->owner));
}

void share_ready(const struct arena *arena)
{
    struct share *own = own_share();

    own->beside = 0;
    own->ready = own->ready_bytes = 0;
    for (struct span *span = arena->spans; span; span = span->next) {
        own->ready++;
        own->ready_bytes += tm_block_size(span) + TM_BLOCK_HEAD;
    }
}

struct share_sum share_ready_sum(void)
{
    struct share_sum sum = {0};

    for (uint32_t slot = 0; slot < slots(); slot++)
        if (shares[slot].ready) {
            sum.blocks += shares[slot].ready;
            sum.bytes += shares[slot].ready_bytes;
        }
    return sum;
}

static struct span *span_take(struct arena *arena, size_t size)
{
    void *block;

    if (size > arena->budget || arena->used > arena->budget - size) {
        arena->refused |= ARENA_OVER_BUDGET;
        return NULL;
    }
    if (!share_take(&own_share()->used, size)) {
        arena->refused |= ARENA_OWNER_FULL;
        return NULL;
    }
    if (tm_try_alloc(size, &block)) {
        own_share()->used -= size;
        arena->refused |= ARENA_HEAP_FULL;
        return NULL;
    }
    struct span *span = block;

    span->size = size;
    span->next = arena->spans;
    if (span->next)
        span->next->previous = span;
    arena->spans = span;
    arena->used += size;
    return span;
}

static void span_give(struct arena *arena, struct span *span)
{
    uint64_t size = span->size;

    if (span->next)
        span->next->previous = span->previous;
    if (span->previous)
        span->previous->next = span->next;
    else
        arena->spans = span->next;
    arena->used -= size;
    tm_free(span);
    own_share()->used -= size;
}

static void *small(struct arena *arena, size_t size)
{
    size_t rounded;
    unsigned class = class_of(size, &rounded);
    void **piece = arena->free[class];
    uint8_t *fresh;

    if (piece) {
        arena->free[class] = *piece;
        return piece;
    }
    if ((size_t)(arena->end - arena->next) < rounded) {
        size_t wanted = (size_t)SPAN_MIN << (arena->small_spans < 3 ? arena->small_spans : 3);
        struct span *span;

        if (arena->used + wanted > arena->budget)
            wanted = SPAN_MIN;
        span = span_take(arena, wanted);
        if (!span)
            return NULL;
        arena->small_spans++;
        arena->next = (uint8_t *)(span + 1);
        arena->end = (uint8_t *)span + wanted;
    }
    fresh = arena->next;
    arena->next += rounded;
    return fresh;
}

void *arena_alloc(struct arena *arena, size_t size, bool zeroed)
{
    struct span *span;
    void *piece;

    if (size > SMALL_MAX) {
        /* New blocks of the heap are zeroes. */
        span = size < SIZE_MAX / 2 ? span_take(arena, sizeof(*span) + size) : NULL;
        return span ? span + 1 : NULL;
    }
    piece = small(arena, size);
    if (piece && zeroed)
        memset(piece, 0, size);
    return piece;
}

void arena_free(struct arena *arena, void *memory, size_t size)
{
    size_t rounded;
    unsigned class;

    if (size > SMALL_MAX) {
        span_give(arena, (struct span *)memory - 1);
        return;
    }
    class = class_of(size, &rounded);
    *(void **)memory = arena->free[class];
    arena->free[class] = memory;
}

/*
 * Where it lies, if there is room behind it: what the engine makes twice as large for every step of a memory's growth
 * is else there twice at once, and the largest of a function's does not fit beside itself.
 */
static bool span_extend(struct arena *arena, struct span *span, size_t size)
{
    size_t more = size - span->size;

    if (size < span->size || more > arena->budget || arena->used > arena->budget - more)
        return false;
    if (!share_take(&own_share()->used, more))
        return false;
    if (tm_extend(span, size)) {
        own_share()->used -= more;
        return false;
    }
    span->size = size;
    arena->used += more;
    return true;
}

void *arena_realloc(struct arena *arena, void *old, size_t old_size, size_t size)
{
    size_t was, is;
    void *fresh;

    if (size <= SMALL_MAX && old_size <= SMALL_MAX && class_of(size, &is) == class_of(old_size, &was))
        return old;
    if (old_size > SMALL_MAX && size > old_size && size < SIZE_MAX / 2 &&
        span_extend(arena, (struct span *)old - 1, sizeof(struct span) + size))
        return old;
    fresh = arena_alloc(arena, size, false);
    if (fresh) {
        memcpy(fresh, old, size < old_size ? size : old_size);
        arena_free(arena, old, old_size);
    }
    return fresh;
}

void arena_drop(struct arena *arena)
{
    struct span *span = arena->spans;

    memset(arena, 0, sizeof(*arena));
    while (span) {
        struct span *next = span->next;

        tm_free(span);
        span = next;
    }
    own_share()->used = 0;
}
