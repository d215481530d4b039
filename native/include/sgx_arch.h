/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Architectural structures and constants of Intel SGX (SDM volume 3D, chapters
 * "Enclave Access Control and Data Structures" and "SGX Instruction References").
 *
 * Shared by libteemate, the warden, the SDK (inside the enclave) and tests, so
 * it includes nothing but freestanding headers.  Every size is checked at
 * compile time.
 */
#ifndef SGX_ARCH_H
#define SGX_ARCH_H

#include <stddef.h>
#include <stdint.h>

#if defined(__cplusplus) && !defined(_Static_assert)
#define _Static_assert static_assert
#endif

#define SGX_PAGE 4096u

/* Leaves of ENCLU (EAX). */
enum sgx_enclu {
    SGX_EREPORT = 0,
    SGX_EGETKEY = 1,
    SGX_EENTER = 2,
    SGX_ERESUME = 3,
    SGX_EEXIT = 4,
    SGX_EACCEPT = 5,
    SGX_EMODPE = 6,
    SGX_EACCEPTCOPY = 7,
};

/* Error codes that ENCLU and ENCLS leaves return in RAX. */
enum sgx_error {
    SGX_SUCCESS = 0,
    SGX_INVALID_SIG_STRUCT = 1,
    SGX_INVALID_ATTRIBUTE = 2,
    SGX_BLKSTATE = 3,
    SGX_INVALID_MEASUREMENT = 4,
    SGX_NOTBLOCKABLE = 5,
    SGX_PG_INVLD = 6,
    SGX_EPC_PAGE_CONFLICT = 7,
    SGX_INVALID_SIGNATURE = 8,
    SGX_MAC_COMPARE_FAIL = 9,
    SGX_PAGE_NOT_BLOCKED = 10,
    SGX_NOT_TRACKED = 11,
    SGX_VA_SLOT_OCCUPIED = 12,
    SGX_CHILD_PRESENT = 13,
    SGX_ENCLAVE_ACT = 14,
    SGX_ENTRYEPOCH_LOCKED = 15,
    SGX_INVALID_EINITTOKEN = 16,
    SGX_PREV_TRK_INCMPL = 17,
    SGX_PG_IS_SECS = 18,
    SGX_PAGE_ATTRIBUTES_MISMATCH = 19,
    SGX_PAGE_NOT_MODIFIABLE = 20,
    SGX_PAGE_NOT_DEBUGGABLE = 21,
    SGX_INVALID_CPUSVN = 32,
    SGX_INVALID_ISVSVN = 64,
    SGX_UNMASKED_EVENT = 128,
    SGX_INVALID_KEYNAME = 256,
};

/* Page types (EPCM.PT, SECINFO.FLAGS bits 15:8). */
enum sgx_page_type {
    SGX_PT_SECS = 0,
    SGX_PT_TCS = 1,
    SGX_PT_REG = 2,
    SGX_PT_VA = 3,
    SGX_PT_TRIM = 4,
};

#define SGX_SECINFO_R 0x01u
#define SGX_SECINFO_W 0x02u
#define SGX_SECINFO_X 0x04u
#define SGX_SECINFO_PENDING 0x08u
#define SGX_SECINFO_MODIFIED 0x10u
#define SGX_SECINFO_PR 0x20u
#define SGX_SECINFO_PT(type) ((uint64_t)(type) << 8)

#define SGX_ATTR_INIT 0x01ull
#define SGX_ATTR_DEBUG 0x02ull
#define SGX_ATTR_MODE64BIT 0x04ull
#define SGX_ATTR_PROVISIONKEY 0x10ull
#define SGX_ATTR_EINITTOKENKEY 0x20ull
#define SGX_ATTR_CET 0x40ull
#define SGX_ATTR_KSS 0x80ull
#define SGX_ATTR_AEXNOTIFY 0x400ull

#define SGX_XFRM_LEGACY 3ull /* x87 and SSE: required in every enclave */
#define SGX_XFRM_AVX 4ull

