/* SPDX-License-Identifier: Apache-2.0 */
#include "cache.h"

#include "lock.h"

#define SLOTS_MOST 128u
#ifndef CHUNK_FRAMES
#define CHUNK_FRAMES 64u
#endif
#define CHUNKS_MOST 4095u  /* 1 GiB */
#define BUCKET_HINTS 16u   /* a cache line */
#define BUCKET_FRAMES 8u   /* that a bucket has hints of on average, when the cache is full */
#define CLOCK_LOOKS 64u    /* at frames, for one that can go */
#define NUMBER_BITS 18u    /* of a hint: the frame's number and 1; above it a part of the hash */
_Static_assert(CHUNK_FRAMES * CHUNKS_MOST < (1u << NUMBER_BITS), "a hint has room for a frame's number");

/* A frame's word: who has claimed it (slot and 1; 0: nobody), whether there is a record in it, how often it was claimed. */
#define CLAIMER 0xffffull
#define VALID (1ull << 16)
#define ONE_CLAIM (1ull << 17)

struct frame {
    _Atomic uint64_t state;
    uint64_t owner, place, tag;
    uint32_t asked_for; /* since the clock's hand was here */
    uint32_t length;
    uint8_t data[CACHE_RECORD_MOST];
} __attribute__((aligned(64)));

/* The heap aligns to 16 bytes: room for what is missing to a line. */
struct chunk {
    uint8_t room[sizeof(struct frame) * CHUNK_FRAMES + 48];
};

static struct {
    struct tm_mutex mutex; /* of what is added */
    uint64_t *chunks[CHUNKS_MOST];
    uint64_t chunk_count;
    uint32_t (*index)[BUCKET_HINTS];
    uint64_t index_mask; /* in buckets; both are there, or none */
    _Atomic uint64_t fresh; /* frames that were handed out for the first time */
    _Atomic uint64_t hand;
    /* The frame and 1 that a slot is about to claim, or has: written before it does. */
    struct {
        _Atomic uint64_t claim;
        uint64_t hits, fills;
    } __attribute__((aligned(64))) slots[SLOTS_MOST];
} cache;

/* ---- frames ------------------------------------------------------------------ */

static struct frame *frame_at(uint64_t number)
{
    uint64_t chunk = (uint64_t)__atomic_load_n(&cache.chunks[number / CHUNK_FRAMES], __ATOMIC_ACQUIRE);

    return (struct frame *)((chunk + 63) & ~63ull) + number % CHUNK_FRAMES;
}

static uint64_t frame_count(void)
{
    return __atomic_load_n(&cache.chunk_count, __ATOMIC_ACQUIRE) * CHUNK_FRAMES;
}

static bool swap(struct frame *frame, uint64_t before, uint64_t after)
{
    return __atomic_compare_exchange_n((uint64_t *)&frame->state, &before, after, false, __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST);
}

static uint32_t self(void)
{
    return (uint32_t)thread_self()->fixed.index;
}

/* ---- what there may be ----------------------------------------------------------- */

static uint64_t limit(void)
{
    uint64_t heap = header()->heap_size, slots = (uint64_t)slot_count() * CACHE_SLOT_SHARE, least = heap / 4;
    uint64_t most = (uint64_t)CHUNKS_MOST * sizeof(struct chunk), room = heap > slots + least ? heap - slots : least;

    return room < most ? room : most;
}

/* Another chunk, and first the index: false when there is none to be had now. */
static bool grow(void)
{
    uint64_t chunks = limit() / sizeof(struct chunk), buckets = 1, count = cache.chunk_count;
    void *chunk = NULL, *index = NULL;
    struct tm_txn txn;

    if (count >= chunks)
        return false;
    while (buckets * BUCKET_FRAMES < chunks * CHUNK_FRAMES)
        buckets *= 2;
    /* Before the lock: while one is held the heap's is not waited for. */
    if (tm_try_alloc(sizeof(struct chunk), &chunk))
        return false;
    if (!cache.index && tm_try_alloc(buckets * sizeof(*cache.index), &index)) {
        tm_free(chunk);
        return false;
    }
    switch (tm_trylock(&cache.mutex)) {
    case TM_E_OWNERDEAD: /* under it there is one tm_txn: right before and after it */
        tm_mutex_consistent(&cache.mutex);
        break;
    case 0:
        break;
    default:
        tm_free(chunk);
        tm_free(index);
        return false;
    }
    if (count == cache.chunk_count) {
        tm_txn_begin(&txn);
        if (index) {
            tm_txn_keep(&txn, index);
            tm_txn_set(&txn, &cache.index_mask, buckets - 1);
            tm_txn_set_ptr(&txn, &cache.index, index);
        }
        tm_txn_keep(&txn, chunk);
        tm_txn_set_ptr(&txn, &cache.chunks[count], chunk);
        tm_txn_set(&txn, &cache.chunk_count, count + 1);
        tm_txn_commit(&txn);
        chunk = index = NULL;
    }
    tm_unlock(&cache.mutex);
    tm_free(chunk);
    tm_free(index);
    return true;
}

