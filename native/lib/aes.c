/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AES-128 (FIPS 197), encryption only: CMAC and GCM need no more.
 *
 * Without AES-NI the S-box is computed in GF(2^8), eight bytes at a time: slow, but
 * without a table whose cache lines would tell the key.
 */
#include "aes.h"

#define _MM_MALLOC_H_INCLUDED
#include <immintrin.h>

#include "cpu.h"

#define BYTES(value) (0x0101010101010101ull * (value))

/* Each byte times x in GF(2^8). */
static uint64_t times_x(uint64_t a)
{
    uint64_t high = a & BYTES(0x80);
    return (a ^ high) << 1 ^ (high >> 7) * 0x1b;
}

static uint64_t multiply(uint64_t a, uint64_t b)
{
    uint64_t product = 0;
    for (unsigned i = 0; i < 8; i++) {
        product ^= a & (b >> i & BYTES(1)) * 0xff;
        a = times_x(a);
    }
    return product;
}

static uint64_t rotate_bytes_left(uint64_t a, unsigned count)
{
    uint64_t low = BYTES(0xffu >> count);
    return (a & low) << count | (a & ~low) >> (8 - count);
}

/* SubBytes: the inverse is the 254th power. */
static uint64_t substitute(uint64_t a)
{
    uint64_t a2 = multiply(a, a);
    uint64_t a3 = multiply(a2, a);
    uint64_t a6 = multiply(a3, a3);
    uint64_t a12 = multiply(a6, a6);
    uint64_t a15 = multiply(a12, a3);
    uint64_t a30 = multiply(a15, a15);
    uint64_t a60 = multiply(a30, a30);
    uint64_t a120 = multiply(a60, a60);
    uint64_t a126 = multiply(a120, a6);
    uint64_t a127 = multiply(a126, a);
    uint64_t inverse = multiply(a127, a127);

    return inverse ^ rotate_bytes_left(inverse, 1) ^ rotate_bytes_left(inverse, 2) ^
           rotate_bytes_left(inverse, 3) ^ rotate_bytes_left(inverse, 4) ^ BYTES(0x63);
}

static void init_portable(struct aes128 *aes, const uint8_t key[16])
{
    uint8_t *keys = aes->round_keys;
    uint8_t constant = 1;

    __builtin_memcpy(keys, key, 16);
    for (unsigned round = 1; round <= 10; round++, keys += 16) {
        uint8_t word[8] = {keys[13], keys[14], keys[15], keys[12], 0, 0, 0, 0};
        uint64_t packed;
        __builtin_memcpy(&packed, word, 8);
        packed = substitute(packed) ^ constant;
        __builtin_memcpy(word, &packed, 8);
        constant = (uint8_t)times_x(constant);
        for (unsigned i = 0; i < 4; i++)
            keys[16 + i] = keys[i] ^ word[i];
        for (unsigned i = 4; i < 16; i++)
            keys[16 + i] = keys[i] ^ keys[12 + i];
    }
}

static void encrypt_portable(const struct aes128 *aes, const uint8_t in[16], uint8_t out[16])
{
    uint64_t state[2], key[2];
    uint8_t bytes[16], mixed[16];

    __builtin_memcpy(state, in, 16);
    __builtin_memcpy(key, aes->round_keys, 16);
    state[0] ^= key[0];
    state[1] ^= key[1];
    for (unsigned round = 1; round <= 10; round++) {
        state[0] = substitute(state[0]);
        state[1] = substitute(state[1]);
        __builtin_memcpy(bytes, state, 16);
        for (unsigned i = 0; i < 16; i++) /* ShiftRows: row i % 4 moves left by i % 4 */
            mixed[i] = bytes[(i + 4 * (i % 4)) % 16];
        if (round < 10) {
            for (unsigned column = 0; column < 16; column += 4) {
                uint8_t *m = mixed + column;
                uint8_t all = m[0] ^ m[1] ^ m[2] ^ m[3], first = m[0];
                m[0] ^= all ^ (uint8_t)times_x(m[0] ^ m[1]);
                m[1] ^= all ^ (uint8_t)times_x(m[1] ^ m[2]);
                m[2] ^= all ^ (uint8_t)times_x(m[2] ^ m[3]);
                m[3] ^= all ^ (uint8_t)times_x(m[3] ^ first);
            }
        }
        __builtin_memcpy(state, mixed, 16);
        __builtin_memcpy(key, aes->round_keys + 16 * round, 16);
        state[0] ^= key[0];
        state[1] ^= key[1];
    }
    __builtin_memcpy(out, state, 16);
}

