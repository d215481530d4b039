/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The cryptography that SGX itself consists of.  Freestanding: the same sources
 * are compiled into enclaves by the SDK (which has no CPUID: there
 * TEEMATE_ENCLAVE is defined and the CPU is taken to have AES-NI, PCLMULQDQ and
 * RDRAND, as every CPU with SGX has; SHA instructions only with TEEMATE_ENCLAVE_SHA).
 */
#ifndef TEEMATE_CRYPTO_H
#define TEEMATE_CRYPTO_H

#include <stddef.h>
#include <stdint.h>

struct sha256 {
    uint32_t state[8];
    uint64_t length;
    uint8_t block[64];
};
void sha256_init(struct sha256 *sha);
void sha256_update(struct sha256 *sha, const void *data, size_t length);
void sha256_final(struct sha256 *sha, uint8_t digest[32]);

void hmac_sha256(const void *key, size_t key_length, const void *data, size_t length, uint8_t mac[32]);
/* HMAC over two pieces. */
void hmac_sha256_2(const void *key, size_t key_length, const void *a, size_t a_length, const void *b,
                   size_t b_length, uint8_t mac[32]);

struct aes128 {
    uint8_t round_keys[176] __attribute__((aligned(16)));
};
void aes128_init(struct aes128 *aes, const uint8_t key[16]);
void aes128_encrypt(const struct aes128 *aes, const uint8_t in[16], uint8_t out[16]);
void aes128_cmac(const uint8_t key[16], const void *data, size_t length, uint8_t mac[16]);

/* AES-128-GCM, 96-bit IV, 128-bit tag.  open returns 0, or -1 (and wipes out) when the tag is wrong. */
void aes128_gcm_seal(const uint8_t key[16], const uint8_t iv[12], const void *aad, size_t aad_length,
                     const void *in, size_t length, void *out, uint8_t tag[16]);
int aes128_gcm_open(const uint8_t key[16], const uint8_t iv[12], const void *aad, size_t aad_length,
                    const void *in, size_t length, void *out, const uint8_t tag[16]);

/* 0 when equal; takes the same time whatever differs. */
int crypto_compare(const void *a, const void *b, size_t length);
void crypto_wipe(void *data, size_t length);

/*
 * RSA-3072 with exponent 3, little-endian numbers of 384 bytes, as EINIT does
 * it with Q1 and Q2 (SDM, SIGSTRUCT): is signature^3 mod modulus the PKCS #1
 * v1.5 padding of `digest`?  0; -1 when the signature is wrong; -2 when it is
 * right and only Q1 or Q2 is not.
 */
int rsa3072_e3_verify(const uint8_t modulus[384], const uint8_t signature[384], const uint8_t q1[384],
                      const uint8_t q2[384], const uint8_t digest[32]);

#endif
