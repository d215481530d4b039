/* SPDX-License-Identifier: Apache-2.0 */
/* What table.c and table_walk.c share: how the table lies in memory. */
#ifndef VAULT_TABLE_INSIDE_H
#define VAULT_TABLE_INSIDE_H

#include "table.h"

#ifdef TM_TEST_ONE_BUCKET /* Test build: all keys of everybody lie in it. */
#define SHARDS 1u
#define BUCKETS_MIN 1u
#define BUCKETS_MAX 1u
#else
#define SHARDS 64u
#define BUCKETS_MIN 16u   /* per shard */
#define BUCKETS_MAX 4096u /* per shard */
#endif

struct entry {
    struct entry *next;
    uint64_t hash;
    uint64_t version;
    uint64_t expires;
    uint32_t value_length;
    uint16_t key_length;
    uint8_t space;
    uint8_t reserved;
    uint8_t principal[32];
    uint8_t bytes[]; /* key, value */
};

/* What a principal has, while it has something. */
struct account {
    struct account *next;
    struct table_usage usage;
    uint64_t version; /* the last one given out: the shard's would tell what others do */
    uint8_t principal[32];
};

struct shard {
    struct tm_mutex mutex;
    uint64_t version; /* the last one given out, where there are no accounts */
    uint64_t bytes;   /* of all accounts */
    struct account *accounts;
} __attribute__((aligned(64)));

struct table {
    struct shard shards[SHARDS];
    uint64_t seed[2];  /* nobody outside can make keys collide */
    uint64_t buckets;  /* per shard, a power of two */
    struct entry **heads;
    const struct table_limits *limits;
};
extern struct table table;

/* Its last digits are the shard. */
uint64_t table_hash(const struct place *place);
int shard_lock(struct shard *shard);

static inline bool is_at(const struct entry *entry, const struct place *place)
{
    return entry->space == place->space && !memcmp(entry->principal, place->principal, sizeof(entry->principal));
}

static inline bool is_over(const struct entry *entry)
{
    return entry->expires && entry->expires <= tm_time();
}

#endif
