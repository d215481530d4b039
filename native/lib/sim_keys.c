/* SPDX-License-Identifier: Apache-2.0 */
/* EGETKEY (SDM volume 3D, "EGETKEY: Retrieves a Cryptographic Key"). */
#include "sim_keys.h"

#include <string.h>

#include "crypto.h"
#include "enclave.h"
#include "sim_check.h"
#include "sim_enclu.h"

/* KEYPOLICY bits of Key Separation and Sharing (ATTRIBUTES.KSS). */
#define POLICY_NOISVPRODID 0x04u
#define POLICY_CONFIGID 0x08u
#define POLICY_ISVFAMILYID 0x10u
#define POLICY_ISVEXTPRODID 0x20u
#define POLICY_KSS 0x3cu
#define POLICY_RESERVED 0xffc0u

const uint8_t sim_cpusvn[16] = SGX_SIM_CPUSVN;
const uint8_t sim_report_keyid[32] = "simulated report key id";

/* In place of fuses and device key: public, the same on every computer. */
static const uint8_t seal_fuses[16] = "sim: no fuses";
static const uint8_t device_key[16] = "sim: not secret";

void sim_key_begin(struct sim_key_dependencies *key, enum sgx_key_name name)
{
    /* HARDCODED_PKCS1_5_PADDING: 0100h, 330 bytes of FFh, the DigestInfo of SHA-256. */
    static const uint8_t digest_info[20] = {0x00, 0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48,
                                            0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20};

    memset(key, 0, sizeof(*key));
    key->keyname = (uint16_t)name;
    memcpy(key->seal_fuses, seal_fuses, sizeof(seal_fuses));
    key->padding[1] = 1;
    memset(key->padding + 2, 0xff, 330);
    memcpy(key->padding + 332, digest_info, sizeof(digest_info));
}

void sim_key_derive(const struct sim_key_dependencies *key, uint8_t out[16])
{
    aes128_cmac(device_key, key, sizeof(*key), out);
}

/* "CPUSVN is beyond current CPU configuration": a component is newer. */
static bool cpusvn_beyond(const uint8_t svn[16])
{
    for (unsigned i = 0; i < 16; i++)
        if (svn[i] > sim_cpusvn[i])
            return true;
    return false;
}

/* What the enclave may not ask for, by key; SGX_SUCCESS when it may. */
static enum sgx_error refused(const struct sim_header *secs, const struct sgx_keyrequest *request)
{
    switch (request->keyname) {
    case SGX_KEY_REPORT:
        return SGX_SUCCESS;
    case SGX_KEY_SEAL:
        break;
    case SGX_KEY_EINITTOKEN:
        if (SIM_CHECK("EGETKEY.EINITTOKEN.ATTRIBUTE", !(secs->attributes.flags & SGX_ATTR_EINITTOKENKEY)))
            return SGX_INVALID_ATTRIBUTE;
        break;
    case SGX_KEY_PROVISION:
        if (SIM_CHECK("EGETKEY.PROVISION.ATTRIBUTE", !(secs->attributes.flags & SGX_ATTR_PROVISIONKEY)))
            return SGX_INVALID_ATTRIBUTE;
        break;
    case SGX_KEY_PROVISION_SEAL:
        if (SIM_CHECK("EGETKEY.PROVISION_SEAL.ATTRIBUTE", !(secs->attributes.flags & SGX_ATTR_PROVISIONKEY)))
            return SGX_INVALID_ATTRIBUTE;
        break;
    default:
        if (SIM_STEP("EGETKEY.KEYNAME"))
            return SGX_INVALID_KEYNAME;
    }
    if (SIM_CHECK("EGETKEY.CPUSVN", cpusvn_beyond(request->cpusvn)))
        return SGX_INVALID_CPUSVN;
    if (SIM_CHECK("EGETKEY.ISVSVN", request->isvsvn > secs->isvsvn))
        return SGX_INVALID_ISVSVN;
    if (SIM_CHECK("EGETKEY.CONFIGSVN", request->keyname == SGX_KEY_SEAL && request->configsvn > secs->configsvn))
        return SGX_INVALID_ISVSVN;
    return SGX_SUCCESS;
}

static void depend_on_policy(struct sim_key_dependencies *key, const struct sim_header *secs,
                             const struct sgx_keyrequest *request)
{
    key->keypolicy = request->keypolicy;
    if (SIM_CHECK("EGETKEY.POLICY.ISVFAMILYID", request->keypolicy & POLICY_ISVFAMILYID))
        memcpy(key->isvfamilyid, secs->isvfamilyid, sizeof(key->isvfamilyid));
    if (SIM_CHECK("EGETKEY.POLICY.NOISVPRODID", request->keypolicy & POLICY_NOISVPRODID))
        key->isvprodid = 0;
    if (request->keypolicy & POLICY_CONFIGID) {
        memcpy(key->configid, secs->configid, sizeof(key->configid));
        key->configsvn = request->configsvn;
    }
    if (SIM_CHECK("EGETKEY.POLICY.ISVEXTPRODID", request->keypolicy & POLICY_ISVEXTPRODID))
        memcpy(key->isvextprodid, secs->isvextprodid, sizeof(key->isvextprodid));
}

