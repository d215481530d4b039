/* SPDX-License-Identifier: Apache-2.0 */
/* Going through the table: lists, exports, and everything for a successor. */
#include "table_inside.h"

static bool is_listed(const struct entry *entry, const struct place *prefix)
{
    return is_at(entry, prefix) && !is_over(entry) && entry->key_length >= prefix->key_length &&
           !memcmp(entry->bytes, prefix->key, prefix->key_length);
}

static size_t record_size(const struct entry *entry, bool with_values)
{
    return sizeof(struct vault_record) + entry->key_length + (with_values ? entry->value_length : 0);
}

/* Bytes that the bucket's records take; the first `room` of them are written. */
static size_t scan_bucket(struct entry *entry, const struct place *prefix, bool with_values, uint8_t *out,
                          size_t room, uint32_t *count)
{
    size_t length = 0;

    for (; entry; entry = entry->next) {
        struct vault_record record = {
            .key_length = entry->key_length,
            .value_length = entry->value_length,
            .version = entry->version,
            .expires = entry->expires,
        };
        size_t size = record_size(entry, with_values);

        if (!is_listed(entry, prefix))
            continue;
        if (length + size <= room) {
            memcpy(out + length, &record, sizeof(record));
            memcpy(out + length + sizeof(record), entry->bytes, size - sizeof(record));
        }
        length += size;
        ++*count;
    }
    return length;
}

/* Write the records of a bucket, as scan_bucket(); `what` is the caller's. */
typedef size_t write_bucket(struct entry *entry, const void *what, uint8_t *out, size_t room, uint32_t *count);

static int walk(write_bucket *write, const void *what, uint8_t *out, size_t room, uint64_t cursor, uint64_t buckets,
                size_t *length, uint32_t *count, uint64_t *next)
{
    int status = 0;

    *length = 0;
    *count = 0;
    while (cursor < buckets) {
        struct shard *shard = &table.shards[cursor / table.buckets];
        uint64_t end = (cursor / table.buckets + 1) * table.buckets;
        bool full = false;

        status = shard_lock(shard);
        if (status)
            break;
        /* A few at a time: others wait for this lock. */
        for (unsigned n = 0; cursor < end && n < 256; cursor++, n++) {
            uint32_t some = 0;
            size_t size = write(table.heads[cursor], what, out + *length, room - *length, &some);

            if (size > room - *length) {
                full = true;
                if (!*length) {
                    *length = size;
                    status = TM_E_SPACE;
                }
                break;
            }
            *length += size;
            *count += some;
        }
        tm_unlock(&shard->mutex);
        if (full)
            break;
    }
    *next = cursor < buckets ? cursor : 0;
    return status;
}

struct scanned {
    const struct place *prefix;
    bool with_values;
};

static size_t scan_one(struct entry *entry, const void *what, uint8_t *out, size_t room, uint32_t *count)
{
    const struct scanned *scanned = what;

    return scan_bucket(entry, scanned->prefix, scanned->with_values, out, room, count);
}

int table_scan(const struct place *prefix, bool with_values, uint8_t *out, size_t room, uint64_t cursor,
               size_t *length, uint32_t *count, uint64_t *next)
{
    struct scanned scanned = {prefix, with_values};
    uint64_t end = table.buckets * SHARDS;

    if (table.limits) { /* all of them lie in one shard */
        uint64_t first = table_hash(prefix) % SHARDS * table.buckets;

        end = first + table.buckets;
        if (cursor < first || cursor >= end)
            cursor = first;
    }
    return walk(scan_one, &scanned, out, room, cursor, end, length, count, next);
}

/* ---- everything, for a successor ---------------------------------------------------- */

static size_t dump_one(struct entry *entry, const void *what, uint8_t *out, size_t room, uint32_t *count)
{
    size_t length = 0;

    (void)what;
    for (; entry; entry = entry->next) {
        struct table_record record = {.expires = entry->expires,
                                      .value_length = entry->value_length,
                                      .key_length = entry->key_length,
                                      .space = entry->space};
        size_t size = (size_t)entry->key_length + entry->value_length;

        if (is_over(entry))
            continue;
        memcpy(record.principal, entry->principal, sizeof(record.principal));
        if (length + sizeof(record) + size <= room) {
            memcpy(out + length, &record, sizeof(record));
            memcpy(out + length + sizeof(record), entry->bytes, size);
        }
        length += sizeof(record) + size;
        ++*count;
    }
    return length;
}

int table_dump(uint8_t *out, size_t room, uint64_t cursor, size_t *length, uint32_t *count, uint64_t *next)
{
    return walk(dump_one, NULL, out, room, cursor, table.buckets * SHARDS, length, count, next);
}
