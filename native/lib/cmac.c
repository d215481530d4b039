/* SPDX-License-Identifier: Apache-2.0 */
/* AES-128-CMAC (RFC 4493): the MAC of EREPORT. */
#include "crypto.h"

/* Times x in GF(2^128), most significant byte first; no branch on the secret. */
static void double_block(uint8_t block[16])
{
    uint8_t carry = 0;
    for (int i = 15; i >= 0; i--) {
        uint8_t next = block[i] >> 7;
        block[i] = (uint8_t)(block[i] << 1 | carry);
        carry = next;
    }
    block[15] ^= (uint8_t)-carry & 0x87;
}

void aes128_cmac(const uint8_t key[16], const void *data, size_t length, uint8_t mac[16])
{
    struct aes128 aes;
    const uint8_t *from = data;
    uint8_t subkey[16] = {0}, last[16] = {0}, state[16] = {0};

    aes128_init(&aes, key);
    aes128_encrypt(&aes, subkey, subkey);
    double_block(subkey); /* K1: for a whole last block */

    for (; length > 16; length -= 16, from += 16) {
        for (unsigned i = 0; i < 16; i++)
            state[i] ^= from[i];
        aes128_encrypt(&aes, state, state);
    }
    if (length)
        __builtin_memcpy(last, from, length);
    if (length < 16) {
        last[length] = 0x80;
        double_block(subkey); /* K2: for a padded one */
    }
    for (unsigned i = 0; i < 16; i++)
        state[i] ^= last[i] ^ subkey[i];
    aes128_encrypt(&aes, state, mac);

    crypto_wipe(&aes, sizeof(aes));
    crypto_wipe(subkey, sizeof(subkey));
    crypto_wipe(last, sizeof(last));
}
