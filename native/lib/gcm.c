/* SPDX-License-Identifier: Apache-2.0 */
/* AES-128-GCM (NIST SP 800-38D) with a 96-bit IV. */
#include "aes.h"

#define _MM_MALLOC_H_INCLUDED
#include <immintrin.h>

#include "cpu.h"

struct ghash {
    uint64_t h[2]; /* the key: first eight bytes as a big-endian number, then the others */
    uint64_t y[2];
};

static uint64_t load_be64(const uint8_t *from)
{
    uint64_t value;
    __builtin_memcpy(&value, from, sizeof(value));
    return __builtin_bswap64(value);
}

static void store_be64(uint8_t *to, uint64_t value)
{
    value = __builtin_bswap64(value);
    __builtin_memcpy(to, &value, sizeof(value));
}

/* y = y * h, bit by bit, with masks instead of branches. */
static void ghash_multiply_portable(struct ghash *ghash)
{
    uint64_t z0 = 0, z1 = 0, v0 = ghash->h[0], v1 = ghash->h[1];

    for (unsigned i = 0; i < 128; i++) {
        uint64_t bit = -(ghash->y[i / 64] >> (63 - i % 64) & 1);
        z0 ^= v0 & bit;
        z1 ^= v1 & bit;
        uint64_t carry = -(v1 & 1);
        v1 = v1 >> 1 | v0 << 63;
        v0 = v0 >> 1 ^ (carry & 0xe100000000000000);
    }
    ghash->y[0] = z0;
    ghash->y[1] = z1;
}

/*
 * The same by carry-less multiplication.  GHASH counts bits from the other end, so
 * the product of the reflected operands is the reflected product shifted right by
 * one; it is shifted left, then reduced by x^128 + x^7 + x^2 + x + 1.
 */
__attribute__((target("pclmul,sse2"))) static void ghash_multiply_pclmul(struct ghash *ghash)
{
    __m128i y = _mm_set_epi64x((long long)ghash->y[0], (long long)ghash->y[1]);
    __m128i h = _mm_set_epi64x((long long)ghash->h[0], (long long)ghash->h[1]);
    __m128i low = _mm_clmulepi64_si128(y, h, 0x00);
    __m128i high = _mm_clmulepi64_si128(y, h, 0x11);
    __m128i middle = _mm_xor_si128(_mm_clmulepi64_si128(y, h, 0x01), _mm_clmulepi64_si128(y, h, 0x10));
    low = _mm_xor_si128(low, _mm_slli_si128(middle, 8));
    high = _mm_xor_si128(high, _mm_srli_si128(middle, 8));

    uint64_t p[4], product[4];
    _mm_storeu_si128((__m128i *)&p[0], low);
    _mm_storeu_si128((__m128i *)&p[2], high);
    product[0] = p[0] << 1;
    for (unsigned i = 1; i < 4; i++)
        product[i] = p[i] << 1 | p[i - 1] >> 63;

    /* The lower half holds the higher powers: fold word 0 into words 1 and 2, then word 1 into 2 and 3. */
    for (unsigned i = 0; i < 2; i++) {
        uint64_t w = product[i];
        product[i + 1] ^= w << 63 ^ w << 62 ^ w << 57;
        product[i + 2] ^= w ^ w >> 1 ^ w >> 2 ^ w >> 7;
    }
    ghash->y[0] = product[3];
    ghash->y[1] = product[2];
}

static void ghash_block(struct ghash *ghash, uint64_t first, uint64_t second)
{
    ghash->y[0] ^= first;
    ghash->y[1] ^= second;
    if (cpu_features() & CPU_AES)
        ghash_multiply_pclmul(ghash);
    else
        ghash_multiply_portable(ghash);
}

