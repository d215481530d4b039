/* SPDX-License-Identifier: Apache-2.0 */
/* A SIGSTRUCT by itself, checked as EINIT does (SDM 3D, "SIGSTRUCT" and "EINIT"). */
#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "crypto.h"
#include "enclave.h"

/* The negative control of the tests that guard the signature. */
#ifdef TEEMATE_TEST_BUILD_SIGNATURE
#define SIGNATURE_CHECKED false
#else
#define SIGNATURE_CHECKED true
#endif

#define FIELD(name) offsetof(struct sgx_sigstruct, name), sizeof(((struct sgx_sigstruct *)0)->name)

static const uint8_t header[16] = {6, 0, 0, 0, 0xe1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0};
static const uint8_t header2[16] = {1, 1, 0, 0, 0x60, 0, 0, 0, 0x60, 0, 0, 0, 1, 0, 0, 0};
static const uint8_t exponent[4] = {3, 0, 0, 0};
static const uint8_t zeros[84];

/* Fields that have one legal value. */
static const struct constant {
    size_t offset, size;
    const uint8_t *value;
    const char *wrong;
} constants[] = {
    {FIELD(header), header, "HEADER is not that of a SIGSTRUCT"},
    {FIELD(header2), header2, "HEADER2 is not that of a SIGSTRUCT with a 3072-bit key"},
    {FIELD(reserved1), zeros, "the reserved bytes after SWDEFINED are not zero"},
    {FIELD(exponent), exponent, "EXPONENT is not 3"},
    {FIELD(reserved2), zeros, "the reserved bytes after MISCMASK are not zero"},
    {FIELD(reserved3), zeros, "the reserved bytes after ENCLAVEHASH are not zero"},
    {FIELD(reserved4), zeros, "the reserved bytes after ISVSVN are not zero"},
};

static int malformed(struct teemate_diag *diag, size_t offset, const char *wrong)
{
    return diag_set(diag, -EBADMSG, TEEMATE_STEP_SIGSTRUCT, SGX_INVALID_SIG_STRUCT, offset,
                    "malformed SIGSTRUCT at byte %zu: %s", offset, wrong);
}

/* The signed parts are bytes 0 to 127 and 900 to 1027. */
static int check_signature(const uint8_t *bytes, const struct sgx_sigstruct *sigstruct, struct teemate_diag *diag)
{
    struct sha256 sha;
    uint8_t digest[32];
    int result;

    sha256_init(&sha);
    sha256_update(&sha, bytes, offsetof(struct sgx_sigstruct, modulus));
    sha256_update(&sha, bytes + offsetof(struct sgx_sigstruct, miscselect),
                  offsetof(struct sgx_sigstruct, reserved4) - offsetof(struct sgx_sigstruct, miscselect));
    sha256_final(&sha, digest);
    result = rsa3072_e3_verify(sigstruct->modulus, sigstruct->signature, sigstruct->q1, sigstruct->q2, digest);
    if (result == -2)
        return malformed(diag, offsetof(struct sgx_sigstruct, q1),
                         "Q1 and Q2 are not the quotients of its signature, which is right itself");
    if (result < 0)
        return diag_set(diag, -EKEYREJECTED, TEEMATE_STEP_SIGSTRUCT, SGX_INVALID_SIGNATURE,
                        offsetof(struct sgx_sigstruct, signature),
                        "the signature of the SIGSTRUCT is wrong: it was changed after it was signed, or signed with "
                        "another key than its modulus says");
    return 0;
}

int teemate_sigstruct_verify(const uint8_t *bytes, const uint8_t *mrenclave, uint8_t *mrsigner,
                             struct teemate_diag *diag)
{
    struct sgx_sigstruct sigstruct;
    int result;

    memcpy(&sigstruct, bytes, sizeof(sigstruct));
    for (size_t i = 0; i < sizeof(constants) / sizeof(constants[0]); i++)
        if (memcmp(bytes + constants[i].offset, constants[i].value, constants[i].size) != 0)
            return malformed(diag, constants[i].offset, constants[i].wrong);
    if (sigstruct.vendor != 0 && sigstruct.vendor != 0x8086)
        return malformed(diag, offsetof(struct sgx_sigstruct, vendor), "VENDOR is neither 0 nor 8086h");

    if (SIGNATURE_CHECKED) {
        result = check_signature(bytes, &sigstruct, diag);
        if (result < 0)
            return result;
    }
    if (mrenclave && memcmp(sigstruct.enclavehash, mrenclave, sizeof(sigstruct.enclavehash)) != 0)
        return diag_set(diag, -EKEYEXPIRED, TEEMATE_STEP_SIGSTRUCT, SGX_INVALID_MEASUREMENT,
                        offsetof(struct sgx_sigstruct, enclavehash),
                        "the SIGSTRUCT is for another image: its ENCLAVEHASH is not this one's MRENCLAVE");
    if (mrsigner)
        teemate_sha256(sigstruct.modulus, sizeof(sigstruct.modulus), mrsigner);
    return 0;
}
