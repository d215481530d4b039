/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sim's model of the EPC of one enclave: one sealed memfd, shared by every
 * process that maps the enclave.
 *
 *   [0, size)                         page contents at their offset from the base
 *   [size, + SIM_HEADER_SIZE)         struct sim_header: SECS and what goes with it
 *   [.., + SIM_TCS_MAX * 64)          struct sim_tcs[], in the order of EADD
 *   [.., + pages * 8)                 EPCM, one word per page of ELRANGE
 *
 * Rule of commit: every leaf changes the shared state by ONE compare-and-swap,
 * on the word of its TCS or of its EPCM entry, after everything that the change
 * announces has been written; so SIGKILL leaves the state before or after, as
 * with one instruction.
 */
#ifndef TEEMATE_SIM_H
#define TEEMATE_SIM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "sgx_arch.h"

#define SIM_MAGIC 0x4d4953454d454554ull /* "TEEMSIM" */
#define SIM_VERSION 1u
#define SIM_HEADER_SIZE 4096u
#define SIM_TCS_MAX 4096u

struct sim_header {
    uint64_t magic;
    uint32_t version;
    uint32_t ssa_frame_pages;
    uint64_t base;
    uint64_t size;
    struct sgx_attributes attributes; /* INIT is set by EINIT, last of all */
    uint32_t miscselect;
    uint32_t sgx2; /* 0: the SGX2 calls and leaves are not there */
    uint8_t mrenclave[32];
    uint8_t mrsigner[32];
    uint8_t isvextprodid[16];
    uint8_t isvfamilyid[16];
    uint8_t configid[64];
    uint16_t isvprodid;
    uint16_t isvsvn;
    uint16_t configsvn;
    uint16_t reserved;
    _Atomic uint32_t tcs_count;
    /* Counts EPCM changes that take permissions away; a process whose mapping is
     * older drops its cached permissions before it enters (our TLB shootdown). */
    _Atomic uint32_t epoch;
};
_Static_assert(sizeof(struct sim_header) <= SIM_HEADER_SIZE, "sim_header");

/* TCS word: busy, CSSA and holder, changed by compare-and-swap only. */
#define SIM_TCS_BUSY 1ull
#define SIM_TCS_CSSA_SHIFT 8
#define SIM_TCS_CSSA(word) ((uint32_t)((word) >> SIM_TCS_CSSA_SHIFT) & 0xffffu)
/* Thread id in its own pid namespace, for people; not trusted.  Wardens and their children add
 * SIM_WARDEN: when one is killed inside, the next knows by it that the thread was theirs. */
#define SIM_TCS_HOLDER(word) ((uint32_t)((word) >> 32))
#define SIM_WARDEN 0x80000000u /* thread ids are below 2^22 (Linux, threads.h) */
#define SIM_TCS_WORD(holder, cssa, busy) \
    ((uint64_t)(holder) << 32 | (uint64_t)(cssa) << SIM_TCS_CSSA_SHIFT | (uint64_t)(busy))

/* What the processor keeps of a TCS; the page itself cannot be mapped. */
struct sim_tcs {
    _Atomic uint64_t word;
    uint64_t offset; /* of the page */
    uint64_t flags;
    uint64_t ossa;
    uint64_t oentry;
    uint64_t ofsbase;
    uint64_t ogsbase;
    uint32_t nssa;
    uint32_t valid;
};
_Static_assert(sizeof(struct sim_tcs) == 64, "sim_tcs");

/* EPCM word. */
#define SIM_EPCM_VALID 0x1ull
#define SIM_EPCM_R 0x2ull
#define SIM_EPCM_W 0x4ull
#define SIM_EPCM_X 0x8ull
#define SIM_EPCM_PENDING 0x10ull
#define SIM_EPCM_MODIFIED 0x20ull
#define SIM_EPCM_PR 0x40ull
#define SIM_EPCM_TYPE_SHIFT 8
#define SIM_EPCM_TYPE(word) ((uint32_t)((word) >> SIM_EPCM_TYPE_SHIFT) & 0xffu)
#define SIM_EPCM_TCS_SHIFT 16 /* index into the TCS table when the type is TCS */
#define SIM_EPCM_TCS(word) ((uint32_t)((word) >> SIM_EPCM_TCS_SHIFT) & 0xffffu)
/* Not the EPCM's but the driver's: what the page was added with, R W X (vm_max_prot_bits). */
#define SIM_EPCM_MAX_SHIFT 32
#define SIM_EPCM_MAX(word) ((uint32_t)((word) >> SIM_EPCM_MAX_SHIFT) & 7u)

#define SIM_TABLES_OFFSET(size) (size)
#define SIM_TABLES_SIZE(size) \
    (SIM_HEADER_SIZE + SIM_TCS_MAX * sizeof(struct sim_tcs) + (size) / SGX_PAGE * sizeof(uint64_t))

/* Which file it is: no other has these two numbers while somebody holds it. */
struct sim_file {
    dev_t device;
    ino_t inode; /* 0: not known */
};

/* This process's view of the tables, mapped anywhere, shared and writable. */
struct sim_mapping {
    struct sim_header *header;
    struct sim_tcs *tcs;
    _Atomic uint64_t *epcm;
    uint64_t tables_size;
    /*
     * The processor's own way to the pages: [0, size) once more, anywhere, readable
     * and writable whatever the EPCM says and never faulting.  Leaves, AEX, EENTER
     * and ERESUME reach enclave memory through it (after their checks), so that they
     * depend on no page permission.  Whoever opens an enclave has it right below the tables, in one mapping;
     * who made it has none (NULL) until sim_view_open, which whoever maps the enclave calls first.  The broker
     * does neither.
     */
    uint8_t *view;
    struct sim_file file;
    _Atomic uint32_t epoch; /* that our page permissions follow; 0: none cached yet */
    uint32_t holder_mark;   /* SIM_WARDEN in a warden, else 0 */
    /* By index: does this process map the TCS page?  Entering through another is a page fault. */
    _Atomic uint8_t tcs_mapped[SIM_TCS_MAX];
};

