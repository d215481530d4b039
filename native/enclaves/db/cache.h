/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Decrypted records of all databases, shared by all slots: what one has read or written is there for the others.
 *
 * A record is found by whose it is, its place, and its version: the tag under which it is encrypted in the file.
 * What is here was authenticated, or encrypted, by this enclave; whether that version is still the right one is
 * the caller's to know (shared.h, FRESHNESS).
 *
 * FRAMES.  Each holds one record, and has a state word.  Who fills a frame first claims it (one CAS, after which it is
 * no record any more and the claimer's alone), then publishes it (another CAS).  Readers copy, and look at the word
 * before and after: every claim counts it up.  So nobody waits for anybody, and a slot that dies in between leaves a
 * claimed frame, which the reset of the slot makes a free one.
 *
 * INDEX.  Where to look for a record: numbers of frames, each of which is a hint that the frame itself confirms or not.
 * So a hint that is missing, old or wrong makes a record unfound, never mistaken.
 *
 * SIZE.  Frames are added as they are needed, until the cache has what the heap has beyond CACHE_SLOT_SHARE for each
 * slot; but always a quarter of the heap.  Then the record goes that nobody has asked for since the last round (clock).
 */
#ifndef DB_CACHE_H
#define DB_CACHE_H

#include "thread.h"
#include "tmsdk.h"

#define CACHE_SLOT_SHARE (1u << 20) /* of the heap that stays a slot's: DB_MEMORY_MIN */
#ifndef CACHE_RECORD_MOST /* tests make it small */
#define CACHE_RECORD_MOST 4120u
#endif

struct cache_key {
    uint64_t owner; /* not 0 */
    uint64_t place;
    uint64_t tag;
};

/* Copy `length` bytes of the record, from `offset` on: false when it is not here. */
bool cache_get(const struct cache_key *key, uint32_t offset, uint32_t length, void *data);
/* Have it, if that is to be had at once.  Another version of that record goes. */
void cache_put(const struct cache_key *key, const void *data, uint32_t length);
/* Nothing of that owner's is here any more. */
void cache_drop(uint64_t owner);
/* The slot's holder is gone: from tm_on_slot_reset(). */
void cache_slot_reset(uint32_t slot);

struct cache_statistics {
    uint64_t limit;        /* bytes that it may take of the heap */
    uint64_t size;         /* bytes that it has taken */
    uint64_t hits;         /* records that were found */
    uint64_t fills;        /* and that were put */
};
void cache_statistics(struct cache_statistics *statistics);

#endif
