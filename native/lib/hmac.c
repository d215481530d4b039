/* SPDX-License-Identifier: Apache-2.0 */
/* HMAC-SHA256 (RFC 2104), and what handles secrets in memory. */
#include "crypto.h"

void hmac_sha256_2(const void *key, size_t key_length, const void *a, size_t a_length, const void *b,
                   size_t b_length, uint8_t mac[32])
{
    struct sha256 sha;
    uint8_t padded[64] = {0};
    uint8_t inner[32];

    if (key_length > sizeof(padded)) {
        sha256_init(&sha);
        sha256_update(&sha, key, key_length);
        sha256_final(&sha, padded);
    } else if (key_length) {
        __builtin_memcpy(padded, key, key_length);
    }

    for (size_t i = 0; i < sizeof(padded); i++)
        padded[i] ^= 0x36;
    sha256_init(&sha);
    sha256_update(&sha, padded, sizeof(padded));
    sha256_update(&sha, a, a_length);
    sha256_update(&sha, b, b_length);
    sha256_final(&sha, inner);

    for (size_t i = 0; i < sizeof(padded); i++)
        padded[i] ^= 0x36 ^ 0x5c;
    sha256_init(&sha);
    sha256_update(&sha, padded, sizeof(padded));
    sha256_update(&sha, inner, sizeof(inner));
    sha256_final(&sha, mac);

    crypto_wipe(padded, sizeof(padded));
    crypto_wipe(inner, sizeof(inner));
}

void hmac_sha256(const void *key, size_t key_length, const void *data, size_t length, uint8_t mac[32])
{
    hmac_sha256_2(key, key_length, data, length, (const void *)0, 0, mac);
}

int crypto_compare(const void *a, const void *b, size_t length)
{
    const volatile uint8_t *left = a, *right = b;
    uint8_t difference = 0;

    for (size_t i = 0; i < length; i++)
        difference |= left[i] ^ right[i];
    return difference != 0;
}

void crypto_wipe(void *data, size_t length)
{
    __builtin_memset(data, 0, length);
    /* The compiler may not drop the stores: somebody could look at them here. */
    __asm__ volatile("" : : "r"(data) : "memory");
}