__attribute__((target("aes,sse2"))) static __m128i next_key(__m128i key, __m128i assist)
{
    assist = _mm_shuffle_epi32(assist, 0xff);
    key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
    key = _mm_xor_si128(key, _mm_slli_si128(key, 8));
    return _mm_xor_si128(key, assist);
}

__attribute__((target("aes,sse2"))) static void init_aesni(struct aes128 *aes, const uint8_t key[16])
{
    __m128i *keys = (__m128i *)aes->round_keys;
    __m128i k = _mm_loadu_si128((const __m128i *)key);

    _mm_store_si128(keys, k);
    /* The round constant is an immediate operand. */
#define EXPAND(round, constant) \
    k = next_key(k, _mm_aeskeygenassist_si128(k, constant)); \
    _mm_store_si128(keys + (round), k)
    EXPAND(1, 0x01);
    EXPAND(2, 0x02);
    EXPAND(3, 0x04);
    EXPAND(4, 0x08);
    EXPAND(5, 0x10);
    EXPAND(6, 0x20);
    EXPAND(7, 0x40);
    EXPAND(8, 0x80);
    EXPAND(9, 0x1b);
    EXPAND(10, 0x36);
#undef EXPAND
}

/* Up to eight independent blocks: AESENC has several cycles of latency and a throughput of one. */
__attribute__((target("aes,sse2"))) static void encrypt_aesni(const struct aes128 *aes, const uint8_t *in,
                                                              uint8_t *out, size_t blocks)
{
    const __m128i *keys = (const __m128i *)aes->round_keys;

    while (blocks) {
        size_t count = blocks >= 8 ? 8 : 1;
        __m128i state[8];

        if (count == 8) {
#pragma GCC unroll 8
            for (size_t i = 0; i < 8; i++)
                state[i] = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(in + 16 * i)), keys[0]);
            for (unsigned round = 1; round < 10; round++) {
#pragma GCC unroll 8
                for (size_t i = 0; i < 8; i++)
                    state[i] = _mm_aesenc_si128(state[i], keys[round]);
            }
#pragma GCC unroll 8
            for (size_t i = 0; i < 8; i++)
                _mm_storeu_si128((__m128i *)(out + 16 * i), _mm_aesenclast_si128(state[i], keys[10]));
        } else {
            state[0] = _mm_xor_si128(_mm_loadu_si128((const __m128i *)in), keys[0]);
            for (unsigned round = 1; round < 10; round++)
                state[0] = _mm_aesenc_si128(state[0], keys[round]);
            _mm_storeu_si128((__m128i *)out, _mm_aesenclast_si128(state[0], keys[10]));
        }
        in += 16 * count;
        out += 16 * count;
        blocks -= count;
    }
}

void aes128_init(struct aes128 *aes, const uint8_t key[16])
{
    if (cpu_features() & CPU_AES)
        init_aesni(aes, key);
    else
        init_portable(aes, key);
}

void aes128_encrypt(const struct aes128 *aes, const uint8_t in[16], uint8_t out[16])
{
    aes128_encrypt_blocks(aes, in, out, 1);
}

void aes128_encrypt_blocks(const struct aes128 *aes, const uint8_t *in, uint8_t *out, size_t blocks)
{
    if (cpu_features() & CPU_AES) {
        encrypt_aesni(aes, in, out, blocks);
        return;
    }
    for (; blocks; blocks--, in += 16, out += 16)
        encrypt_portable(aes, in, out);
}
