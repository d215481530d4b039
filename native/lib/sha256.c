/* SPDX-License-Identifier: Apache-2.0 */
/* SHA-256 (FIPS 180-4): the SHA extensions where the CPU has them, else AVX2, else plain C. */
#include "crypto.h"

/* Not wanted: it brings in stdlib.h, which an enclave does not have. */
#define _MM_MALLOC_H_INCLUDED
#include <immintrin.h>

#include "cpu.h"

static const uint32_t round_constants[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline uint32_t rotate_right(uint32_t value, unsigned count)
{
    return value >> count | value << (32 - count);
}

static inline uint32_t load_be32(const uint8_t *from)
{
    uint32_t value;
    __builtin_memcpy(&value, from, sizeof(value));
    return __builtin_bswap32(value);
}

static void compress_portable(uint32_t state[8], const uint8_t *data, size_t blocks)
{
    for (; blocks; blocks--, data += 64) {
        uint32_t w[64];
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];

        for (unsigned t = 0; t < 16; t++)
            w[t] = load_be32(data + 4 * t);
        for (unsigned t = 16; t < 64; t++) {
            uint32_t s0 = rotate_right(w[t - 15], 7) ^ rotate_right(w[t - 15], 18) ^ w[t - 15] >> 3;
            uint32_t s1 = rotate_right(w[t - 2], 17) ^ rotate_right(w[t - 2], 19) ^ w[t - 2] >> 10;
            w[t] = w[t - 16] + s0 + w[t - 7] + s1;
        }
#pragma GCC unroll 8
        for (unsigned t = 0; t < 64; t++) {
            uint32_t s1 = rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25);
            uint32_t t1 = h + s1 + (g ^ (e & (f ^ g))) + round_constants[t] + w[t];
            uint32_t s0 = rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22);
            uint32_t t2 = s0 + ((a & b) | (c & (a | b)));
            h = g;
            g = f;
            f = e;
            e = d + t1;
            d = c;
            c = b;
            b = a;
            a = t1 + t2;
        }
        state[0] += a;
        state[1] += b;
        state[2] += c;
        state[3] += d;
        state[4] += e;
        state[5] += f;
        state[6] += g;
        state[7] += h;
    }
}

/*
 * SHA256RNDS2 keeps the state as two registers ABEF and CDGH (highest word
 * first) and does two rounds; MSG1 and MSG2 make four words of the schedule.
 */
__attribute__((target("sha,sse4.1,ssse3"))) static void compress_sha(uint32_t state[8], const uint8_t *data,
                                                                     size_t blocks)
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i dcba = _mm_loadu_si128((const __m128i *)&state[0]);
    __m128i hgfe = _mm_loadu_si128((const __m128i *)&state[4]);
    __m128i cdab = _mm_shuffle_epi32(dcba, 0xb1);
    __m128i efgh = _mm_shuffle_epi32(hgfe, 0x1b);
    __m128i abef = _mm_alignr_epi8(cdab, efgh, 8);
    __m128i cdgh = _mm_blend_epi16(efgh, cdab, 0xf0);

    for (; blocks; blocks--, data += 64) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];

#pragma GCC unroll 16
        for (unsigned t = 0; t < 16; t++) {
            if (t < 4) {
                __m128i raw = _mm_loadu_si128((const __m128i *)(data + 16 * t));
                w[t] = _mm_shuffle_epi8(raw, swap);
            } else {
                __m128i last = w[(t + 3) % 4], middle = w[(t + 2) % 4];
                __m128i next = _mm_sha256msg1_epu32(w[t % 4], w[(t + 1) % 4]);
                next = _mm_add_epi32(next, _mm_alignr_epi8(last, middle, 4));
                w[t % 4] = _mm_sha256msg2_epu32(next, last);
            }
            __m128i wk = _mm_add_epi32(w[t % 4], _mm_load_si128((const __m128i *)&round_constants[4 * t]));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, wk);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(wk, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }

    __m128i feba = _mm_shuffle_epi32(abef, 0x1b);
    __m128i dchg = _mm_shuffle_epi32(cdgh, 0xb1);
    _mm_storeu_si128((__m128i *)&state[0], _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128((__m128i *)&state[4], _mm_alignr_epi8(dchg, feba, 8));
}

