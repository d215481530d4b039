/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The database enclave's page cache by itself, with small records, so that a caller can be killed at each
 * instruction.  What a record has to hold follows from its place and tag.  Numbers are u64, little endian.
 */
#include "thread.h"
#include "tmsdk.h"

/* What happens in the middle of the next copy. */
static void (*meddle)(void);

static void *meddled_copy(void *to, const void *from, size_t length)
{
    void (*what)(void) = meddle;
    size_t half = length / 2;

    __builtin_memcpy(to, from, half);
    meddle = NULL;
    if (what)
        what();
    __builtin_memcpy((uint8_t *)to + half, (const uint8_t *)from + half, length - half);
    return to;
}

#define memcpy(to, from, length) meddled_copy(to, from, length)
#include "cache.c"
#undef memcpy

#define OWNER 0x1000u

void tm_on_slot_reset(uint32_t slot)
{
#ifndef KEEP_CLAIMS
    cache_slot_reset(slot);
#else
    (void)slot;
#endif
}

static uint64_t argument(const struct tm_request *rq, size_t n)
{
    uint64_t value = 0;

    if (rq->in_len >= (n + 1) * sizeof(value))
        memcpy(&value, rq->in + n * sizeof(value), sizeof(value));
    return value;
}

static void record(uint64_t place, uint64_t tag, uint8_t data[CACHE_RECORD_MOST])
{
    for (uint32_t i = 0; i < CACHE_RECORD_MOST; i++)
        data[i] = (uint8_t)(place * 31 + tag * 7 + i);
}

static void put(uint64_t place, uint64_t tag)
{
    struct cache_key key = {OWNER, place, tag};
    uint8_t data[CACHE_RECORD_MOST];

    record(place, tag, data);
    cache_put(&key, data, sizeof(data));
}

/* 0: it is not there, 1: it is, 2: it is not what it has to be. */
static uint64_t get(uint64_t place, uint64_t tag)
{
    struct cache_key key = {OWNER, place, tag};
    uint8_t data[CACHE_RECORD_MOST], wanted[CACHE_RECORD_MOST];

    if (!cache_get(&key, 0, sizeof(data), data))
        return 0;
    record(place, tag, wanted);
    return memcmp(data, wanted, sizeof(data)) ? 2 : 1;
}

/* place, tag, and once more. */
TM_ECALL(put)
{
    for (size_t n = 0; (n + 2) * 8 <= rq->in_len; n += 2)
        put(argument(rq, n), argument(rq, n + 1));
    return 0;
}

TM_ECALL(get)
{
    uint64_t answer = get(argument(rq, 0), argument(rq, 1));

    return tm_reply(rq, &answer, sizeof(answer));
}

TM_ECALL(drop)
{
    cache_drop(OWNER);
    return 0;
}

/* Places from the first number on, as many as the second says, with tag 1. */
TM_ECALL(fill)
{
    for (uint64_t n = 0; n < argument(rq, 1); n++)
        put(argument(rq, 0) + n, 1);
    return 0;
}

TM_ECALL(frames)
{
    struct cache_statistics statistics;
    uint64_t answer[3];

    cache_statistics(&statistics);
    answer[0] = frame_count();
    answer[1] = statistics.limit;
    answer[2] = statistics.size;
    return tm_reply(rq, answer, sizeof(answer));
}

/* Of places below the first number and tags below the second: found, wrong; frames that are claimed; blocks that are owned. */
TM_ECALL(look)
{
    struct tm_heap_stats heap;
    uint64_t answer[4] = {0};
    int status = tm_heap_check(&heap);

    for (uint64_t place = 0; place < argument(rq, 0); place++)
        for (uint64_t tag = 1; tag < argument(rq, 1); tag++) {
            uint64_t found = get(place, tag);

            answer[0] += found != 0;
            answer[1] += found == 2;
        }
    for (uint64_t number = 0; number < frame_count(); number++)
        answer[2] += (frame_at(number)->state & CLAIMER) != 0;
    answer[3] = heap.owned;
    return status ? status : tm_reply(rq, answer, sizeof(answer));
}

static void replace(void)
{
    put(1, 2);
}

/* Place 1 is given another version while the first is being copied: what get() says of that. */
TM_ECALL(replaced)
{
    uint64_t answer[2];

    put(1, 1);
    meddle = replace;
    answer[0] = get(1, 1);
    answer[1] = get(1, 2);
    return tm_reply(rq, answer, sizeof(answer));
}

TM_ECALL(empty)
{
    return 0;
}