struct teemate_enclave;
struct create_params;
struct teemate_diag;

/* struct backend's calls as far as the model of the EPC goes (sim_epc.c, sim_einit.c). */
int sim_create(struct teemate_enclave *enclave, const struct create_params *params,
               struct teemate_diag *diag);
int sim_add_pages(struct teemate_enclave *enclave, uint64_t offset, const void *data, uint64_t size,
                  uint64_t secinfo_flags, bool measured, bool partly, struct teemate_diag *diag);
int sim_init(struct teemate_enclave *enclave, const struct sgx_sigstruct *sigstruct,
             const uint8_t mrenclave[32], struct teemate_diag *diag);
/* Fails with -ENODEV (not a sim enclave), -ESTALE (not a finished one, or of another
 * geometry), -EBADMSG (its tables make no sense), -ENOMEM. */
int sim_open(struct teemate_enclave *enclave, struct teemate_diag *diag);
/* Unmaps tables and view and frees enclave->sim.  The fd and what is mapped at the
 * base stay the caller's. */
void sim_close(struct teemate_enclave *enclave);

/* EADD's and EACCEPT's checks of a TCS page. */
bool sim_tcs_legal(const struct sgx_tcs *tcs);
/* Give a new TCS its place in the table, idle; its index, or -ENOSPC.  It counts once an
 * EPCM word names it. */
int sim_tcs_enlist(struct sim_mapping *sim, uint64_t offset, const struct sgx_tcs *tcs);

/* Map the view, once; 0 or a negative errno. */
int sim_view_open(struct teemate_enclave *enclave);

/*
 * ENCLU leaves other than EENTER, ERESUME and EEXIT, executed for a thread that
 * is inside (called from the signal handler: async-signal-safe, no TLS, no
 * stack protector, no malloc).  Registers as the SDM has them.
 */
struct sim_leaf_regs {
    uint64_t rax, rbx, rcx, rdx;
    uint64_t rflags; /* the leaves that set ZF and clear CF, PF, AF, OF, SF do so here */
};

/* What the leaf did: 0, or a fault to be delivered at the instruction. */
struct sim_fault {
    uint32_t vector; /* SGX_VECTOR_GP or SGX_VECTOR_PF */
    uint32_t error;
    uint64_t addr;
};
/* Returns 0 when the leaf was executed (RAX and RFLAGS set), 1 when *fault is to be raised. */
int sim_enclu(struct teemate_enclave *enclave, struct sim_leaf_regs *regs, struct sim_fault *fault);

/*
 * The sim's page fault: is this access of a thread inside allowed by the EPCM
 * and only our page table older (then it is brought up to date, returns 0), is
 * the page one to be added on demand (EAUG, then a #PF as on hardware), or is it
 * a true fault (returns 1, *fault filled)?
 */
int sim_page_fault(struct teemate_enclave *enclave, uint64_t addr, uint32_t error, struct sim_fault *fault);
/*
 * Bring in what every entry through this TCS touches: its SSA frames, its thread data and stack, the code, and
 * what adjoins that.  A fault brings them in as well, and takes five times as long.
 */
void sim_fetch_for(struct teemate_enclave *enclave, const struct sim_tcs *tcs);

/*
 * The EPCM's and this process's say in an access of a thread inside to [addr, addr + length),
 * which lies in one page; `access` is SGX_PF_W, SGX_PF_I or 0.  False with *fault filled (#PF,
 * with the SGX bit when the EPCM refuses) when it is not allowed.  A page that is not there is
 * added (EAUG) where the driver would.
 */
bool sim_access(struct teemate_enclave *enclave, uint64_t addr, uint32_t length, uint32_t access,
                struct sim_fault *fault);
/*
 * The driver's say in a mapping of the enclave's segments (Linux, encl.c, sgx_encl_may_map): 0, or
 * -EACCES when one is wider than a page in it was added with, or this process has
 * READ_IMPLIES_EXEC.
 */
int sim_may_map(const struct teemate_enclave *enclave, struct teemate_diag *diag);
/*
 * Does this process map the page of a TCS: by map_tcs, or as the regular page that it was
 * (EMODT leaves mappings alone)?  `index` is its place in the table.
 */
bool sim_tcs_is_mapped(const struct teemate_enclave *enclave, uint64_t offset, uint32_t index);
/* Where an address of ELRANGE lies in the view. */
void *sim_at(const struct teemate_enclave *enclave, uint64_t addr);

/* Before an entry: follow the epoch.  Maps of segments may start with any protection: the
 * first flush takes it away and page faults bring it back as the EPCM allows. */
void sim_flush(struct teemate_enclave *enclave);

/* The driver's SGX2 calls; 0 or a negative errno; *count as the ioctl's count field. */
int sim_restrict_permissions(struct teemate_enclave *enclave, uint64_t offset, uint64_t length,
                             uint64_t permissions, uint64_t *result, uint64_t *count);
int sim_modify_types(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t type,
                     uint64_t *result, uint64_t *count);
int sim_remove_pages(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t *count);

/* The AEX of the dead: busy becomes idle with CSSA + 1 and a poisoned frame.
 * Returns 1 when it was busy, 0 when not, or a negative errno. */
int sim_tcs_bury(struct teemate_enclave *enclave, uint64_t tcs_offset);

#endif
