/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The vault's hash table: shards with a lock each, so that processes that use
 * different keys do not meet.
 *
 * An entry never changes once it is linked: a new value is a new entry that takes the
 * place of the old one, and entry, shard and ownership of both blocks change in
 * one tm_txn.  So a death at any instruction leaves the old value or the new.
 *
 * No lock is held while the caller's memory is touched: a fault there would
 * keep it for ever.
 */
#ifndef VAULT_TABLE_H
#define VAULT_TABLE_H

#include "tmsdk.h"
#include "vault.h"

/* Whose key: principal is zero in the shared space. */
struct place {
    uint8_t principal[32];
    uint8_t space;
    uint16_t key_length;
    const uint8_t *key;
};

/* One value; `bytes` are the caller's. */
struct value {
    uint64_t version;
    uint64_t expires;
    uint32_t length;
    const uint8_t *bytes;
};

/* What a principal may have, and all together: keys, values, and what an entry takes beside. */
struct table_limits {
    uint64_t keys;
    uint64_t bytes;
    uint64_t all_bytes; /* by one value for each slot more, when all take the last at once */
};

struct table_usage {
    uint64_t keys;
    uint64_t bytes;
};

/*
 * Once, from tm_on_start().  With limits (which stay where they are) all keys of a principal lie in one shard,
 * whose lock covers its account: what it has changes in the step that changes the keys.  Versions are then of the
 * principal's own changes.
 */
int table_start(const struct table_limits *limits);

/*
 * Tell the value and copy up to `room` of its bytes from `offset` on; value->bytes
 * is not set.  Large values are read in pieces, without any memory of the heap:
 * value->version tells whether they are of one value.  0, VAULT_NOT_FOUND, TM_E_BUSY.
 */
int table_read(const struct place *place, struct value *value, size_t offset, void *buffer, size_t room);

/*
 * Write `value`; its version comes back.  With `compare` only when the present
 * version is *compare (0: there is none), else VAULT_CHANGED and *compare is what it is.
 */
int table_put(const struct place *place, struct value *value, uint64_t *compare);
int table_delete(const struct place *place);
/* With limits only: what the principal has, and delete all of it. */
int table_usage(const struct place *place, struct table_usage *usage);
int table_clear(const struct place *place);

/*
 * Collect vault_records in `out` from bucket `cursor` on, as many whole buckets as its
 * `room` bytes hold; with limits, of the principal's shard alone, from its first if `cursor` is none of it.
 * TM_E_SPACE when one bucket alone needs more: *length tells.
 */
int table_scan(const struct place *prefix, bool with_values, uint8_t *out, size_t room, uint64_t cursor,
               size_t *length, uint32_t *count, uint64_t *next);

/* One entry of table_dump(), followed by key and value. */
struct table_record {
    uint8_t principal[32];
    uint64_t expires;
    uint32_t value_length;
    uint16_t key_length;
    uint16_t space;
};
_Static_assert(sizeof(struct table_record) == 48, "table_record");

/* As table_scan(), of everybody's entries in both spaces, those that are over left out. */
int table_dump(uint8_t *out, size_t room, uint64_t cursor, size_t *length, uint32_t *count, uint64_t *next);
/* The largest version that was given out. */
uint64_t table_version(void);
/* Give out only larger ones from now on. */
int table_raise(uint64_t version);

#endif