static void derive(const struct sim_header *secs, const struct sgx_keyrequest *request, uint8_t out[16])
{
    struct sim_key_dependencies key;

    sim_key_begin(&key, request->keyname);
    if (request->keyname == SGX_KEY_REPORT) {
        /* The counterpart of EREPORT: this enclave as a target. */
        key.attributes = secs->attributes;
        memcpy(key.mrenclave, secs->mrenclave, sizeof(key.mrenclave));
        memcpy(key.keyid, request->keyid, sizeof(key.keyid));
        memcpy(key.cpusvn, sim_cpusvn, sizeof(key.cpusvn));
        key.miscselect = secs->miscselect;
        memcpy(key.configid, secs->configid, sizeof(key.configid));
        key.configsvn = secs->configsvn;
        sim_key_derive(&key, out);
        return;
    }
    /* REQUIRED_SEALING_MASK: INIT and DEBUG always count. */
    key.attributes.flags =
        secs->attributes.flags &
        (request->attributemask.flags |
         (SIM_STEP("EGETKEY.SEALING_MASK") ? SGX_ATTR_INIT | SGX_ATTR_DEBUG : 0));
    key.attributes.xfrm = secs->attributes.xfrm & request->attributemask.xfrm;
    key.miscselect = secs->miscselect & request->miscmask;
    key.isvprodid = secs->isvprodid;
    key.isvsvn = request->isvsvn;
    memcpy(key.cpusvn, request->cpusvn, sizeof(key.cpusvn));
    if (request->keyname != SGX_KEY_EINITTOKEN) {
        key.attributesmask = request->attributemask;
        key.miscmask = ~request->miscmask;
    }
    switch (request->keyname) {
    case SGX_KEY_SEAL:
        depend_on_policy(&key, secs, request);
        if (SIM_CHECK("EGETKEY.POLICY.MRENCLAVE", request->keypolicy & SGX_KEYPOLICY_MRENCLAVE))
            memcpy(key.mrenclave, secs->mrenclave, sizeof(key.mrenclave));
        if (SIM_CHECK("EGETKEY.POLICY.MRSIGNER", request->keypolicy & SGX_KEYPOLICY_MRSIGNER))
            memcpy(key.mrsigner, secs->mrsigner, sizeof(key.mrsigner));
        memcpy(key.keyid, request->keyid, sizeof(key.keyid));
        break;
    case SGX_KEY_EINITTOKEN:
        memcpy(key.mrsigner, secs->mrsigner, sizeof(key.mrsigner));
        memcpy(key.keyid, request->keyid, sizeof(key.keyid));
        break;
    case SGX_KEY_PROVISION:
        memcpy(key.mrsigner, secs->mrsigner, sizeof(key.mrsigner));
        memset(key.seal_fuses, 0, sizeof(key.seal_fuses));
        break;
    default: /* SGX_KEY_PROVISION_SEAL */
        depend_on_policy(&key, secs, request);
        memcpy(key.mrsigner, secs->mrsigner, sizeof(key.mrsigner));
    }
    sim_key_derive(&key, out);
}

int sim_egetkey(struct teemate_enclave *enclave, struct sim_leaf_regs *regs, struct sim_fault *fault)
{
    const struct sim_header *secs = enclave->sim->header;
    bool kss = secs->attributes.flags & SGX_ATTR_KSS;
    struct sgx_keyrequest request;
    enum sgx_error error;
    uint8_t key[16];

    if (SIM_CHECK("EGETKEY.KEYREQUEST.ALIGN", regs->rbx & 511))
        return sim_gp(fault);
    if (SIM_CHECK("EGETKEY.KEYREQUEST.RANGE", !sim_in_elrange(enclave, regs->rbx, sizeof(request))))
        return sim_gp(fault);
    if (SIM_CHECK("EGETKEY.KEYREQUEST.ACCESS", !sim_access(enclave, regs->rbx, sizeof(request), 0, fault)))
        return 1;
    if (SIM_CHECK("EGETKEY.OUTPUT.ALIGN", regs->rcx & 15))
        return sim_gp(fault);
    if (SIM_CHECK("EGETKEY.OUTPUT.RANGE", !sim_in_elrange(enclave, regs->rcx, sizeof(key))))
        return sim_gp(fault);
    if (SIM_CHECK("EGETKEY.OUTPUT.ACCESS", !sim_access(enclave, regs->rcx, sizeof(key), SGX_PF_W, fault)))
        return 1;
    memcpy(&request, sim_at(enclave, regs->rbx), sizeof(request));
    if (SIM_CHECK("EGETKEY.RESERVED",
                  request.reserved1 || !sim_all_zero(request.reserved2, sizeof(request.reserved2))))
        return sim_gp(fault);
    if (SIM_CHECK("EGETKEY.POLICY.RESERVED", request.keypolicy & POLICY_RESERVED))
        return sim_gp(fault);
    if (SIM_CHECK("EGETKEY.POLICY.KSS", !kss && request.keypolicy & POLICY_KSS))
        return sim_gp(fault);
    if (SIM_CHECK("EGETKEY.CONFIGSVN.KSS", !kss && request.configsvn))
        return sim_gp(fault);
    error = refused(secs, &request);
    if (error)
        return sim_result(regs, error);
    derive(secs, &request, key);
    memcpy(sim_at(enclave, regs->rcx), key, sizeof(key));
    return sim_result(regs, SGX_SUCCESS);
}
