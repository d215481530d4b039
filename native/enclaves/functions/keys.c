/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a module with the grant imports from `teemate_keys`; all parameters are i32, and so is the result, an errno
 * of WASI, 0 for success:
 *
 *   put(key, key length, value, length)        sets it: EINVAL where a length is none that may be (1 to 256 bytes of
 *                                              key, up to 65536 of value), ENOSPC where the owner has too much
 *   get(key, key length, value, room, &length) ENOENT; ERANGE where there is not room enough, and `length` tells
 *   delete(key, key length)                    ENOENT
 *   list(prefix, prefix length, records, room, &cursor, &length)
 *                                              of keys that begin so: vault_record and key for each, in no order.
 *                                              The cursor is 8 bytes, 0 at first and when that was all; ERANGE where
 *                                              there is not room for what comes next, and `length` tells
 *
 * EAGAIN: somebody is held up in the middle of a change.  ENOMEM: the enclave's heap is full.  A change is whole or
 * not at all, whenever its client is killed, and others see it at once.
 */
#include "keys.h"

#include "../vault/table.h"
#include "engine.h"

enum {
    WASI_EAGAIN = 6,
    WASI_EINVAL = 28,
    WASI_ENOENT = 44,
    WASI_ENOMEM = 48,
    WASI_ENOSPC = 51,
    WASI_ERANGE = 68,
};

static struct table_limits limits;

int keys_start(void)
{
    const volatile struct tm_image_header *image = tm_enclave_base();

    limits = (struct table_limits){.keys = FN_KEYS_MAX,
                                   .bytes = image->heap_size / FN_KEYS_SHARE,
                                   .all_bytes = image->heap_size / FN_KEYS_ALL_SHARE};
    return table_start(&limits);
}

/* In the caller's own space, whatever function it is that asks. */
static struct place place_of(const uint8_t *key, size_t length)
{
    struct place place = {.space = VAULT_PRIVATE, .key = key, .key_length = (uint16_t)length};

#ifndef TM_TEST_NO_OWNERS /* Test build: everybody's keys are everybody's. */
    memcpy(place.principal, tm_caller().identity.principal, sizeof(place.principal));
#endif
    return place;
}

static int errno_of(int status)
{
    switch (status) {
    case 0:
        return 0;
    case VAULT_NOT_FOUND:
        return WASI_ENOENT;
    case VAULT_FULL:
        return WASI_ENOSPC;
    case TM_E_SPACE:
        return WASI_ERANGE;
    case TM_E_NOMEM:
        return WASI_ENOMEM;
    default:
        return WASI_EAGAIN;
    }
}

int keys_usage(struct fn_usage *usage)
{
    struct place place = place_of(NULL, 0);
    struct table_usage has;
    int status = table_usage(&place, &has);

    if (status)
        return status;
    usage->keys = has.keys;
    usage->keys_bytes = has.bytes;
    usage->keys_bytes_max = limits.bytes;
    return 0;
}

int keys_clear(void)
{
    struct place place = place_of(NULL, 0);

    return table_clear(&place);
}

int fn_keys_put(const uint8_t *key, size_t key_length, const uint8_t *value, size_t length)
{
    struct value put = {.length = (uint32_t)length, .bytes = value};
    struct place place;

    if (!key_length || key_length > VAULT_KEY_MAX || length > VAULT_VALUE_MAX)
        return WASI_EINVAL;
    place = place_of(key, key_length);
    return errno_of(table_put(&place, &put, NULL));
}

int fn_keys_get(const uint8_t *key, size_t key_length, uint8_t *value, size_t room, uint32_t *length)
{
    struct value got;
    struct place place;
    int status;

    if (!key_length || key_length > VAULT_KEY_MAX)
        return WASI_EINVAL;
    place = place_of(key, key_length);
    status = table_read(&place, &got, 0, value, room);
    if (status)
        return errno_of(status);
    *length = got.length;
    return got.length <= room ? 0 : WASI_ERANGE;
}

int fn_keys_delete(const uint8_t *key, size_t key_length)
{
    struct place place;

    if (!key_length || key_length > VAULT_KEY_MAX)
        return WASI_EINVAL;
    place = place_of(key, key_length);
    return errno_of(table_delete(&place));
}

int fn_keys_list(const uint8_t *prefix, size_t prefix_length, uint8_t *records, size_t room, uint64_t *cursor,
                 uint32_t *length)
{
    struct place place;
    uint32_t count;
    uint64_t next;
    size_t wrote;
    int status;

    if (prefix_length > VAULT_KEY_MAX)
        return WASI_EINVAL;
    place = place_of(prefix, prefix_length);
    status = table_scan(&place, false, records, room, *cursor, &wrote, &count, &next);
    if (!status)
        *cursor = next;
    *length = (uint32_t)wrote;
    return errno_of(status);
}