#define SGX_MISC_EXINFO 0x1u

#define SGX_TCS_DBGOPTIN 0x1ull
#define SGX_TCS_AEXNOTIFY 0x2ull

struct sgx_attributes {
    uint64_t flags;
    uint64_t xfrm;
};
_Static_assert(sizeof(struct sgx_attributes) == 16, "ATTRIBUTES");

struct sgx_tcs {
    uint64_t stage; /* the state; reserved for the processor */
    uint64_t flags;
    uint64_t ossa; /* offset of the SSA frames from the enclave's base */
    uint32_t cssa;
    uint32_t nssa;
    uint64_t oentry;
    uint64_t aep; /* reserved for the processor */
    uint64_t ofsbase;
    uint64_t ogsbase;
    uint32_t fslimit;
    uint32_t gslimit;
    uint64_t ocetssa;
    uint64_t oprevssp;
    uint8_t reserved[4008];
};
_Static_assert(sizeof(struct sgx_tcs) == 4096, "TCS");
_Static_assert(offsetof(struct sgx_tcs, oentry) == 32, "TCS.OENTRY");

/* The tail of every SSA frame. */
struct sgx_gprs {
    uint64_t rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t rflags, rip;
    uint64_t ursp, urbp; /* the host's stack and frame pointer at entry */
    uint32_t exitinfo;   /* vector | type << 8 | valid << 31 */
    uint32_t reserved;
    uint64_t fsbase, gsbase;
};
_Static_assert(sizeof(struct sgx_gprs) == 184, "GPRSGX");
_Static_assert(offsetof(struct sgx_gprs, exitinfo) == 160, "GPRSGX.EXITINFO");

#define SGX_EXITINFO_VALID 0x80000000u
#define SGX_EXITINFO_HARDWARE (3u << 8)
#define SGX_EXITINFO_SOFTWARE (6u << 8)

/* Below GPRSGX when MISCSELECT.EXINFO is set. */
struct sgx_exinfo {
    uint64_t maddr;
    uint32_t errcd;
    uint32_t reserved;
};
_Static_assert(sizeof(struct sgx_exinfo) == 16, "EXINFO");

struct sgx_secinfo {
    uint64_t flags;
    uint8_t reserved[56];
} __attribute__((aligned(64)));
_Static_assert(sizeof(struct sgx_secinfo) == 64, "SECINFO");

struct sgx_targetinfo {
    uint8_t mrenclave[32];
    struct sgx_attributes attributes;
    uint16_t cet_attributes;
    uint16_t configsvn;
    uint32_t miscselect;
    uint8_t reserved1[8];
    uint8_t configid[64];
    uint8_t reserved2[384];
} __attribute__((aligned(512)));
_Static_assert(sizeof(struct sgx_targetinfo) == 512, "TARGETINFO");

struct sgx_report {
    uint8_t cpusvn[16];
    uint32_t miscselect;
    uint8_t reserved1[12];
    uint8_t isvextprodid[16];
    struct sgx_attributes attributes;
    uint8_t mrenclave[32];
    uint8_t reserved2[32];
    uint8_t mrsigner[32];
    uint8_t reserved3[32];
    uint8_t configid[64];
    uint16_t isvprodid;
    uint16_t isvsvn;
    uint16_t configsvn;
    uint8_t reserved4[42];
    uint8_t isvfamilyid[16];
    uint8_t reportdata[64];
    uint8_t keyid[32]; /* the MAC covers what is before this field */
    uint8_t mac[16];
} __attribute__((aligned(16)));
_Static_assert(sizeof(struct sgx_report) == 432, "REPORT");
_Static_assert(offsetof(struct sgx_report, keyid) == 384, "REPORT.KEYID");

/* CPUSVN of every sim enclave: whoever reads a report sees that nothing protects it. */
#define SGX_SIM_CPUSVN {'s', 'i', 'm'}