#ifndef TEEMATE_ENCLAVE

/* Words 4 t to 4 t + 3 of the schedule, of two blocks at once, from the sixteen before them. */
__attribute__((target("avx2"))) static inline __m256i next_words(const __m256i w[4])
{
    const __m256i low_half = _mm256_set_epi64x(0, -1, 0, -1);
    __m256i w15 = _mm256_alignr_epi8(w[1], w[0], 4);
    __m256i w7 = _mm256_alignr_epi8(w[3], w[2], 4);
    __m256i s0 = _mm256_xor_si256(_mm256_srli_epi32(w15, 3),
                                  _mm256_xor_si256(_mm256_or_si256(_mm256_srli_epi32(w15, 7),
                                                                   _mm256_slli_epi32(w15, 25)),
                                                   _mm256_or_si256(_mm256_srli_epi32(w15, 18),
                                                                   _mm256_slli_epi32(w15, 14))));
    __m256i sum = _mm256_add_epi32(_mm256_add_epi32(w[0], w7), s0);

    /* The last two words need the first two: each doubled in 64 bits, where a shift is a rotation. */
    __m256i pair = _mm256_shuffle_epi32(w[3], 0xfa);
    __m256i s1 = _mm256_xor_si256(_mm256_srli_epi32(pair, 10),
                                  _mm256_xor_si256(_mm256_srli_epi64(pair, 17), _mm256_srli_epi64(pair, 19)));
    sum = _mm256_add_epi32(sum, _mm256_and_si256(_mm256_shuffle_epi32(s1, 0x08), low_half));
    pair = _mm256_shuffle_epi32(sum, 0x50);
    s1 = _mm256_xor_si256(_mm256_srli_epi32(pair, 10),
                          _mm256_xor_si256(_mm256_srli_epi64(pair, 17), _mm256_srli_epi64(pair, 19)));
    return _mm256_add_epi32(sum, _mm256_andnot_si256(low_half, _mm256_shuffle_epi32(s1, 0x80)));
}

#define ROUND(a, b, c, d, e, f, g, h, wk)                                                            \
    do {                                                                                               \
        uint32_t s1_ = rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25);                 \
        uint32_t s0_ = rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22);                 \
        h += (wk) + s1_ + ((e & f) + (~e & g));                                                        \
        d += h;                                                                                        \
        h += s0_ + ((a & b) + (c & (a ^ b)));                                                          \
    } while (0)

/* Eight rounds, after which every word is again where it was. */
#define ROUNDS(s, wk, stride)                                                 \
    do {                                                                        \
        ROUND(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], (wk)[0]);         \
        ROUND(s[7], s[0], s[1], s[2], s[3], s[4], s[5], s[6], (wk)[1]);         \
        ROUND(s[6], s[7], s[0], s[1], s[2], s[3], s[4], s[5], (wk)[2]);         \
        ROUND(s[5], s[6], s[7], s[0], s[1], s[2], s[3], s[4], (wk)[3]);         \
        ROUND(s[4], s[5], s[6], s[7], s[0], s[1], s[2], s[3], (wk)[stride]);     \
        ROUND(s[3], s[4], s[5], s[6], s[7], s[0], s[1], s[2], (wk)[(stride) + 1]); \
        ROUND(s[2], s[3], s[4], s[5], s[6], s[7], s[0], s[1], (wk)[(stride) + 2]); \
        ROUND(s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[0], (wk)[(stride) + 3]); \
    } while (0)