/* ---- the index --------------------------------------------------------------------- */

static uint64_t hash_of(uint64_t owner, uint64_t place)
{
    uint64_t hash = (owner >> 4) * 0x9e3779b97f4a7c15ull ^ place; /* Fibonacci hashing, twice */

    hash *= 0x9e3779b97f4a7c15ull;
    return hash ^ hash >> 29;
}

static uint32_t *bucket_of(uint64_t hash)
{
    uint32_t(*index)[BUCKET_HINTS] = __atomic_load_n(&cache.index, __ATOMIC_ACQUIRE);

    return index ? index[hash & cache.index_mask] : NULL;
}

static uint32_t hint_of(uint64_t hash, uint64_t number)
{
    return (uint32_t)(hash >> 46 << NUMBER_BITS | (number + 1));
}

static struct frame *hinted(uint32_t hint, uint64_t *number)
{
    *number = (hint & ((1u << NUMBER_BITS) - 1)) - 1u;
    return frame_at(*number);
}

/* Does the hint stand for a frame of such a record, as far as hints tell? */
static bool may_be(uint32_t hint, uint64_t hash)
{
    return hint >> NUMBER_BITS == (uint32_t)(hash >> 46 << NUMBER_BITS) >> NUMBER_BITS &&
           hint & ((1u << NUMBER_BITS) - 1);
}

