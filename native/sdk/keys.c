/* SPDX-License-Identifier: Apache-2.0 */
/* EREPORT, EGETKEY, sealing, and time. */
#include "crypto.h"
#include "thread.h"

static _Atomic uint64_t now;

void time_set(uint64_t nanoseconds)
{
    uint64_t last = now;

    while (nanoseconds > last)
        if (__atomic_compare_exchange_n((uint64_t *)&now, &last, nanoseconds, false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
            return;
}

uint64_t tm_time(void)
{
    return now;
}

/* SDM, EREPORT: RBX TARGETINFO, RCX REPORTDATA, RDX output; aligned 512, 128, 512. */
static void ereport(const struct sgx_targetinfo *target, const void *data, void *output)
{
    __asm__ volatile("enclu" : : "a"(SGX_EREPORT), "b"(target), "c"(data), "d"(output) : "memory", "cc");
}

void tm_report(const struct sgx_targetinfo *target, const uint8_t reportdata[64], struct sgx_report *report)
{
    struct sgx_targetinfo aligned_target = {0};
    uint8_t data[64] __attribute__((aligned(128)));
    uint8_t output[512] __attribute__((aligned(512)));

    memcpy(data, reportdata, sizeof(data));
    if (target) {
        memcpy(&aligned_target, target, sizeof(aligned_target));
    } else {
        /* A report for nobody tells what we are; then one for that. */
        ereport(&aligned_target, data, output);
        const struct sgx_report *first = (const void *)output;
        memcpy(aligned_target.mrenclave, first->mrenclave, sizeof(aligned_target.mrenclave));
        aligned_target.attributes = first->attributes;
        aligned_target.miscselect = first->miscselect;
        aligned_target.configsvn = first->configsvn;
        memcpy(aligned_target.configid, first->configid, sizeof(aligned_target.configid));
    }
    ereport(&aligned_target, data, output);
    memcpy(report, output, sizeof(*report));
}

/* SDM, EGETKEY: RBX KEYREQUEST (its type aligns it to 512), RCX output; the error in RAX. */
static uint64_t egetkey(const struct sgx_keyrequest *request, uint8_t key[16])
{
    uint8_t output[16] __attribute__((aligned(16)));
    uint64_t error = SGX_EGETKEY;

    __asm__ volatile("enclu" : "+a"(error) : "b"(request), "c"(output) : "memory", "cc");
    if (!error)
        memcpy(key, output, sizeof(output));
    tm_wipe(output, sizeof(output));
    return error;
}

/* SDM, EREPORT and EGETKEY: the report key depends on the target alone, so only the target can derive it. */
int tm_report_verify(const struct sgx_report *report)
{
    struct sgx_keyrequest request = {.keyname = SGX_KEY_REPORT};
    uint8_t key[16], mac[16], nothing[64] = {0};
    struct sgx_report own;
    int differs;

    memcpy(request.keyid, report->keyid, sizeof(request.keyid));
    if (egetkey(&request, key))
        return TM_E_MAC;
    aes128_cmac(key, report, offsetof(struct sgx_report, keyid), mac);
    differs = tm_compare(mac, report->mac, sizeof(mac));
    tm_wipe(key, sizeof(key));
    tm_wipe(mac, sizeof(mac)); /* it would be the right one for whatever was asked about */
    if (!differs)
        return 0;
    tm_report(NULL, nothing, &own);
    return tm_compare(own.cpusvn, report->cpusvn, sizeof(own.cpusvn)) ? TM_E_PLATFORM : TM_E_MAC;
}

/* What a sealed blob starts with; all of it is authenticated. */
struct sealed {
    uint32_t magic;
    uint16_t policy;
    uint16_t isvsvn;
    uint8_t cpusvn[16];
    uint8_t keyid[32];
    uint8_t reserved[8];
    uint8_t tag[16];
};
_Static_assert(sizeof(struct sealed) == TM_SEAL_OVERHEAD, "TM_SEAL_OVERHEAD");
#define SEALED_MAGIC 0x31535445u /* "ETS1" */

/*
 * Without MRENCLAVE and MRSIGNER every enclave of this computer derives the same key (SDM, EGETKEY),
 * and could forge what we unseal; other bits are a #GP where the enclave has no KSS.
 */
static bool policy_is_ours(uint16_t policy)
{
    return policy && !(policy & ~(SGX_KEYPOLICY_MRENCLAVE | SGX_KEYPOLICY_MRSIGNER));
}

static int seal_key(uint16_t policy, uint16_t isvsvn, const uint8_t cpusvn[16], const uint8_t keyid[32],
                    uint8_t key[16])
{
    struct sgx_keyrequest request = {
        .keyname = SGX_KEY_SEAL,
        .keypolicy = policy,
        .isvsvn = isvsvn,
        /* Debug and product builds must not share keys; INIT and the mode are always there. */
        .attributemask = {.flags = ~0ull, .xfrm = SGX_XFRM_LEGACY},
        .miscmask = ~0u,
    };

    if (!policy_is_ours(policy))
        return TM_E_ARGUMENT;
    memcpy(request.cpusvn, cpusvn, sizeof(request.cpusvn));
    memcpy(request.keyid, keyid, sizeof(request.keyid));
    return egetkey(&request, key) ? TM_E_MAC : 0; /* a newer CPUSVN or ISVSVN than ours */
}

int tm_seal_key(uint16_t policy, const uint8_t keyid[32], uint8_t key[16])
{
    uint8_t nothing[64] = {0};
    struct sgx_report report;

    tm_report(NULL, nothing, &report);
    return seal_key(policy, report.isvsvn, report.cpusvn, keyid, key);
}

/*
 * The key is fresh for each blob (a random KEYID), so the nonce may be zero: no
 * key ever seals twice.
 */
static void seal_aad(struct sha256 *sha, const struct sealed *head, const void *aad, size_t aad_len,
                     uint8_t digest[32])
{
    sha256_init(sha);
    sha256_update(sha, head, offsetof(struct sealed, tag));
    sha256_update(sha, aad, aad_len);
    sha256_final(sha, digest);
}

int tm_seal(uint16_t policy, const void *aad, size_t aad_len, const void *in, size_t length, void *out)
{
    static const uint8_t nonce[12];
    struct sealed head = {.magic = SEALED_MAGIC, .policy = policy};
    uint8_t key[16], digest[32], nothing[64] = {0};
    struct sgx_report report;
    struct sha256 sha;
    int status;

    tm_report(NULL, nothing, &report);
    head.isvsvn = report.isvsvn;
    memcpy(head.cpusvn, report.cpusvn, sizeof(head.cpusvn));
    tm_random(head.keyid, sizeof(head.keyid));
    status = seal_key(policy, head.isvsvn, head.cpusvn, head.keyid, key);
    if (status)
        return status;
    seal_aad(&sha, &head, aad, aad_len, digest);
    aes128_gcm_seal(key, nonce, digest, sizeof(digest), in, length, (uint8_t *)out + sizeof(head), head.tag);
    memcpy(out, &head, sizeof(head));
    tm_wipe(key, sizeof(key));
    return 0;
}

int tm_unseal(const void *aad, size_t aad_len, const void *in, size_t length, void *out)
{
    static const uint8_t nonce[12];
    struct sealed head;
    uint8_t key[16], digest[32];
    struct sha256 sha;
    int status;

    if (length < sizeof(head))
        return TM_E_ARGUMENT;
    memcpy(&head, in, sizeof(head));
    if (head.magic != SEALED_MAGIC)
        return TM_E_ARGUMENT;
    status = seal_key(head.policy, head.isvsvn, head.cpusvn, head.keyid, key);
    if (status)
        return status;
    seal_aad(&sha, &head, aad, aad_len, digest);
    status = aes128_gcm_open(key, nonce, digest, sizeof(digest), (const uint8_t *)in + sizeof(head),
                             length - sizeof(head), out, head.tag);
    tm_wipe(key, sizeof(key));
    return status ? TM_E_MAC : 0;
}

void tm_aead_seal(const uint8_t key[16], const uint8_t nonce[12], const void *aad, size_t aad_len,
                  const void *in, size_t length, void *out, uint8_t tag[16])
{
    aes128_gcm_seal(key, nonce, aad, aad_len, in, length, out, tag);
}

int tm_aead_open(const uint8_t key[16], const uint8_t nonce[12], const void *aad, size_t aad_len,
                 const void *in, size_t length, void *out, const uint8_t tag[16])
{
    return aes128_gcm_open(key, nonce, aad, aad_len, in, length, out, tag) ? TM_E_MAC : 0;
}

void tm_sha256(const void *data, size_t length, uint8_t digest[32])
{
    struct sha256 sha;

    sha256_init(&sha);
    sha256_update(&sha, data, length);
    sha256_final(&sha, digest);
}