/* Pairs of blocks: the schedule of both is made while the rounds of the first are done. */
__attribute__((target("avx2,bmi,bmi2"))) static void compress_avx2(uint32_t state[8], const uint8_t *data,
                                                                   size_t pairs)
{
    const __m256i swap = _mm256_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203, 0x0c0d0e0f08090a0b,
                                           0x0405060700010203);
    /* Words plus constants: four of the first block, four of the second, and so on. */
    uint32_t wk[128] __attribute__((aligned(32)));

    for (; pairs; pairs--, data += 128) {
        uint32_t s[8];
        __m256i w[4];

        for (unsigned t = 0; t < 4; t++) {
            __m256i raw = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(data + 16 * t))),
                _mm_loadu_si128((const __m128i *)(data + 64 + 16 * t)), 1);
            w[t] = _mm256_shuffle_epi8(raw, swap);
        }
        __builtin_memcpy(s, state, sizeof(s));
#pragma GCC unroll 8
        for (unsigned t = 0; t < 16; t += 2) {
            for (unsigned i = t; i < t + 2; i++) {
                __m256i k = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)&round_constants[4 * i]));
                _mm256_store_si256((__m256i *)&wk[8 * i], _mm256_add_epi32(w[0], k));
                __m256i next = i < 12 ? next_words(w) : w[0];
                w[0] = w[1];
                w[1] = w[2];
                w[2] = w[3];
                w[3] = next;
            }
            ROUNDS(s, wk + 8 * t, 8);
        }
        for (unsigned i = 0; i < 8; i++)
            s[i] = state[i] += s[i];
#pragma GCC unroll 8
        for (unsigned t = 0; t < 16; t += 2)
            ROUNDS(s, wk + 8 * t + 4, 8);
        for (unsigned i = 0; i < 8; i++)
            state[i] += s[i];
    }
    crypto_wipe(wk, sizeof(wk));
}

#endif

static void compress(uint32_t state[8], const uint8_t *data, size_t blocks)
{
    if (cpu_features() & CPU_SHA)
        return compress_sha(state, data, blocks);
#ifndef TEEMATE_ENCLAVE
    if (blocks > 1 && (cpu_features() & CPU_AVX2)) {
        compress_avx2(state, data, blocks / 2);
        data += blocks / 2 * 128;
        blocks %= 2;
    }
#endif
    compress_portable(state, data, blocks);
}

void sha256_init(struct sha256 *sha)
{
    static const uint32_t initial[8] = {
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    };
    __builtin_memcpy(sha->state, initial, sizeof(initial));
    sha->length = 0;
}

void sha256_update(struct sha256 *sha, const void *data, size_t length)
{
    const uint8_t *from = data;
    size_t held = sha->length % 64;

    if (!length)
        return; /* data may be NULL then */
    sha->length += length;
    if (held) {
        size_t take = 64 - held < length ? 64 - held : length;
        __builtin_memcpy(sha->block + held, from, take);
        from += take;
        length -= take;
        if (held + take < 64)
            return;
        compress(sha->state, sha->block, 1);
    }
    if (length / 64) {
        compress(sha->state, from, length / 64);
        from += length & ~(size_t)63;
        length %= 64;
    }
    if (length)
        __builtin_memcpy(sha->block, from, length);
}

void sha256_final(struct sha256 *sha, uint8_t digest[32])
{
    size_t held = sha->length % 64;
    uint64_t bits = __builtin_bswap64(sha->length * 8);

    sha->block[held++] = 0x80;
    if (held > 56) {
        __builtin_memset(sha->block + held, 0, 64 - held);
        compress(sha->state, sha->block, 1);
        held = 0;
    }
    __builtin_memset(sha->block + held, 0, 56 - held);
    __builtin_memcpy(sha->block + 56, &bits, sizeof(bits));
    compress(sha->state, sha->block, 1);
    for (unsigned i = 0; i < 8; i++) {
        uint32_t word = __builtin_bswap32(sha->state[i]);
        __builtin_memcpy(digest + 4 * i, &word, sizeof(word));
    }
    crypto_wipe(sha, sizeof(*sha)); /* it may have been an HMAC's */
}
