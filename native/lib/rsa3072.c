/* SPDX-License-Identifier: Apache-2.0 */
/*
 * RSA-3072 with exponent 3, as EINIT verifies a SIGSTRUCT (SDM 3D, "SIGSTRUCT").
 *
 * The signer gives two quotients, so that the verifier only multiplies:
 *   q1 = floor(s^2 / m)                  r1 = s^2 - q1 m
 *   q2 = floor((s^3 - q1 s m) / m)       r2 = r1 s - q2 m  =  s^3 mod m
 * Everything here is public: nothing needs constant time.
 */
#include "crypto.h"

#define LIMBS 48 /* 3072 bits in 64-bit words, least significant first */

struct number {
    uint64_t limb[LIMBS];
};

struct product {
    uint64_t limb[2 * LIMBS];
};

static void multiply(struct product *out, const struct number *a, const struct number *b)
{
    __builtin_memset(out, 0, sizeof(*out));
    for (unsigned i = 0; i < LIMBS; i++) {
        uint64_t carry = 0;
        for (unsigned j = 0; j < LIMBS; j++) {
            unsigned __int128 sum =
                (unsigned __int128)a->limb[i] * b->limb[j] + out->limb[i + j] + carry;
            out->limb[i + j] = (uint64_t)sum;
            carry = (uint64_t)(sum >> 64);
        }
        out->limb[i + LIMBS] = carry;
    }
}

/* a -= b; returns the borrow. */
static uint64_t subtract(uint64_t *a, const uint64_t *b, unsigned count)
{
    uint64_t borrow = 0;
    for (unsigned i = 0; i < count; i++) {
        unsigned __int128 difference = (unsigned __int128)a[i] - b[i] - borrow;
        a[i] = (uint64_t)difference;
        borrow = (uint64_t)(difference >> 64) & 1;
    }
    return borrow;
}

static int is_less(const struct number *a, const struct number *b)
{
    for (int i = LIMBS - 1; i >= 0; i--)
        if (a->limb[i] != b->limb[i])
            return a->limb[i] < b->limb[i];
    return 0;
}

/* r = a b - q m when that is in [0, m); else -1: q is not the quotient. */
static int reduce_with(struct number *r, const struct number *a, const struct number *b,
                       const struct number *q, const struct number *m)
{
    struct product left, right;

    multiply(&left, a, b);
    multiply(&right, q, m);
    if (subtract(left.limb, right.limb, 2 * LIMBS))
        return -1;
    for (unsigned i = LIMBS; i < 2 * LIMBS; i++)
        if (left.limb[i])
            return -1;
    __builtin_memcpy(r, left.limb, sizeof(*r));
    return is_less(r, m) ? 0 : -1;
}

/* r = a b mod m by long division: only to tell a wrong quotient from a wrong signature. */
static void reduce(struct number *r, const struct number *a, const struct number *b, const struct number *m)
{
    struct product p;

    multiply(&p, a, b);
    __builtin_memset(r, 0, sizeof(*r));
    for (int bit = 2 * 64 * LIMBS - 1; bit >= 0; bit--) {
        uint64_t carry = p.limb[bit / 64] >> (bit % 64) & 1;
        for (unsigned i = 0; i < LIMBS; i++) {
            uint64_t out = r->limb[i] >> 63;
            r->limb[i] = r->limb[i] << 1 | carry;
            carry = out;
        }
        if (carry || !is_less(r, m))
            subtract(r->limb, m->limb, LIMBS);
    }
}

/* EMSA-PKCS1-v1_5 of a SHA-256 digest (RFC 8017, 9.2), as a little-endian number. */
static void pad_digest(uint8_t out[384], const uint8_t digest[32])
{
    static const uint8_t algorithm[19] = {0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01,
                                          0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20};

    __builtin_memset(out, 0xff, 384);
    out[383] = 0x00;
    out[382] = 0x01;
    out[51] = 0x00;
    for (unsigned i = 0; i < 19; i++)
        out[50 - i] = algorithm[i];
    for (unsigned i = 0; i < 32; i++)
        out[31 - i] = digest[i];
}

int rsa3072_e3_verify(const uint8_t modulus[384], const uint8_t signature[384], const uint8_t q1[384],
                      const uint8_t q2[384], const uint8_t digest[32])
{
    struct number m, s, first, second, remainder, result;
    uint8_t padded[384];

    __builtin_memcpy(&m, modulus, 384); /* x86 is little endian, as the fields are */
    __builtin_memcpy(&s, signature, 384);
    __builtin_memcpy(&first, q1, 384);
    __builtin_memcpy(&second, q2, 384);
    pad_digest(padded, digest);
    if (!is_less(&s, &m))
        return -1;

    if (reduce_with(&remainder, &s, &s, &first, &m) == 0 &&
        reduce_with(&result, &remainder, &s, &second, &m) == 0)
        return crypto_compare(&result, padded, 384) ? -1 : 0;

    reduce(&remainder, &s, &s, &m);
    reduce(&result, &remainder, &s, &m);
    return crypto_compare(&result, padded, 384) ? -1 : -2;
}
