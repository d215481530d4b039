/* SPDX-License-Identifier: Apache-2.0 */
/*
 * EINIT (SDM volume 3D, "EINIT: Initialize an Enclave for Execution"), as Linux's
 * driver calls it: the signer's hash is written to IA32_SGXLEPUBKEYHASH first, so
 * everybody may sign and there are no EINITTOKENs (arch/x86/kernel/cpu/sgx/ioctl.c).
 */
#include "sim.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "crypto.h"
#include "enclave.h"
#include "secs.h"
#include "sim_check.h"

static const uint8_t header1[16] = {6, 0, 0, 0, 0xe1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0};
static const uint8_t header2[16] = {1, 1, 0, 0, 0x60, 0, 0, 0, 0x60, 0, 0, 0, 1, 0, 0, 0};

static bool all_zero(const void *data, size_t length)
{
    const uint8_t *byte = data;
    uint8_t all = 0;

    while (length--)
        all |= *byte++;
    return all == 0;
}

static int refuse(struct teemate_diag *diag, int error, int code, uint64_t offset, const char *why)
{
    return diag_set(diag, error, TEEMATE_STEP_EINIT, code, offset, "EINIT refuses the enclave: %s", why);
}

static bool signature_wrong(const struct sgx_sigstruct *sigstruct)
{
    uint8_t body[256], digest[32];

    memcpy(body, sigstruct, 128);
    memcpy(body + 128, (const uint8_t *)sigstruct + offsetof(struct sgx_sigstruct, miscselect), 128);
    teemate_sha256(body, sizeof(body), digest);
    return rsa3072_e3_verify(sigstruct->modulus, sigstruct->signature, sigstruct->q1, sigstruct->q2, digest) != 0;
}

int einit_refusal(const struct sgx_attributes *attributes, uint32_t miscselect,
                  const struct sgx_sigstruct *sigstruct, const uint8_t mrenclave[32], struct teemate_diag *diag)
{
    if (SIM_CHECK("EINIT.HEADER", memcmp(sigstruct->header, header1, sizeof(header1))))
        return refuse(diag, -EBADMSG, SGX_INVALID_SIG_STRUCT, 0, "SIGSTRUCT.HEADER is wrong");
    if (SIM_CHECK("EINIT.VENDOR", sigstruct->vendor != 0 && sigstruct->vendor != 0x8086))
        return refuse(diag, -EBADMSG, SGX_INVALID_SIG_STRUCT, offsetof(struct sgx_sigstruct, vendor),
                      "SIGSTRUCT.VENDOR is neither 0 nor 8086h");
    if (SIM_CHECK("EINIT.HEADER2", memcmp(sigstruct->header2, header2, sizeof(header2))))
        return refuse(diag, -EBADMSG, SGX_INVALID_SIG_STRUCT, offsetof(struct sgx_sigstruct, header2),
                      "SIGSTRUCT.HEADER2 is wrong");
    if (SIM_CHECK("EINIT.EXPONENT", sigstruct->exponent != 3))
        return refuse(diag, -EBADMSG, SGX_INVALID_SIG_STRUCT, offsetof(struct sgx_sigstruct, exponent),
                      "SIGSTRUCT.EXPONENT is not 3");
    if (SIM_CHECK("EINIT.RESERVED1", !all_zero(sigstruct->reserved1, sizeof(sigstruct->reserved1))))
        return refuse(diag, -EBADMSG, SGX_INVALID_SIG_STRUCT, offsetof(struct sgx_sigstruct, reserved1),
                      "the reserved bytes after SIGSTRUCT.SWDEFINED are not zero");
    /* CET_ATTRIBUTES is reserved where the processor has no CET for enclaves. */
    if (SIM_CHECK("EINIT.RESERVED2", sigstruct->cet_attributes || sigstruct->cet_attributes_mask ||
                                         !all_zero(sigstruct->reserved2, sizeof(sigstruct->reserved2))))
        return refuse(diag, -EBADMSG, SGX_INVALID_SIG_STRUCT, offsetof(struct sgx_sigstruct, cet_attributes),
                      "the reserved bytes after SIGSTRUCT.MISCMASK are not zero");
    if (SIM_CHECK("EINIT.RESERVED3", !all_zero(sigstruct->reserved3, sizeof(sigstruct->reserved3))))
        return refuse(diag, -EBADMSG, SGX_INVALID_SIG_STRUCT, offsetof(struct sgx_sigstruct, reserved3),
                      "the reserved bytes after SIGSTRUCT.ENCLAVEHASH are not zero");
    if (SIM_CHECK("EINIT.RESERVED4", !all_zero(sigstruct->reserved4, sizeof(sigstruct->reserved4))))
        return refuse(diag, -EBADMSG, SGX_INVALID_SIG_STRUCT, offsetof(struct sgx_sigstruct, reserved4),
                      "the reserved bytes after SIGSTRUCT.ISVSVN are not zero");
#ifdef TEEMATE_TEST_BUILD
    /* The negative control of the tests that guard the signature. */
    if (strcmp(TEEMATE_TEST_BUILD, "signature") != 0)
#endif
        if (SIM_CHECK("EINIT.SIGNATURE", signature_wrong(sigstruct)))
            return refuse(diag, -EKEYREJECTED, SGX_INVALID_SIGNATURE, offsetof(struct sgx_sigstruct, signature),
                          "the signature of the SIGSTRUCT is not right for its public key");
    if (SIM_CHECK("EINIT.FAMILY", !(attributes->flags & SGX_ATTR_KSS) &&
                                      !all_zero(sigstruct->isvfamilyid, sizeof(sigstruct->isvfamilyid))))
        return refuse(diag, -EBADMSG, SGX_INVALID_SIG_STRUCT, offsetof(struct sgx_sigstruct, isvfamilyid),
                      "SIGSTRUCT.ISVFAMILYID needs ATTRIBUTES.KSS");
    if (SIM_CHECK("EINIT.HASH", memcmp(sigstruct->enclavehash, mrenclave, 32)))
        return refuse(diag, -EKEYEXPIRED, SGX_INVALID_MEASUREMENT, offsetof(struct sgx_sigstruct, enclavehash),
                      "the SIGSTRUCT is for another enclave: MRENCLAVE is not its ENCLAVEHASH");
    if (SIM_CHECK("EINIT.ATTRIBUTES",
                  (attributes->flags ^ sigstruct->attributes.flags) & sigstruct->attributemask.flags & ~SGX_ATTR_INIT))
        return refuse(diag, -EACCES, SGX_INVALID_ATTRIBUTE, offsetof(struct sgx_sigstruct, attributes),
                      "the SIGSTRUCT does not allow these ATTRIBUTES (a debug enclave needs a SIGSTRUCT that allows it)");
    /* The loader takes XFRM and MISCSELECT from the SIGSTRUCT: no caller can make them differ. */
    if ((attributes->xfrm ^ sigstruct->attributes.xfrm) & sigstruct->attributemask.xfrm)
        return refuse(diag, -EACCES, SGX_INVALID_ATTRIBUTE, offsetof(struct sgx_sigstruct, attributes) + 8,
                      "the SIGSTRUCT does not allow this XFRM");
    if ((miscselect ^ sigstruct->miscselect) & sigstruct->miscmask)
        return refuse(diag, -EACCES, SGX_INVALID_ATTRIBUTE, offsetof(struct sgx_sigstruct, miscselect),
                      "the SIGSTRUCT does not allow this MISCSELECT");
    return 0;
}

