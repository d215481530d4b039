/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Keys and values of a function's owner, for functions that were deployed with the grant "keys".
 *
 * All return 0 or an errno: EINVAL (1 to 256 bytes of key, up to 65536 of value), ENOENT, ERANGE (there is not room
 * enough, and *length says what would do), ENOSPC (the owner has too much), ENOMEM (the enclave is full), EAGAIN.
 */
#ifndef KEYS_H
#define KEYS_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>

#define KEYS_IMPORT(NAME) __attribute__((import_module("teemate_keys"), import_name(#NAME)))

/* Of each key that is listed; the key follows. */
struct keys_record {
    uint16_t key_length;
    uint16_t reserved;
    uint32_t value_length;
    uint64_t version; /* another for every change; of another owner's it tells nothing */
    uint64_t expires; /* 0 */
};

KEYS_IMPORT(put) int keys_put(const void *key, size_t key_length, const void *value, size_t length);
KEYS_IMPORT(get) int keys_get(const void *key, size_t key_length, void *value, size_t room, uint32_t *length);
KEYS_IMPORT(delete) int keys_delete(const void *key, size_t key_length);
/* Some of the keys that begin with the prefix; all were told when it succeeds and *cursor, 0 at first, is 0 again. */
KEYS_IMPORT(list)
int keys_list(const void *prefix, size_t prefix_length, void *records, size_t room, uint64_t *cursor, uint32_t *length);

#endif