enum sgx_key_name {
    SGX_KEY_EINITTOKEN = 0,
    SGX_KEY_PROVISION = 1,
    SGX_KEY_PROVISION_SEAL = 2,
    SGX_KEY_REPORT = 3,
    SGX_KEY_SEAL = 4,
};

#define SGX_KEYPOLICY_MRENCLAVE 0x1u
#define SGX_KEYPOLICY_MRSIGNER 0x2u

struct sgx_keyrequest {
    uint16_t keyname;
    uint16_t keypolicy;
    uint16_t isvsvn;
    uint16_t reserved1;
    uint8_t cpusvn[16];
    struct sgx_attributes attributemask;
    uint8_t keyid[32];
    uint32_t miscmask;
    uint16_t configsvn;
    uint8_t reserved2[434];
} __attribute__((aligned(512)));
_Static_assert(sizeof(struct sgx_keyrequest) == 512, "KEYREQUEST");

struct sgx_sigstruct {
    uint8_t header[16];
    uint32_t vendor;
    uint32_t date; /* BCD yyyymmdd */
    uint8_t header2[16];
    uint32_t swdefined;
    uint8_t reserved1[84];
    uint8_t modulus[384]; /* little endian, as the three below */
    uint32_t exponent;
    uint8_t signature[384];
    uint32_t miscselect;
    uint32_t miscmask;
    uint8_t cet_attributes;
    uint8_t cet_attributes_mask;
    uint8_t reserved2[2];
    uint8_t isvfamilyid[16];
    struct sgx_attributes attributes;
    struct sgx_attributes attributemask;
    uint8_t enclavehash[32];
    uint8_t reserved3[16];
    uint8_t isvextprodid[16];
    uint16_t isvprodid;
    uint16_t isvsvn;
    uint8_t reserved4[12];
    uint8_t q1[384];
    uint8_t q2[384];
} __attribute__((packed));
_Static_assert(sizeof(struct sgx_sigstruct) == 1808, "SIGSTRUCT");
_Static_assert(offsetof(struct sgx_sigstruct, miscselect) == 900, "SIGSTRUCT.MISCSELECT");
_Static_assert(offsetof(struct sgx_sigstruct, enclavehash) == 960, "SIGSTRUCT.ENCLAVEHASH");
_Static_assert(offsetof(struct sgx_sigstruct, isvprodid) == 1024, "SIGSTRUCT.ISVPRODID");
_Static_assert(offsetof(struct sgx_sigstruct, q1) == 1040, "SIGSTRUCT.Q1");

/* Exception vectors, as run.exception_vector reports them. */
enum sgx_vector {
    SGX_VECTOR_DE = 0,
    SGX_VECTOR_DB = 1,
    SGX_VECTOR_BP = 3,
    SGX_VECTOR_BR = 5,
    SGX_VECTOR_UD = 6,
    SGX_VECTOR_GP = 13,
    SGX_VECTOR_PF = 14,
    SGX_VECTOR_MF = 16,
    SGX_VECTOR_AC = 17,
    SGX_VECTOR_MC = 18,
    SGX_VECTOR_XM = 19,
};

/* Page fault error code bits. */
#define SGX_PF_P 0x1u
#define SGX_PF_W 0x2u
#define SGX_PF_U 0x4u
#define SGX_PF_I 0x10u
#define SGX_PF_SGX 0x8000u

/*
 * The argument and result of an entry: the kernel's struct of the same name
 * (uapi asm/sgx.h), defined here so that no kernel header is needed.
 */
#ifndef _UAPI_ASM_X86_SGX_H
struct sgx_enclave_run {
    uint64_t tcs;
    uint32_t function; /* in error and exit cases: the last leaf executed */
    uint16_t exception_vector;
    uint16_t exception_error_code;
    uint64_t exception_addr;
    uint64_t user_handler;
    uint64_t user_data;
    uint8_t reserved[216];
};
_Static_assert(sizeof(struct sgx_enclave_run) == 256, "sgx_enclave_run");
#endif

#endif