static void remember(uint64_t hash, uint64_t number)
{
    uint32_t *bucket = bucket_of(hash), hint = hint_of(hash, number), nothing;

    for (uint32_t i = 0; i < BUCKET_HINTS; i++)
        if (__atomic_load_n(&bucket[i], __ATOMIC_RELAXED) == hint)
            return;
    for (uint32_t i = 0; i < BUCKET_HINTS; i++) {
        nothing = 0;
        if (__atomic_compare_exchange_n(&bucket[i], &nothing, hint, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return;
    }
    /* Full: one of them is not found any more until it is read again, and its frame goes with the clock. */
    __atomic_store_n(&bucket[number % BUCKET_HINTS], hint, __ATOMIC_SEQ_CST);
}

static void forget(uint64_t hash, uint64_t number)
{
    uint32_t *bucket = bucket_of(hash);

    for (uint32_t i = 0; i < BUCKET_HINTS; i++) {
        uint32_t hint = hint_of(hash, number);

        if (__atomic_load_n(&bucket[i], __ATOMIC_RELAXED) == hint)
            __atomic_compare_exchange_n(&bucket[i], &hint, 0, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
}

/* ---- reading --------------------------------------------------------------------------- */

static bool is(const struct frame *frame, const struct cache_key *key)
{
    return __atomic_load_n(&frame->place, __ATOMIC_RELAXED) == key->place &&
           __atomic_load_n(&frame->owner, __ATOMIC_RELAXED) == key->owner &&
           __atomic_load_n(&frame->tag, __ATOMIC_RELAXED) == key->tag;
}

/* Copy from a frame: false when it is not that record, or is claimed meanwhile. */
static bool copy(struct frame *frame, const struct cache_key *key, uint32_t offset, uint32_t length, void *data)
{
    uint64_t state = frame->state;

    if (!(state & VALID) || !is(frame, key) || offset + (uint64_t)length > frame->length)
        return false;
    memcpy(data, frame->data + offset, length);
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* the copy is done when the word is looked at again */
#ifndef DB_TEST_NO_SECOND_LOOK
    if (frame->state != state)
        return false;
#endif
    if (!__atomic_load_n(&frame->asked_for, __ATOMIC_RELAXED))
        __atomic_store_n(&frame->asked_for, 1, __ATOMIC_RELAXED);
    return true;
}

bool cache_get(const struct cache_key *key, uint32_t offset, uint32_t length, void *data)
{
    uint64_t hash = hash_of(key->owner, key->place), number;
    uint32_t *bucket = bucket_of(hash);

    for (uint32_t i = 0; bucket && i < BUCKET_HINTS; i++) {
        uint32_t hint = __atomic_load_n(&bucket[i], __ATOMIC_RELAXED);

        if (may_be(hint, hash) && copy(hinted(hint, &number), key, offset, length, data)) {
            cache.slots[self()].hits++;
            return true;
        }
    }
    return false;
}

/* ---- filling ----------------------------------------------------------------------------- */

static bool claim(struct frame *frame, uint64_t number, uint64_t state, uint64_t *claimed)
{
    if (state & CLAIMER)
        return false;
    *claimed = ((state & ~(CLAIMER | VALID)) + ONE_CLAIM) | (self() + 1);
    cache.slots[self()].claim = number + 1;
    if (swap(frame, state, *claimed))
        return true;
    cache.slots[self()].claim = 0;
    return false;
}

/* The frame that another version of the record has, or one that the clock finds. */
static struct frame *take(const struct cache_key *key, uint64_t hash, uint64_t *number, uint64_t *claimed)
{
    uint32_t *bucket = bucket_of(hash);
    uint64_t count;

    for (uint32_t i = 0; bucket && i < BUCKET_HINTS; i++) {
        uint32_t hint = __atomic_load_n(&bucket[i], __ATOMIC_RELAXED);
        struct frame *frame;
        uint64_t state;

        if (!may_be(hint, hash))
            continue;
        frame = hinted(hint, number);
        state = frame->state;
        if (frame->owner != key->owner || frame->place != key->place || !(state & VALID))
            continue;
        if (frame->tag == key->tag)
            return NULL; /* it is here already */
        if (claim(frame, *number, state, claimed))
            return frame;
    }
    if (cache.fresh < frame_count() || grow()) {
        *number = cache.fresh++;
        if (*number < frame_count() && claim(frame_at(*number), *number, frame_at(*number)->state, claimed))
            return frame_at(*number);
    }
    count = frame_count();
    for (uint32_t looks = 0; count && looks < CLOCK_LOOKS; looks++) {
        struct frame *frame;
        uint64_t state;

        *number = cache.hand++ % count;
        frame = frame_at(*number);
        state = frame->state;
        if (state & VALID && frame->asked_for && looks < CLOCK_LOOKS / 2) {
            __atomic_store_n(&frame->asked_for, 0, __ATOMIC_RELAXED);
            continue;
        }
        if (claim(frame, *number, state, claimed)) {
            if (state & VALID)
                forget(hash_of(frame->owner, frame->place), *number);
            return frame;
        }
    }
    return NULL;
}

void cache_put(const struct cache_key *key, const void *data, uint32_t length)
{
    uint64_t hash = hash_of(key->owner, key->place), number, claimed;
    struct frame *frame;

    if (length > CACHE_RECORD_MOST)
        return;
    cache_slot_reset(self()); /* of a call that was given up in here */
    frame = take(key, hash, &number, &claimed);
    if (!frame)
        return;
    __atomic_store_n(&frame->owner, key->owner, __ATOMIC_RELAXED);
    __atomic_store_n(&frame->place, key->place, __ATOMIC_RELAXED);
    __atomic_store_n(&frame->tag, key->tag, __ATOMIC_RELAXED);
    frame->length = length;
    frame->asked_for = 0;
#ifdef DB_TEST_PUBLISH_FIRST
    swap(frame, claimed, (claimed & ~CLAIMER) | VALID);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
    memcpy(frame->data, data, length);
    swap(frame, claimed, (claimed & ~CLAIMER) | VALID); /* a full barrier: what was written is there before */
    cache.slots[self()].claim = 0;
    cache.slots[self()].fills++;
    remember(hash, number);
}

void cache_slot_reset(uint32_t slot)
{
    uint64_t number = cache.slots[slot].claim;

    if (number) {
        struct frame *frame = frame_at(number - 1);
        uint64_t state = frame->state;

        if ((state & CLAIMER) == slot + 1)
            swap(frame, state, state & ~(CLAIMER | VALID));
        cache.slots[slot].claim = 0;
    }
}

/* ---- the rest ------------------------------------------------------------------------------ */

void cache_drop(uint64_t owner)
{
    uint64_t count = frame_count();

    for (uint64_t number = 0; number < count; number++) {
        struct frame *frame = frame_at(number);
        uint64_t state = frame->state;

        uint64_t claimed;

        if (state & VALID && frame->owner == owner && claim(frame, number, state, &claimed)) {
            forget(hash_of(owner, frame->place), number);
            cache_slot_reset(self());
        }
    }
}

void cache_statistics(struct cache_statistics *statistics)
{
    *statistics = (struct cache_statistics){.limit = limit(), .size = cache.chunk_count * sizeof(struct chunk)};
    for (uint32_t slot = 0; slot < SLOTS_MOST; slot++) {
        statistics->hits += cache.slots[slot].hits;
        statistics->fills += cache.slots[slot].fills;
    }
}