int sim_init(struct teemate_enclave *enclave, const struct sgx_sigstruct *sigstruct,
             const uint8_t mrenclave[32], struct teemate_diag *diag)
{
    struct sim_header *secs = enclave->sim->header;
    struct sgx_attributes attributes = secs->attributes;
    uint8_t mrsigner[32];
    int error;

    /* Before the instruction: the driver's own checks (sgx_ioc_enclave_init). */
    if (enclave->finished || attributes.flags & SGX_ATTR_INIT)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_EINIT, 0, 0, "the enclave is initialized already");
    if (SIM_CHECK("EINIT.PROVISION", attributes.flags & ~SGX_ATTR_UNPRIVILEGED))
        return refuse(diag, -EACCES, 0, offsetof(struct sgx_sigstruct, attributes),
                      "ATTRIBUTES.PROVISIONKEY needs /dev/sgx_provision, which the sim does not have, and Linux "
                      "gives EINITTOKENKEY to nobody");
    error = einit_refusal(&attributes, secs->miscselect, sigstruct, mrenclave, diag);
    if (error)
        return error;

    /* From now on the file keeps its size for ever: whoever maps it relies on it. */
    if (fcntl(enclave->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        return diag_set(diag, -errno, TEEMATE_STEP_EINIT, 0, 0, "cannot seal the enclave's memfd: %s",
                        strerror(errno));
    teemate_sha256(sigstruct->modulus, sizeof(sigstruct->modulus), mrsigner);
    memcpy(secs->mrenclave, mrenclave, sizeof(secs->mrenclave));
    memcpy(secs->mrsigner, mrsigner, sizeof(secs->mrsigner));
    memcpy(secs->isvextprodid, sigstruct->isvextprodid, sizeof(secs->isvextprodid));
    memcpy(secs->isvfamilyid, sigstruct->isvfamilyid, sizeof(secs->isvfamilyid));
    secs->isvprodid = sigstruct->isvprodid;
    secs->isvsvn = sigstruct->isvsvn;
    attributes.flags |= SGX_ATTR_INIT;
    /* The commit: nobody can enter before this store, and it comes after all others. */
    __atomic_store_n(&secs->attributes.flags, attributes.flags, __ATOMIC_RELEASE);

    enclave->info.attributes = attributes.flags;
    enclave->info.isvprodid = secs->isvprodid;
    enclave->info.isvsvn = secs->isvsvn;
    memcpy(enclave->info.mrenclave, mrenclave, sizeof(enclave->info.mrenclave));
    memcpy(enclave->info.mrsigner, mrsigner, sizeof(enclave->info.mrsigner));
    enclave->finished = true;
    return 0;
}