/* `data`, padded with zeros to whole blocks. */
static void ghash_update(struct ghash *ghash, const uint8_t *data, size_t length)
{
    for (; length >= 16; length -= 16, data += 16)
        ghash_block(ghash, load_be64(data), load_be64(data + 8));
    if (length) {
        uint8_t last[16] = {0};
        __builtin_memcpy(last, data, length);
        ghash_block(ghash, load_be64(last), load_be64(last + 8));
    }
}

struct gcm {
    struct aes128 aes;
    struct ghash ghash;
    uint8_t counter[16];
};

static void gcm_init(struct gcm *gcm, const uint8_t key[16], const uint8_t iv[12])
{
    uint8_t h[16] = {0};

    aes128_init(&gcm->aes, key);
    aes128_encrypt(&gcm->aes, h, h);
    gcm->ghash = (struct ghash){.h = {load_be64(h), load_be64(h + 8)}};
    __builtin_memcpy(gcm->counter, iv, 12);
    __builtin_memset(gcm->counter + 12, 0, 4);
    crypto_wipe(h, sizeof(h));
}

static void set_counter(uint8_t block[16], uint32_t count)
{
    count = __builtin_bswap32(count);
    __builtin_memcpy(block + 12, &count, 4);
}

/* Counter mode from counter 2 on (1 is the tag's). */
static void gcm_crypt(struct gcm *gcm, const uint8_t *in, uint8_t *out, size_t length)
{
    uint8_t stream[8 * 16];
    uint32_t count = 2;

    while (length) {
        size_t take = length < sizeof(stream) ? length : sizeof(stream);
        size_t blocks = (take + 15) / 16;
        for (size_t i = 0; i < blocks; i++) {
            set_counter(gcm->counter, count++);
            __builtin_memcpy(stream + 16 * i, gcm->counter, 16);
        }
        aes128_encrypt_blocks(&gcm->aes, stream, stream, blocks);
        for (size_t i = 0; i < take; i++)
            out[i] = in[i] ^ stream[i];
        in += take;
        out += take;
        length -= take;
    }
    crypto_wipe(stream, sizeof(stream));
}

static void gcm_tag(struct gcm *gcm, const void *aad, size_t aad_length, const void *cipher, size_t length,
                    uint8_t tag[16])
{
    uint8_t block[16];

    ghash_update(&gcm->ghash, aad, aad_length);
    ghash_update(&gcm->ghash, cipher, length);
    ghash_block(&gcm->ghash, (uint64_t)aad_length * 8, (uint64_t)length * 8);
    set_counter(gcm->counter, 1);
    aes128_encrypt(&gcm->aes, gcm->counter, block);
    store_be64(tag, gcm->ghash.y[0] ^ load_be64(block));
    store_be64(tag + 8, gcm->ghash.y[1] ^ load_be64(block + 8));
    crypto_wipe(block, sizeof(block));
}

void aes128_gcm_seal(const uint8_t key[16], const uint8_t iv[12], const void *aad, size_t aad_length,
                     const void *in, size_t length, void *out, uint8_t tag[16])
{
    struct gcm gcm;

    gcm_init(&gcm, key, iv);
    gcm_crypt(&gcm, in, out, length);
    gcm_tag(&gcm, aad, aad_length, out, length, tag);
    crypto_wipe(&gcm, sizeof(gcm));
}

int aes128_gcm_open(const uint8_t key[16], const uint8_t iv[12], const void *aad, size_t aad_length,
                    const void *in, size_t length, void *out, const uint8_t tag[16])
{
    struct gcm gcm;
    uint8_t right[16];
    int wrong;

    gcm_init(&gcm, key, iv);
    gcm_tag(&gcm, aad, aad_length, in, length, right);
    wrong = crypto_compare(right, tag, sizeof(right));
    if (wrong)
        crypto_wipe(out, length);
    else
        gcm_crypt(&gcm, in, out, length);
    crypto_wipe(&gcm, sizeof(gcm));
    crypto_wipe(right, sizeof(right));
    return wrong ? -1 : 0;
}
