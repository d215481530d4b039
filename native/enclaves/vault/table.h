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

/* One value, on its own block of the heap. */
struct value {
    uint64_t version;
    uint64_t expires;
    uint32_t length;
    const uint8_t *bytes;
};

/* Once, from tm_on_start(). */
int table_start(void);

/*
 * Copies the value to a block of the heap, the caller's to free (NULL when it is
 * empty or fits `small`, of `room` bytes; value->bytes says where it is).
 * 0, VAULT_NOT_FOUND, TM_E_NOMEM, TM_E_BUSY.
 */
int table_get(const struct place *place, struct value *value, void *small, size_t room, void **block);

/*
 * Write `value`; its version comes back.  With `compare` only when the present
 * version is *compare (0: there is none), else VAULT_CHANGED and *compare is what it is.
 */
int table_put(const struct place *place, struct value *value, uint64_t *compare);
int table_delete(const struct place *place);

/*
 * Collect vault_records from bucket `cursor` on into a block of the heap (the
 * caller's to free), as many whole buckets as `room` bytes hold.  TM_E_SPACE when
 * one bucket alone needs more: *length tells.
 */
int table_scan(const struct place *prefix, bool with_values, size_t room, uint64_t cursor, uint8_t **block,
               size_t *length, uint32_t *count, uint64_t *next);

#endif
